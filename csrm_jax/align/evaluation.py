"""Held-out prompts under the policy of the day: rates, rewards, responses."""

import json
from typing import Any

import jax
import numpy as np

from csrm_jax import metrics, storage
from csrm_jax.align import setup as setups
from csrm_jax.align.setup import Setup
from csrm_jax.storage import AnyPath
from csrm_jax.types import Params

EVALUATIONS = "evaluations.jsonl"
RESPONSES = "responses.jsonl"


def rate(name: str, count: int, total: int) -> dict[str, float]:
  """A share with its 95 % Wilson interval, under three names; {} of none."""
  if not total:
    return {}
  low, high = metrics.wilson(count, total)
  return {
    name: count / total,
    f"{name}_low": float(low),
    f"{name}_high": float(high),
  }


def evaluate(setup: Setup, trained: Params, *, step: int) -> dict[str, Any]:
  """Answers held-out prompts and appends what judges say to the workdir.

  Every constraint is judged on every response, by the judge that costs come
  from and by the monitor, if there is one. The same prompts, and the same
  randomness, at every step. Without a reward model there is no reward. With
  rules, the line has shares of the best class by response type as well, and
  of refusals where they are wanted and where not.

  Returns:
    The line of evaluations.jsonl.
  """
  align = setup.config.align
  asked = setup.heldout[: align.evaluate_prompts]
  key = jax.random.key(setup.config.seed + 2)
  sampled = setups.respond(setup, trained, asked, samples=1, key=key)
  n, k = len(sampled.messages), len(setup.bound)
  every = np.ones((n, k), bool)
  rewards = None
  if setup.reward is not None:
    rewards = np.asarray(setup.reward(sampled.messages), np.float32)
  judged = {"": setup.compliance(sampled.messages, every)}
  if setup.monitor is not None:
    judged["monitor_"] = setup.monitor(sampled.messages, every)
  line: dict[str, Any] = {
    "step": step,
    "responses": n,
    "length": float(np.mean(np.sum(sampled.mask, axis=1))),
    "stopped": float(np.mean(sampled.stopped)),
  }
  if rewards is not None:
    line["reward"] = float(np.mean(rewards))
    line["reward_deviation"] = float(np.std(rewards))
  for prefix, log_odds in judged.items():
    for i, constraint in enumerate(setup.bound):
      count = int(np.sum(log_odds[:, i] < 0))
      line |= rate(f"{prefix}violation/{constraint.name}", count, n)
  names = [c.name for c in setup.bound]
  of_rules: list[dict[str, Any]] = [{}] * n
  if setup.rules is not None:
    graded = setup.rules.graded(sampled.messages)
    of_rules = [
      {"response_type": kind, "class": name, "rule_reward": float(r)}
      for kind, name, r in zip(
        graded.types, graded.classes, graded.rewards, strict=True
      )
    ]
    line["rule_reward"] = float(np.mean(graded.rewards))
    for name, (count, of) in setup.rules.shares(
      sampled.messages, graded
    ).items():
      line |= rate(name, count, of)
  rows = [
    {
      "step": step,
      "id": i,
      "messages": list(messages),
      **({} if rewards is None else {"reward": float(rewards[i])}),
      **of_rules[i],
      **{
        f"{prefix}log_odds": dict(
          zip(names, map(float, log_odds[i]), strict=True)
        )
        for prefix, log_odds in judged.items()
      },
    }
    for i, messages in enumerate(sampled.messages)
  ]
  _append(setup.workdir / RESPONSES, rows)
  _append(setup.workdir / EVALUATIONS, [line])
  return line


def responses(workdir: AnyPath) -> dict[int, list[dict[str, Any]]]:
  """Lines of responses.jsonl by the step of their evaluation, in its order.

  Raises:
    ValueError: the run left no responses.
  """
  path = workdir / RESPONSES
  if not path.is_file():
    raise ValueError(
      f"{path}: missing; give a workdir of launch/align.py with"
      " align.evaluate_every above 0"
    )
  found: dict[int, list[dict[str, Any]]] = {}
  for line in map(json.loads, path.read_text().splitlines()):
    found.setdefault(line["step"], []).append(line)
  return found


def trim(workdir: AnyPath, step: int) -> None:
  """Drops what was written after the checkpoint that a run goes on from."""
  for name in (EVALUATIONS, RESPONSES):
    path = workdir / name
    if path.is_file():
      lines = [json.loads(text) for text in path.read_text().splitlines()]
      kept = [line for line in lines if line["step"] <= step]
      storage.write_text(
        path, "".join(json.dumps(line) + "\n" for line in kept)
      )


def _append(path: AnyPath, lines: list[dict[str, Any]]) -> None:
  before = path.read_text() if path.is_file() else ""
  text = "".join(json.dumps(line) + "\n" for line in lines)
  storage.write_text(path, before + text)
