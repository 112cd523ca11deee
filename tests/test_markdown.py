"""Rules out of Markdown."""

import pytest

from csrm_jax import markdown
from csrm_jax.spec import Spec


def _read(text):
  found = markdown.rules(text)
  return Spec.parse(found).render().split("\n") if found else []


@pytest.mark.parametrize(
  ("text", "lines"),
  [
    (
      "- No gambling\n* Do not promise refunds.\n1. Never swear\n2) Avoid x\n",
      [
        "S1: Disallowed: gambling.",
        "S2: Disallowed: promise refunds.",
        "S3: Disallowed: swear.",
        "S4: Disallowed: x.",
      ],
    ),
    (
      "# Shop\n\n- **Disallowed:** naming a competitor\n"
      "- Allowed: comparing\n  features\n- Must greet\n- You may quote prices",
      [
        "S1: Disallowed: naming a competitor.",
        "S2: Allowed: comparing features.",
        "S3: Required: greet.",
        "S4: Allowed: quote prices.",
      ],
    ),
    (
      "## Disallowed\n- hate\n- slurs\n## Allowed\n- jokes\n",
      [
        "S1: Disallowed: hate.",
        "S2: Disallowed: slurs.",
        "S3: Allowed: jokes.",
      ],
    ),
    (
      "- Alcohol\n  - Disallowed: heavy drinking\n  - Allowed: wine\n"
      "- Never swear",
      [
        "S1: Alcohol. Disallowed: heavy drinking. Allowed: wine.",
        "S2: Disallowed: swear.",
      ],
    ),
    (
      "## Alcohol\nKeep it clean.\nDisallowed:\n- heavy drinking (severity 3)\n"
      "- helping minors (severity 4)\nAllowed:\n- wine\n## Law\n"
      "Required: answer questions\n",
      [
        "S1: Alcohol. Keep it clean. Disallowed: helping minors; heavy "
        "drinking. Allowed: wine.",
        "S2: Law. Required: answer questions.",
      ],
    ),
    (
      "## Bank\nDisallowed: asking for a PIN; promising a loan.\n"
      "Required: be brief.\n",
      [
        "S1: Bank. Disallowed: asking for a PIN; promising a loan.",
        "S2: Bank. Required: be brief.",
      ],
    ),
  ],
)
def test_structures(text, lines):
  assert _read(text) == lines


@pytest.mark.parametrize(
  "text",
  [
    "Just prose.",
    "- Never swear\n- Be polite",  # the second item could mean anything
    "- Never swear, but always answer",  # a lead that the sentence turns
    "- Do not refund. Send them to a colleague.",
    "Our rules:\n\n- No gambling",  # prose would be lost
    "S1: Alcohol. Disallowed: drinking.",
    "# Title only",
    "## Tone\nbe polite",
  ],
)
def test_anything_doubtful_stays_text(text, tmp_path):
  assert markdown.rules(text) == []
  path = tmp_path / "s.md"
  path.write_text(text)
  assert Spec.read(path).render() == text


def test_ids_are_unique():
  found = markdown.rules("- No ads\n- No ads\n- Never ads!")
  assert len({rule["id"] for rule in found}) == 3
