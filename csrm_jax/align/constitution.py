"""A spec as a constitution: its principles, and how a model is asked by them.

Source: Constitutional AI (arXiv:2212.08073), section 3. The principles there
are sentences of a constitution; here they are the rules of a spec. The
wording, demonstrations included, is ours.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from csrm_jax.align.feedback import Constraint
from csrm_jax.data.template import Message

DRAWS = ("uniform", "judged")
WORDINGS = ("demonstrated", "plain", "resampled")
_PART = re.compile(r"(Disallowed|Required): (.+?)\.(?= |$)")


class Demonstration(NamedTuple):
  """An answer that breaks a rule, what is wrong with it, a better one."""

  question: str
  answer: str
  rule: str
  critique: str
  revision: str


# Of topics that no spec in specs/align rules on.
DEMONSTRATIONS = (
  Demonstration(
    "When will my parcel be here?",
    "It will be at your door on Friday before noon, without fail.",
    "Disallowed: promising a delivery date.",
    "It promises a delivery date: Friday before noon.",
    "I cannot promise a day. The tracking page shows where your parcel is, and"
    " our staff can look into it for you.",
  ),
  Demonstration(
    "Which of the two candidates is better?",
    "Vote for Mrs Hall. Her rival has no plan at all.",
    "Disallowed: telling people whom to vote for.",
    "It tells the user to vote for Mrs Hall.",
    "That choice is yours. I can tell you what each of them says about schools,"
    " taxes and housing, so that you can compare.",
  ),
)


def principles(bound: Sequence[Constraint]) -> list[Constraint]:
  """The rules that an answer can break, each as a constraint of its own.

  Permissions are none: nothing is revised for the sake of what may be done.
  Of a plain text every line that says something is one.

  Args:
    bound: one spec, as `feedback.constraints` gives it.

  Raises:
    ValueError: several specs, or one that forbids and requires nothing.
  """
  if len(bound) != 1:
    names = ", ".join(c.name for c in bound)
    raise ValueError(
      f"--config.align.specs gives {len(bound)} constraints ({names}): method"
      " 'constitutional' revises under one whole spec; name one file, with"
      " align.per_rule=False"
    )
  whole = bound[0]
  if whole.spec.text:
    lines = enumerate(whole.spec.lines(), 1)
    named = [(i, f"S{i}") for i, line in lines if line.strip()]
  else:
    named = [
      (i, rule.id)
      for i, rule in enumerate(whole.spec.rules, 1)
      if rule.polarity != "allow"
    ]
  if not named:
    raise ValueError(
      f"--config.align.specs: {whole.name} only allows: no rule of it can be"
      " broken; name a spec that forbids or requires something"
    )
  return [
    Constraint(f"{whole.name}/{name}", whole.spec.keep([i - 1]), whole.limit)
    for i, name in named
  ]


def draw(
  log_odds: Float[np.ndarray, " k"], *, how: str, seed: int, name: str
) -> int:
  """The principle of the next revision.

  Args:
    log_odds: that the answer of the moment complies with each; read by
      "judged" alone, where one that is not finite is drawn only if all are so.
    how: of `DRAWS`; "judged" draws in proportion to the probability of a
      violation.
    seed: of the run.
    name: of prompt and revision: the draw is a function of it and the seed.
  """
  rng = random.Random(f"principle/{seed}/{name}")
  odds = np.asarray(log_odds, np.float64)
  if how == "uniform" or not np.isfinite(odds).any():
    return rng.randrange(len(odds))
  weights = np.where(np.isfinite(odds), expit(-odds) + 1e-9, 0.0)
  return rng.choices(range(len(odds)), weights=weights.tolist())[0]


def rule_text(principle: Constraint) -> str:
  """The rule as critic and reviser read it: without its number."""
  return principle.spec.render().removeprefix("S1: ")


def to_criticise(
  asked: Sequence[Message], answer: str, rule: str
) -> list[Message]:
  """The prompt of the critic: what in the answer breaks the rule?"""
  shown = [
    message
    for d in DEMONSTRATIONS
    for message in (
      _user(_question(d.question, d.answer, d.rule)),
      _assistant(d.critique),
    )
  ]
  return [*shown, _user(_question(_talk(asked), answer, rule))]


def to_revise(
  asked: Sequence[Message],
  answer: str,
  rule: str,
  critique: str,
  *,
  wording: str = "demonstrated",
) -> list[Message]:
  """The prompt of the reviser.

  Args:
    asked: the conversation before the answer.
    answer: to be revised.
    rule: that it should keep.
    critique: what is wrong with the answer.
    wording: of `WORDINGS`. "demonstrated": the answer anew, in view of rule and
      critique, behind demonstrations. "plain": the last message, and the rule
      as a request behind it; nothing of answer and critique, which small models
      copy. "resampled": the conversation as it was, which shows what accepting
      does by itself.
  """
  if wording == "resampled":
    return list(asked)
  if wording == "plain":
    text = f"{asked[-1]['content']} {_request(rule)}"
    return [*asked[:-1], {**asked[-1], "content": text}]
  shown = [
    message
    for d in DEMONSTRATIONS
    for message in (
      _user(_order(d.question, d.answer, d.rule, d.critique)),
      _assistant(d.revision),
    )
  ]
  return [*shown, _user(_order(_talk(asked), answer, rule, critique))]


def _request(rule: str) -> str:
  """A rule as one asks for it."""
  parts = dict(_PART.findall(rule))
  if list(parts) == ["Disallowed"]:
    return f"Please answer without {parts['Disallowed']}."
  if list(parts) == ["Required"]:
    return f"In your answer, {parts['Required']}."
  return f"Keep this rule in your answer: {rule}"


def _question(question: str, answer: str, rule: str) -> str:
  return (
    f"Rule: {rule}\nQuestion: {question}\nAnswer: {answer}\n"
    "What in the answer breaks the rule?"
  )


def _order(question: str, answer: str, rule: str, critique: str) -> str:
  return (
    f"Rule: {rule}\nQuestion: {question}\nBad answer: {answer}\n"
    f"What is wrong: {critique}\nWrite a good answer that keeps the rule."
  )


def _talk(asked: Sequence[Message]) -> str:
  """The conversation before the answer, in one text."""
  if len(asked) == 1:
    return asked[0]["content"]
  return "\n".join(f"{m['role']}: {m['content']}" for m in asked)


def _user(text: str) -> Message:
  return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
  return {"role": "assistant", "content": text}
