"""How good a grader is: accuracy, F1 and calibration of each proposition."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from csrm_jax import metrics

FEW = 20  # positives below which a proposition's F1 says little


def report(
  names: Sequence[str],
  chances: Float[np.ndarray, "n k"],
  truths: Bool[np.ndarray, "n k"],
) -> dict[str, Any]:
  """What a grader's probabilities are worth against human labels.

  Returns:
    `propositions`: for each `positives`, `accuracy`, `f1` (of "holds", at 1/2;
    0 if none is found), `auroc` (None without both labels), `smece`, `brier`;
    `macro_f1`, `macro_auroc`: means over propositions with `FEW` positives or
    more, `over` of them; `accuracy` of all decisions; `smece` of all pooled.
  """
  odds = np.where(chances >= 0.5, 1.0, -1.0)
  found: dict[str, Any] = {}
  for i, name in enumerate(names):
    gold = truths[:, i].astype(np.float64)
    area = float(metrics.auroc(chances[:, i], gold))
    found[name] = {
      "positives": int(gold.sum()),
      "accuracy": float(np.mean((odds[:, i] > 0) == truths[:, i])),
      "f1": float(metrics.f1(odds[:, i], gold, positive=1)),
      "auroc": None if np.isnan(area) else area,
      "smece": float(metrics.smece(chances[:, i], gold)),
      "brier": float(metrics.brier(chances[:, i], gold)),
    }
  many = [name for name in names if found[name]["positives"] >= FEW]

  def mean(metric: str) -> float | None:
    values = [found[name][metric] for name in many]
    return float(np.mean(values)) if values and None not in values else None

  flat = truths.astype(np.float64).ravel()
  return {
    "rows": len(truths),
    "over": len(many),
    "macro_f1": mean("f1"),
    "macro_auroc": mean("auroc"),
    "accuracy": float(np.mean((odds > 0) == truths)),
    "smece": float(metrics.smece(chances.ravel(), flat)),
    "propositions": found,
  }
