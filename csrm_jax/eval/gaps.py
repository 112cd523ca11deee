"""Seen against unseen: what a judge loses on rules that it never met."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from csrm_jax import metrics
from csrm_jax.eval.measured import measured
from csrm_jax.eval.suites import Suite

Answers = Mapping[tuple[str, str], Float[np.ndarray, " n"]]  # (suite, judge)


def unseen_gaps(
  suites: Mapping[str, Suite],
  answers: Answers,
  *,
  bootstrap: int = 500,
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """AUROC on a seen suite less AUROC on its unseen twin, for every judge.

  Twins are suites whose names differ in "seen" and "unseen" alone.

  Args:
    suites: by name.
    answers: log-odds for each row, by suite and judge.
    bootstrap: resamples of families.
    seed: of the resamples.

  Returns:
    By the common name and by judge: `gap`, `auroc_seen`, `auroc_unseen` and
    their intervals. Empty without twins.
  """
  found: dict[str, dict[str, Any]] = {}
  for name, unseen in suites.items():
    twin = name.replace("_unseen", "_seen")
    if twin == name or twin not in suites:
      continue
    for one, judge in answers:
      if one == name and (twin, judge) in answers:
        both = (
          (suites[twin], answers[twin, judge]),
          (unseen, answers[one, judge]),
        )
        by_judge = found.setdefault(name.replace("_unseen", ""), {})
        by_judge[judge] = _gap(both, bootstrap=bootstrap, seed=seed)
  return found


def _gap(sides: Any, **how: int) -> dict[str, Any]:
  z, gold, weight, side, families = [], [], [], [], []
  for number, (suite, odds) in enumerate(sides):
    for row, value in zip(suite.rows, odds, strict=True):
      if "label" in row:
        z.append(value)
        gold.append(float(row["label"]))
        weight.append(row["weight"])
        side.append(number)
        families.append(row["family"])
  scores, labels = np.array(z), np.array(gold)
  seen = np.array(side) == 0
  base = np.array(weight)

  def values(w: np.ndarray) -> dict[str, Any]:
    one, two = (
      metrics.auroc(scores, labels, w * base * m) for m in (seen, ~seen)
    )
    return {"gap": one - two, "auroc_seen": one, "auroc_unseen": two}

  return measured(values, families, **how)
