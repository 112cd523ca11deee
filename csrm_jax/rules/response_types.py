"""Which response a spec wants for a prompt: the type of its active rule.

A rule is a question about responses; here it is asked about a prompt, with a
response that goes along with it. Of all sides of all rules the one that fits
best is active, if it fits at all, and its type is the prompt's.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from csrm_jax.data.sets.shapes import pseudo
from csrm_jax.data.template import Message
from csrm_jax.judge import Judge
from csrm_jax.score_cached import SpecCache
from csrm_jax.spec import Rule, Spec

Prompt = Sequence[Message]
# The response type of each prompt.
Chooser = Callable[[Sequence[Prompt]], list[str]]
# Probability of a violation from which a side concerns a prompt: prompts are
# less clear than responses. See docs/decisions.md for what it was chosen on.
THRESHOLD = 0.25


class Side(NamedTuple):
  """What one rule is about, on one side of its line.

  Attributes:
    rule: forbids just that, so that a judge can tell what concerns it.
    response_type: that the spec wants of a prompt for it.
  """

  rule: Rule
  response_type: str


def sides(spec: Spec) -> list[Side]:
  """What a spec speaks of, and how it wants to be answered there.

  A rule's own `response_type` decides; else what is forbidden is to be refused
  ("hard"), what is allowed or required to be answered ("comply"). A rule with
  sub-categories on both sides of its level gives two.

  Raises:
    ValueError: a spec of plain text, which has no rules.
  """
  if spec.text:
    raise ValueError(
      f"spec {spec.spec_id!r} is plain text: which response it wants for a"
      " prompt cannot be told; write its rules as YAML"
    )
  found = []
  for rule in spec.rules:
    strict, allowed = rule.split()
    forbids = rule.polarity == "forbid"
    wanted = rule.response_type or ("hard" if forbids else "comply")
    if strict and allowed:
      kept = [(strict, wanted), (allowed, "comply")]
    else:
      kept = [(list(rule.subcategories), wanted)]
    for number, (subcategories, kind) in enumerate(kept):
      about = rule.turned("forbid").model_copy(
        update={
          "id": rule.id + ".allowed" * number,
          "subcategories": tuple(subcategories),
        }
      )
      found.append(Side(about, kind))
  return found


def chooser(
  judge: Judge,
  specs: Sequence[Spec],
  *,
  fallback: str = "comply",
  threshold: float = THRESHOLD,
) -> Chooser:
  """Types of prompts by a judge's view of each side; each asked about once.

  Args:
    judge: scores every side alone on the prompt with "Sure. " and the prompt
      again as its response (`shapes.pseudo`).
    specs: whose rules decide, taken together.
    fallback: of prompts that concern no rule.
    threshold: probability of a violation from which a side concerns a prompt.

  Raises:
    ValueError: as `sides`.
  """
  found = [side for spec in specs for side in sides(spec)]
  cache = SpecCache(judge, [Spec(rules=(side.rule,)) for side in found])
  known: dict[str, str] = {}

  def choose(prompts: Sequence[Prompt]) -> list[str]:
    keys = [json.dumps([[m["role"], m["content"]] for m in p]) for p in prompts]
    new = {
      key: prompt
      for key, prompt in zip(keys, prompts, strict=True)
      if key not in known
    }
    if new and not found:
      known.update(dict.fromkeys(new, fallback))
    elif new:
      asked = [
        [*prompt, pseudo(prompt[-1]["content"])[-1]] for prompt in new.values()
      ]
      fit = -cache.scores(asked).log_odds
      least = float(np.log(threshold) - np.log1p(-threshold))
      for key, row in zip(new, fit, strict=True):
        best = int(np.argmax(row))
        active = row[best] >= least
        known[key] = found[best].response_type if active else fallback
    return [known[key] for key in keys]

  return choose
