"""Best of N on held-out prompts: proxy and gold over N, nothing trained."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import expit, log_expit

from csrm_jax import storage
from csrm_jax.align import best_of_n, evaluation
from csrm_jax.align import setup as setups
from csrm_jax.align.rollout import Rollouts
from csrm_jax.align.setup import Setup
from csrm_jax.config import Config
from csrm_jax.eval import overoptimisation, plots
from csrm_jax.eval.overoptimisation import Point
from csrm_jax.eval.plots import subplots
from csrm_jax.types import Params

REPORT = "best_of_n.json"
PICTURE = "best_of_n.png"
Judged = dict[str, np.ndarray]  # "", "monitor_": [g s k]; "reward": [g s]


def check(config: Config) -> None:
  """Raises ValueError without a judge that has no part in the choice."""
  if not config.align.monitor:
    raise ValueError(
      "--config.align.monitor is empty: method 'best_of_n' sets the judge that"
      " selects against one that does not; name its folder"
    )


def run(setup: Setup, trained: Params) -> dict[str, Any]:
  """Samples, selects, and writes best_of_n.json, .png and responses.jsonl.

  `align.samples` responses to each held-out prompt serve every N up to that
  number, without bias (`best_of_n.estimate`). The judge selects, by R H where
  there is a reward model, else by R. Proxy and gold are the probabilities that
  a response complies with all constraints, by the judge and by the monitor.

  Returns:
    What best_of_n.json holds.
  """
  align = setup.config.align
  asked = setup.heldout[: align.evaluate_prompts]
  if not asked:
    raise ValueError(
      f"--config.align.evaluate_prompts={align.evaluate_prompts}: method"
      " 'best_of_n' has no held-out prompt; raise it or align.heldout"
    )
  key = jax.random.key(setup.config.seed + 2)
  sampled = setups.respond(
    setup, trained, asked, samples=align.samples, key=key
  )
  judged = _judge(setup, sampled, groups=len(asked))
  selection = log_expit(judged[""].astype(np.float64)).sum(-1)
  if "reward" in judged:
    selection = selection + log_expit(judged["reward"].astype(np.float64))
  proxy, gold = (
    expit(judged[name].astype(np.float64)).prod(-1) for name in ("", "monitor_")
  )
  sizes = sorted(
    {n for n in best_of_n.SIZES if n < align.samples} | {align.samples}
  )
  points = best_of_n.curve(
    proxy, gold, sizes=sizes, selection=selection, seed=setup.config.seed
  )
  report = {
    "prompts": len(asked),
    "samples": align.samples,
    "selected_by": "R H" if "reward" in judged else "R",
    "gold_falls": overoptimisation.falls(points),
    "best_by_gold": overoptimisation.best(points).name,
    "points": [
      point._asdict() | {"size": n} | _means(setup, judged, selection, n)
      for n, point in zip(sizes, points, strict=True)
    ],
  }
  _write_responses(setup, sampled, judged, best_of_n.choose(selection))
  with storage.writing_beside(setup.workdir / PICTURE) as picture:
    draw(points, str(picture))
  storage.write_json(setup.workdir / REPORT, report)
  return report


def _judge(setup: Setup, sampled: Rollouts, *, groups: int) -> Judged:
  """What both judges and the reward model say, by prompt and sample."""
  n, k = len(sampled.messages), len(setup.bound)
  every = np.ones((n, k), bool)
  assert setup.monitor is not None  # `check` sees to it
  said: Judged = {
    "": np.asarray(setup.compliance(sampled.messages, every)),
    "monitor_": np.asarray(setup.monitor(sampled.messages, every)),
  }
  if setup.reward is not None:
    said["reward"] = np.asarray(setup.reward(sampled.messages))
  return {
    name: x.reshape(groups, n // groups, *x.shape[1:])
    for name, x in said.items()
  }


def _means(
  setup: Setup, judged: Judged, selection: np.ndarray, n: int
) -> dict[str, float]:
  """Violation rates and reward of the best of n, over all prompts."""
  found: dict[str, float] = {}

  def mean(values: np.ndarray) -> float:
    return float(np.mean(best_of_n.estimate(selection, values, n)))

  for prefix in ("", "monitor_"):
    for i, constraint in enumerate(setup.bound):
      violated = (judged[prefix][..., i] < 0).astype(np.float64)
      found[f"{prefix}violation/{constraint.name}"] = mean(violated)
  if "reward" in judged:
    found["reward"] = mean(judged["reward"].astype(np.float64))
  return found


def _write_responses(
  setup: Setup, sampled: Rollouts, judged: Judged, chosen: np.ndarray
) -> None:
  """responses.jsonl: every sample, the best of all marked as chosen."""
  names = [c.name for c in setup.bound]
  lines = []
  samples = setup.config.align.samples
  for at, messages in enumerate(sampled.messages):
    group, number = divmod(at, samples)
    line: dict[str, Any] = {
      "id": group,
      "sample": number,
      "chosen": bool(chosen[group] == number),
      "messages": list(messages),
    }
    for prefix in ("", "monitor_"):
      said = map(float, judged[prefix][group, number])
      line[f"{prefix}log_odds"] = dict(zip(names, said, strict=True))
    if "reward" in judged:
      line["reward"] = float(judged["reward"][group, number])
    lines.append(json.dumps(line) + "\n")
  storage.write_text(setup.workdir / evaluation.RESPONSES, "".join(lines))


def draw(points: Sequence[Point], path: str) -> None:
  """Proxy and gold over the square root of the KL, with 95 % intervals."""
  figure, axis = subplots(figsize=(6, 4.2))
  at = np.sqrt([p.kl for p in points])
  for name, color in (("proxy", plots.ORANGE), ("gold", plots.BLUE)):
    values = np.array([getattr(p, name) for p in points])
    low, high = np.array([getattr(p, f"{name}_interval") for p in points]).T
    error = np.maximum([values - low, high - values], 0.0)
    axis.errorbar(
      at, values, yerr=error, color=color, marker="o", capsize=2, label=name
    )
  names = [f"{x:.2f}\n{p.name}" for x, p in zip(at, points, strict=True)]
  axis.set_xticks(at, names)
  axis.set(
    xlabel="square root of the KL bound, nats^0.5",
    ylabel="probability of compliance",
    ylim=(0, 1),
  )
  axis.legend(fontsize=8, frameon=False)
  plots.save(figure, path)
