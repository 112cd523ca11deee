"""Pictures of fitted weights: the weights, and rewards by class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from csrm_jax.eval.plots import BLUE, GREY, ORANGE, save, subplots
from csrm_jax.rules import propositions
from csrm_jax.rules.completions import Completion, truths
from csrm_jax.rules.weights import RuleWeights, chances_of, helpfulness_of


def weights(made: RuleWeights, path: str | Path) -> None:
  """A bar for each feature of each response type, as a PNG."""
  kinds = list(made.weights)
  figure, axes = subplots(
    1,
    len(kinds),
    figsize=(4.0 * len(kinds), 0.2 * len(made.book.names) + 2.0),
    squeeze=False,
  )
  for axis, kind in zip(axes[0], kinds, strict=True):
    names = propositions.feature_names(made.book, kind)[::-1]
    values = made.weights[kind][::-1]
    colors = [ORANGE if name.startswith("class:") else BLUE for name in names]
    axis.barh(range(len(names)), values, color=colors)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.axvline(0.0, color=GREY, lw=1)
    axis.set_title(kind)
    axis.set_xlabel("weight, units of reward")
  save(figure, path)


def rewards(
  made: RuleWeights, rows: Sequence[Completion], path: str | Path
) -> None:
  """Rewards of each class, by helpfulness alone and with the rules, as a PNG.

  Types without weights or rows are left out.
  """
  kinds = [
    kind
    for kind in made.weights
    if any(row.response_type == kind for row in rows)
  ]
  figure, axes = subplots(
    2, len(kinds), figsize=(4.0 * len(kinds), 5.6), squeeze=False
  )
  for column, kind in enumerate(kinds):
    of_kind = [row for row in rows if row.response_type == kind]
    classes = propositions.classify(made.book, kind, truths(of_kind))
    helpful = helpfulness_of(of_kind)
    total = helpful + made.rewards(kind, chances_of(of_kind))
    names = made.book.class_names(kind)
    for axis, values, title in (
      (axes[0, column], helpful, f"{kind}: helpfulness"),
      (axes[1, column], total, f"{kind}: with the rules"),
    ):
      _boxes(axis, values, classes, names)
      axis.set_title(title)
  save(figure, path)


def _boxes(
  axis: Axes,
  values: Float[np.ndarray, " n"],
  classes: np.ndarray,
  names: Sequence[str],
) -> None:
  """A box for each class that occurs, best first."""
  used = [i for i in range(len(names)) if (classes == i).any()]
  axis.boxplot(
    [values[classes == i] for i in used],
    tick_labels=[f"{names[i]}\n{int((classes == i).sum())}" for i in used],
    medianprops={"color": ORANGE},
    boxprops={"color": BLUE},
    flierprops={"markersize": 2, "markeredgecolor": GREY},
  )
  axis.tick_params(axis="x", labelsize=7)
  axis.set_ylabel("reward")
