"""OpenAI's teen-safety policies: responses under six written policies."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import exchange, settled

POLICIES = (
  "age-restricted-goods-and-services",
  "dangerous-content",
  "dangerous-roleplay",
  "graphic-sexual-content",
  "graphic-violent-content",
  "harmful-body-ideals",
)
FILES = (
  "teen_safety_policies/labelled.jsonl",
  *(f"teen_safety_policies/policies/{name}.md" for name in POLICIES),
)
# Policies with so little in common that a text which breaks one may be taken
# to keep the other. The three that are not here overlap with most.
APART = {
  "age-restricted-goods-and-services",
  "graphic-violent-content",
  "harmful-body-ideals",
}


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Responses under the policy they were labelled by, and under others.

  A response that breaks one of the policies of `APART` complies with another
  of them: one more label row and a spec pair. Text of the policies is read
  from the folder; what tells a classifier how to answer is cut off.
  """
  name = "teen_safety_policies"
  labelled, *texts = (find(path, name, file) for file in FILES)
  specs = {
    policy: policy_text(text.read_text(encoding="utf-8"))
    for policy, text in zip(POLICIES, texts, strict=True)
  }
  raws = settled(
    objects(labelled, ("id", "policy", "prompt", "response", "response_label")),
    lambda raw: (raw["policy"], raw["prompt"], raw["response"]),
    lambda raw: raw["response_label"],
    name=name,
    counts=counts,
  )
  for raw in raws:
    policy = raw["policy"]
    if policy not in specs:
      raise ValueError(
        f"{labelled}: row {raw['id']!r}: field 'policy': {policy!r}: must be "
        f"one of {', '.join(POLICIES)}"
      )
    common = {
      "messages": exchange(raw["prompt"], raw["response"]),
      "source": name,
      "family": hash_family(raw["prompt"]),
    }
    label = int(raw["response_label"].endswith("0"))
    yield {
      "id": f"{raw['id']}/own",
      **common,
      "label": label,
      "spec": specs[policy],
    }
    if label or policy not in APART:
      continue
    other = random.Random(f"{seed}:{raw['id']}").choice(
      sorted(APART - {policy})
    )
    yield {
      "id": f"{raw['id']}/other",
      **common,
      "label": 1,
      "spec": specs[other],
    }
    yield {
      "id": f"{raw['id']}/duo",
      **common,
      "chosen_spec": specs[other],
      "rejected_spec": specs[policy],
    }


def policy_text(text: str) -> str:
  """The policy without its answer format."""
  text = text.replace("\r\n", "\n").split("\n## Label Format", 1)[0]
  text = re.sub(r"^Output: .*\n?", "", text, flags=re.MULTILINE)
  return re.sub(r"\n{3,}", "\n\n", text).strip()
