"""Alignment runs side by side: curves, the front of reward against violations.

Reads what `launch/align.py` leaves in its workdirs; no model is loaded.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from csrm_jax import storage
from csrm_jax.align.evaluation import EVALUATIONS, rate
from csrm_jax.eval.plots import BLUE, GREY, ORANGE, save, subplots

LAST = 20  # updates that "stays below its limit" is judged over
_METHODS = {
  "start": GREY,
  "ppo": BLUE,
  "plain": ORANGE,
  "shaping": "#3a8f5c",
}
_COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8e5ea2", "#b3261e", GREY)


def read(workdir: str | Path) -> dict[str, Any]:
  """One run: its configuration, updates and evaluations.

  Raises:
    ValueError: a file of the run is missing; says which.
  """
  folder = Path(workdir)
  found: dict[str, Any] = {}
  for name, file in (
    ("updates", "metrics.jsonl"),
    ("evaluations", EVALUATIONS),
  ):
    path = folder / file
    if not path.is_file():
      raise ValueError(
        f"{path}: missing; give a workdir of launch/align.py with"
        " align.evaluate_every above 0"
      )
    found[name] = [json.loads(line) for line in path.read_text().splitlines()]
  config = json.loads((folder / "config.json").read_text())
  return found | {"config": config, "constraints": _names(found["updates"])}


def _names(updates: Sequence[Mapping[str, Any]]) -> list[str]:
  prefix = "lam/"
  return [k[len(prefix) :] for k in updates[-1] if k.startswith(prefix)]


def summary(run: Mapping[str, Any]) -> dict[str, Any]:
  """The figures of one run.

  "last" pools the training responses of the last `LAST` updates, "settled" the
  held-out responses of all evaluations in them; "start" and "end" are the first
  and last evaluation.

  Returns:
    For each constraint: "limit", violation rates with 95 % Wilson intervals
    ("last", of the training responses; of the held-out ones "start", "end",
    "settled", and with "monitor_" before them if a monitor was asked), the last
    multiplier. And the reward at both ends, its fall in
    standard deviations of the start's responses, KL and length. "rules", of a
    run with rule-based rewards: shares at "start" and "end", see `shares`.
  """
  updates, evaluations = run["updates"], run["evaluations"]
  align = run["config"]["align"]
  names = run["constraints"]
  limits = [float(x) for x in align["limits"].split(",")]
  if len(limits) == 1:
    limits *= len(names)
  n = align["prompts_per_step"] * align["samples"]
  start, end = evaluations[0], evaluations[-1]
  constraints = {}
  for name, limit in zip(names, limits, strict=True):
    last = updates[-LAST:]
    # Each update judged n responses, or the share that it asked about.
    asked = n * min(1.0, (align["judged"] or len(names)) / len(names))
    shares = [u[f"violation/{name}"] for u in last if f"violation/{name}" in u]
    total = round(asked * len(shares))
    found: dict[str, Any] = {"limit": limit, "lam": updates[-1][f"lam/{name}"]}
    found |= rate("last", round(float(np.sum(shares)) * asked), total)
    for side, line in (("start", start), ("end", end)):
      for prefix in ("", "monitor_"):
        key = f"{prefix}violation/{name}"
        for suffix in ("", "_low", "_high"):
          if key + suffix in line:
            found[f"{prefix}{side}{suffix}"] = line[key + suffix]
    for prefix in ("", "monitor_"):
      found |= _settled(evaluations, f"{prefix}violation/{name}", prefix)
    constraints[name] = found
  deviation = start["reward_deviation"] or 1.0
  return {
    "method": align["method"],
    "updates": len(updates),
    "constraints": constraints,
    "reward_start": start["reward"],
    "reward_end": end["reward"],
    "reward_change_deviations": (end["reward"] - start["reward"]) / deviation,
    "kl": float(np.mean([u["kl"] for u in updates[-LAST:]])),
    "length_start": start["length"],
    "length_end": end["length"],
    "seconds": updates[-1]["seconds"],
    **_rules(start, end),
  }


def _settled(
  evaluations: Sequence[Mapping[str, Any]], key: str, prefix: str
) -> dict[str, float]:
  """The rate over all evaluations in the last `LAST` updates, but the first."""
  after = max(evaluations[0]["step"], evaluations[-1]["step"] - LAST)
  seen = [e for e in evaluations if e["step"] > after and key in e]
  count = round(sum(e[key] * e["responses"] for e in seen))
  total = sum(e["responses"] for e in seen)
  return rate(f"{prefix}settled", count, total)


def shares(evaluation: Mapping[str, Any]) -> list[str]:
  """Names of what an evaluation says of rules, see `RuleReward.shares`."""
  return [
    key
    for key in evaluation
    if not key.endswith(("_low", "_high"))
    and (key.startswith("ideal/") or key in ("over_refusal", "refused"))
  ]


def _rules(start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, Any]:
  found = {
    name: {
      side + suffix: line[name + suffix]
      for side, line in (("start", start), ("end", end))
      for suffix in ("", "_low", "_high")
    }
    for name in shares(end)
  }
  return {"rules": found} if found else {}


def rules(run: Mapping[str, Any], path: str | Path, *, title: str) -> None:
  """Best classes by response type and refusals, on held-out prompts, 95 %."""
  evaluations = run["evaluations"]
  figure, axes = subplots(1, 2, figsize=(9.0, 3.6), sharey=True)
  for i, name in enumerate(shares(evaluations[-1])):
    low, mid, high = (
      np.array([e[name + s] for e in evaluations])
      for s in ("_low", "", "_high")
    )
    axes[int(not name.startswith("ideal/"))].errorbar(
      [e["step"] for e in evaluations],
      mid,
      yerr=np.maximum([mid - low, high - mid], 0.0),
      color=_COLOURS[i % len(_COLOURS)],
      marker="o",
      ms=3,
      elinewidth=0.8,
      label=name,
    )
  axes[0].set(title="completions of the best class", ylim=(0, 1))
  axes[1].set_title("refusals: of what should be answered, and not")
  for ax in axes:
    ax.set_xlabel("update")
    ax.legend(fontsize=8)
  figure.suptitle(title)
  save(figure, path)


def curves(run: Mapping[str, Any], path: str | Path, *, title: str) -> None:
  """lambda, mean cost with its limit, violations and reward over updates."""
  updates, names = run["updates"], run["constraints"]
  evaluations = run["evaluations"]
  step = [u["step"] for u in updates]
  figure, axes = subplots(2, 2, figsize=(9.0, 6.0), sharex=True)
  limits = summary(run)["constraints"]
  for i, name in enumerate(names[: len(_COLOURS)]):
    colour = _COLOURS[i]
    axes[0, 0].plot(step, [u[f"lam/{name}"] for u in updates], color=colour)
    axes[0, 1].plot(
      step, [u[f"cost/{name}"] for u in updates], color=colour, label=name
    )
    axes[1, 0].axhline(limits[name]["limit"], color=colour, lw=0.8, ls=":")
    for prefix, style in (("", "-"), ("monitor_", "--")):
      key = f"{prefix}violation/{name}"
      seen = [e for e in evaluations if key in e]
      if seen:
        low, mid, high = (
          np.array([e[key + s] for e in seen]) for s in ("_low", "", "_high")
        )
        axes[1, 0].errorbar(
          [e["step"] for e in seen],
          mid,
          yerr=np.maximum([mid - low, high - mid], 0.0),
          color=colour,
          ls=style,
          marker="o",
          ms=3,
          elinewidth=0.8,
          label="second judge" if prefix else "judge",
        )
  axes[0, 0].set_title("multiplier")
  axes[0, 1].set_title("mean cost over the window")
  axes[0, 1].legend(fontsize=8)
  axes[1, 0].set_title("violation rate, held-out prompts, 95 %")
  axes[1, 0].set(ylim=(0, 1))
  axes[1, 0].legend(fontsize=8)
  axes[1, 1].plot(step, [u["reward"] for u in updates], color=GREY, lw=0.8)
  axes[1, 1].plot(
    [e["step"] for e in evaluations],
    [e["reward"] for e in evaluations],
    color=BLUE,
    marker="o",
    ms=3,
    label="held-out prompts",
  )
  axes[1, 1].set_title("reward")
  axes[1, 1].legend(fontsize=8)
  for ax in axes[1]:
    ax.set_xlabel("update")
  figure.suptitle(title)
  save(figure, path)


def front(runs: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
  """Reward against violations at the end of each run, with 95 % intervals.

  One panel for the runs under the same specs, grey where they start. The
  violation rate of several constraints is their mean. Runs of method "shaping"
  are joined in the order of their weight.
  """
  panels: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
  for name, run in runs.items():
    panels.setdefault(tuple(run["constraints"]), {})[name] = run
  width = 0.6 + 5.0 * len(panels)
  figure, axes = subplots(
    1, len(panels), figsize=(width, 4.5), squeeze=False, sharey=True
  )
  for ax, (constraints, some) in zip(axes[0], panels.items(), strict=True):
    _points(some, ax)
    ax.set(
      title=", ".join(constraints), xlabel="violation rate", xlim=(-0.02, None)
    )
    ax.legend(fontsize=8)
  axes[0, 0].set_ylabel("reward (helpfulness)")
  save(figure, path)


def _points(runs: Mapping[str, Mapping[str, Any]], ax: Axes) -> None:
  points: dict[str, list[tuple[float, ...]]] = {}
  for name, run in runs.items():
    align, names = run["config"]["align"], run["constraints"]
    for method, evaluation, label in (
      ("start", run["evaluations"][0], ""),
      (align["method"], run["evaluations"][-1], name),
    ):
      point = _point(evaluation, names)
      points.setdefault(method, []).append((align["shaping"], *point))
      ax.annotate(label, (point[0], point[1]), fontsize=8, xytext=(4, 4),
                  textcoords="offset points")  # fmt: skip
  for method, found in points.items():
    _, x, y, left, right, half = np.array(sorted(set(found))).T
    ax.errorbar(
      x,
      y,
      xerr=np.maximum([left, right], 0.0),
      yerr=half,
      marker="o",
      ls="-" if method == "shaping" else "",
      color=_METHODS.get(method, "#8e5ea2"),
      elinewidth=0.8,
      label=method,
    )


def _point(
  evaluation: Mapping[str, Any], names: Sequence[str]
) -> tuple[float, ...]:
  """Rate, reward; how far intervals reach below, above and around them."""
  low, mid, high = (
    float(np.mean([evaluation[f"violation/{c}{s}"] for c in names]))
    for s in ("_low", "", "_high")
  )
  reward = evaluation["reward"]
  half = 1.96 * evaluation["reward_deviation"] / evaluation["responses"] ** 0.5
  return mid, reward, mid - low, high - mid, half


def report(
  workdirs: Mapping[str, str | Path], output: str | Path
) -> dict[str, Any]:
  """Writes align.json, front.png and a picture of each run's curves.

  A run with rule-based rewards gets NAME_rules.png beside NAME.png.

  Args:
    workdirs: of the runs, by the name they get.
    output: folder.

  Returns:
    `summary` of each run, by name; what align.json holds.
  """
  folder = Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  runs = {name: read(path) for name, path in workdirs.items()}
  for name, run in runs.items():
    curves(run, folder / f"{name}.png", title=name)
    if shares(run["evaluations"][-1]):
      rules(run, folder / f"{name}_rules.png", title=name)
  front(runs, folder / "front.png")
  found = {name: summary(run) for name, run in runs.items()}
  storage.write_json(folder / "align.json", found)
  return found
