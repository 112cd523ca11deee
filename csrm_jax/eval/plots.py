"""The three pictures: reliability.png, flips.png, training.png."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import expit

from csrm_jax import metrics

BLUE, ORANGE, GREY = "#1f5fa8", "#d9772b", "#8a8f98"
_BINS = 15


class Scored(NamedTuple):
  """The labelled rows of a suite under one judge.

  Attributes:
    log_odds: calibrated.
    label: gold probability of compliance.
    base: number of the base row, -1 where there is none.
    edit: name of the edit, "" where there is none.
    temperature: that `log_odds` were divided by.
  """

  log_odds: Float[np.ndarray, " n"]
  label: Float[np.ndarray, " n"]
  base: np.ndarray
  edit: Sequence[str]
  temperature: float = 1.0


def subplots(
  rows: int = 1,
  columns: int = 1,
  *,
  figsize: tuple[int | float, int | float],
  **grid: Any,
) -> tuple[Figure, Any]:
  """As `pyplot.subplots`, without pyplot: its state and backend stay a user's.

  Args:
    rows: of axes.
    columns: of axes.
    figsize: width and height, inches.
    **grid: further keywords of `Figure.subplots`.
  """
  figure = Figure(figsize=figsize)
  return figure, figure.subplots(rows, columns, **grid)


def reliability(scored: Mapping[str, Scored], path: str | Path) -> None:
  """A reliability diagram per suite: bins with Wilson intervals, a curve.

  The grey curve is before calibration, the histogram shows where rows lie.
  """
  figure, axes = subplots(
    2,
    len(scored),
    figsize=(4.2 * len(scored), 5.0),
    height_ratios=(4, 1),
    sharex=True,
    squeeze=False,
  )
  for column, (name, s) in enumerate(scored.items()):
    top, bottom = axes[:, column]
    p = expit(s.log_odds)
    index = metrics.bin_index(p, bins=_BINS)
    count = np.bincount(index, minlength=_BINS)
    gold = np.bincount(index, weights=s.label, minlength=_BINS)
    used = count > 0
    mean = np.bincount(index, weights=p, minlength=_BINS)[used] / count[used]
    rate = gold[used] / count[used]
    low, high = metrics.wilson(gold[used], count[used])
    top.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":")
    if s.temperature != 1.0:
      raw = expit(s.log_odds * s.temperature)
      _curve(top, raw, s.label, color=GREY, label="before calibration")
    _curve(top, p, s.label, color=ORANGE, label="smoothed")
    top.errorbar(
      mean,
      rate,
      yerr=np.maximum([rate - low, high - rate], 0.0),
      fmt="o",
      ms=4,
      color=BLUE,
      ecolor=BLUE,
      elinewidth=1,
      label=f"{_BINS} bins, 95 % Wilson",
    )
    top.set_title(
      f"{_short(name)}\nsmECE {metrics.smece(p, s.label):.3f}, "
      f"ECE {metrics.ece(p, s.label):.3f}, {len(p)} rows",
      fontsize=10,
    )
    top.set(xlim=(0, 1), ylim=(0, 1))
    bottom.hist(p, bins=_BINS, range=(0, 1), color=BLUE, alpha=0.6)
    bottom.set_xlabel("predicted probability of compliance")
  axes[0, 0].set_ylabel("share complying")
  axes[1, 0].set_ylabel("rows")
  axes[0, 0].legend(fontsize=8, loc="upper left", frameon=False)
  save(figure, path)


def _curve(axis: Axes, p, gold, *, color: str, **how: Any) -> None:
  """Smoothed frequency at the bandwidth of smECE, where there are rows."""
  sigma = max(float(metrics.smece(p, gold)), 0.02)
  at = np.linspace(0.005, 0.995, 199)
  frequency, density = metrics.reliability_curve(p, gold, at=at, sigma=sigma)
  frequency[density < 0.1 * density.max() ** 0.5 / len(p) ** 0.5] = np.nan
  axis.plot(at, frequency, color=color, lw=1.6, **how)


def flips(
  suites: Mapping[str, Mapping[str, Any]],
  scored: Mapping[str, Scored],
  path: str | Path,
) -> None:
  """Do verdicts follow the spec? By judge, and by edit for the model.

  Args:
    suites: the report's `suites` that have flip_recall or spurious_flips.
    scored: the model's own scores for them.
    path: of the PNG.
  """
  figure, axes = subplots(
    len(suites), 2, figsize=(11, 3.2 * len(suites)), squeeze=False
  )
  for (left, right), (name, suite) in zip(axes, suites.items(), strict=True):
    judges = list(suite["judges"])
    for offset, metric, color in (
      (-0.2, "flip_recall", BLUE),
      (0.2, "spurious_flips", ORANGE),
    ):
      values, low, high = np.array(
        [_with_interval(suite["judges"][j], metric) for j in judges]
      ).T
      left.bar(
        np.arange(len(judges)) + offset,
        values,
        0.38,
        color=color,
        yerr=np.maximum([values - low, high - values], 0.0),
        ecolor="black",
        capsize=2,
        label=metric,
      )
    left.set_xticks(range(len(judges)), judges, fontsize=8)
    left.set(ylim=(0, 1), title=_short(name))
    if name in scored:
      _by_edit(right, scored[name])
  axes[0, 0].legend(fontsize=8, frameon=False)
  save(figure, path)


def _with_interval(judge: Mapping[str, Any], metric: str) -> list[float]:
  value = judge.get(metric, float("nan"))
  return [value, *judge["intervals"].get(metric, [value, value])]


def _by_edit(axis: Axes, s: Scored) -> None:
  """Per edit: gold flips followed, or (orange) verdicts that should stay."""
  gold, said = metrics.complies(s.label), metrics.verdict(s.log_odds)
  edited = np.flatnonzero(s.base >= 0)
  origin = s.base[edited]
  names = np.array([s.edit[int(i)] or "edit" for i in edited])
  flip = gold[edited] != gold[origin]
  right = (said == gold)[edited] & (said == gold)[origin]
  moved = said[edited] != said[origin]
  bars = []
  for name in sorted(set(names.tolist())):
    for flips, hit, color in ((True, right, BLUE), (False, moved, ORANGE)):
      chosen = (names == name) & (flip == flips)
      if chosen.any():
        bars.append((name, int(hit[chosen].sum()), int(chosen.sum()), color))
  for at, (_, hits, count, color) in enumerate(bars):
    low, high = metrics.wilson(hits, count)
    rate = hits / count
    error = np.maximum([[rate - low], [high - rate]], 0.0)
    axis.barh(at, rate, color=color, xerr=error, ecolor="black", capsize=2)
  labels = [f"{name} (n = {count})" for name, _, count, _ in bars]
  axis.set_yticks(range(len(bars)), labels, fontsize=8)
  axis.set(xlim=(0, 1), title="csrm, by edit")
  axis.invert_yaxis()


def training(workdir: str | Path, path: str | Path) -> bool:
  """Loss terms and speed of a run over its steps.

  Returns:
    False, and no picture, where the folder has no metrics.jsonl with lines.
  """
  log = Path(workdir) / "metrics.jsonl"
  if not log.is_file():
    return False
  lines = [json.loads(x) for x in log.read_text().splitlines() if x.strip()]
  if not lines:
    return False
  names = [
    key
    for key in sorted({k for line in lines for k in line})
    if key == "loss" or key.startswith("loss_")
  ]
  figure, (top, bottom) = subplots(
    2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1)
  )
  steps = np.array([line["step"] for line in lines])
  for name in names:
    values = np.array([line.get(name, np.nan) for line in lines], np.float64)
    values[values == 0] = np.nan  # a step without such rows logs 0
    if not np.any(np.isfinite(values)):
      continue
    (curve,) = top.plot(steps, values, lw=0.5, alpha=0.3)
    top.plot(steps, _smooth(values), color=curve.get_color(), label=name)
  speed = [line.get("tokens_per_second", np.nan) for line in lines]
  top.set_ylabel("nats (thick: moving average)")
  top.legend(fontsize=8, frameon=False)
  bottom.plot(steps, speed, color=GREY, lw=0.8)
  bottom.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
  save(figure, path)
  return True


def _smooth(values: np.ndarray) -> np.ndarray:
  """Mean over a twentieth of the run, centred, NaN left out."""
  width = max(1, len(values) // 20)
  kernel = np.ones(width)
  known = np.isfinite(values)
  total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
  count = np.convolve(known.astype(np.float64), kernel, mode="same")
  return total / np.where(count > 0, count, np.nan)


def _short(name: str) -> str:
  return Path(name).name


def save(figure: Any, path: str | Path) -> None:
  for axis in figure.axes:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=130)
