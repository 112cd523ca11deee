"""Sensitivity: what moves a judge's log-odds, as one report and three pictures.

`report` gathers the probes of `probes.py` and `margins.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from csrm_jax.eval import cases as editing
from csrm_jax.eval import margins, plots, probes
from csrm_jax.eval.baselines import Judge
from csrm_jax.eval.cases import Case
from csrm_jax.eval.measured import remember
from csrm_jax.eval.plots import subplots

# Shares in the summary picture: (probe, number, whether 1 is good).
_SHARES = (
  ("flips", "flip_recall", True),
  ("flips", "spurious_flips", False),
  ("leave_one_out", "accuracy", True),
  ("leave_one_out", "verdict_moves", False),
  ("contradiction", "between", True),
  ("paraphrase", "verdict_equality", True),
  ("permutation", "verdict_equality", True),
  ("distractors", "same_verdict_80", True),
  ("length", "padding_flips", False),
  ("margins", "accuracy_spec", True),
  ("margins", "accuracy_resp", True),
)


def report(
  judge: Judge,
  cases: Sequence[Case],
  *,
  limit: int = 0,
  bootstrap: int = 500,
  seed: int = 0,
) -> dict[str, Any]:
  """Every probe of this module.

  Args:
    judge: from rows to log-odds; asked once for each distinct row.
    cases: of `cases.synthetic` or `cases.from_rows`.
    limit: cases, as `cases.some` draws them, for the probes that ask more than
      four rows a case (leave-one-out, permutations, distractors); 0: all.
    bootstrap: resamples.
    seed: of edits and resamples.

  Returns:
    A JSON-able dict: one key a probe, and "cases", "families", "rows_asked".

  Raises:
    ValueError: no cases, or a judge that answers NaN.
  """
  if not cases:
    raise ValueError("sensitivity: no cases; give a suite that holds some")
  asked = 0

  def counting(rows: Sequence[Any]) -> Float[np.ndarray, " n"]:
    nonlocal asked
    asked += len(rows)
    return judge(rows)

  told = remember(counting)
  few = editing.some(cases, limit)
  how: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
  return {
    "cases": len(cases),
    "families": len({c.family for c in cases}),
    "flips": probes.flips(told, cases, **how),
    "leave_one_out": probes.leave_one_out(told, few, **how),
    "contradiction": probes.contradiction(told, few, **how),
    "distractors": probes.distractors(told, few, **how),
    "paraphrase": probes.paraphrase(told, cases, **how),
    "permutation": probes.permutation(told, few, **how),
    "length": margins.length(told, cases, **how),
    "margins": margins.margins(told, cases, **how),
    "rows_asked": asked,
  }


# ----------------------------------------------------------------- pictures


def draw(found: Mapping[str, Any], folder: str | Path) -> list[Path]:
  """Writes sensitivity.png, distractors.png and margins.png; says which."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  written = []
  for name, picture in (
    ("sensitivity.png", summary),
    ("distractors.png", distractors),
    ("margins.png", histogram),
  ):
    if picture(found, folder / name):
      written.append(folder / name)
  return written


def summary(found: Mapping[str, Any], path: str | Path) -> bool:
  """Every share with its interval; blue should be 1, orange 0.

  Returns:
    False, and no picture, where nothing was measured.
  """
  bars = [
    (
      f"{probe}: {name}, {found[probe]['families']} families",
      found[probe],
      name,
      good,
    )
    for probe, name, good in _SHARES
    if name in found.get(probe, {})
  ]
  if not bars:
    return False
  figure, axis = subplots(figsize=(8, 0.8 + 0.34 * len(bars)))
  for at, (_, values, name, good) in enumerate(bars):
    value = values[name]
    low, high = values["intervals"].get(name, (value, value))
    axis.barh(
      at,
      value,
      color=plots.BLUE if good else plots.ORANGE,
      xerr=np.maximum([[value - low], [high - value]], 0.0),
      ecolor="black",
      capsize=2,
    )
  axis.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=8)
  axis.set(xlim=(0, 1), title="blue should be 1, orange 0")
  axis.invert_yaxis()
  plots.save(figure, path)
  return True


def distractors(found: Mapping[str, Any], path: str | Path) -> bool:
  """F1 and AUROC over the number of irrelevant rules, with intervals.

  Returns:
    False, and no picture, where no count of rules was measured.
  """
  probe = found.get("distractors", {})
  counts = probe.get("curve", {}).get("rules", [])
  if not any(f"f1_unsafe_{k}" in probe for k in counts):
    return False
  figure, axis = subplots(figsize=(6, 4))
  for name, color in (("f1_unsafe", plots.BLUE), ("auroc", plots.ORANGE)):
    known = [k for k in counts if f"{name}_{k}" in probe]
    values = np.array([probe[f"{name}_{k}"] for k in known], np.float64)
    bounds = np.array(
      [
        probe["intervals"].get(f"{name}_{k}", [v, v])
        for k, v in zip(known, values, strict=True)
      ],
      np.float64,
    ).reshape(-1, 2)
    axis.plot(known, values, "o-", ms=4, color=color, label=name)
    axis.fill_between(
      known, bounds[:, 0], bounds[:, 1], color=color, alpha=0.15, lw=0
    )
  axis.axhline(0.5, color=plots.GREY, lw=1, ls=":")
  axis.set(
    ylim=(0, 1),
    xlabel="irrelevant rules in the spec",
    title=f"distractors, {probe['n']} cases, 95 % bootstrap",
  )
  axis.legend(fontsize=8, frameon=False)
  plots.save(figure, path)
  return True


def histogram(found: Mapping[str, Any], path: str | Path) -> bool:
  """Margins of pairs by kind; right of 0 is the right order.

  Returns:
    False, and no picture, where there are no pairs.
  """
  probe = found.get("margins", {})
  counts = dict(probe.get("histogram", {}))
  edges = np.array(counts.pop("edges", []), np.float64)
  if not counts:
    return False
  figure, axes = subplots(
    1, len(counts), figsize=(4.5 * len(counts), 3.6), squeeze=False
  )
  for axis, (kind, heights) in zip(axes[0], counts.items(), strict=True):
    middle = (edges[:-1] + edges[1:]) / 2
    color = np.where(middle > 0, plots.BLUE, plots.ORANGE).tolist()
    axis.bar(middle, heights, np.diff(edges), color=color)
    axis.axvline(0.0, color=plots.GREY, lw=1, ls=":")
    axis.set(
      xlabel="log-odds, complying minus violating",
      ylabel="pairs",
      title=f"{kind} pairs: {probe[f'accuracy_{kind}']:.1%} in order",
    )
  plots.save(figure, path)
  return True
