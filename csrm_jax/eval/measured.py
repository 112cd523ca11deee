"""Questions to a judge, and what is counted over its answers."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from csrm_jax import metrics
from csrm_jax.eval.baselines import Judge, Row
from csrm_jax.eval.cases import Case, Messages
from csrm_jax.spec import Spec

Weights = Float[np.ndarray, "*r n"]


def keyed(seed: int, *names: object) -> random.Random:
  """The randomness of one edit of one case."""
  return random.Random("/".join(map(str, (seed, *names))))


def question(
  case: Case, *, spec: Spec | None = None, messages: Messages | None = None
) -> dict[str, Any]:
  """What a judge sees of a case: no label, family or edit."""
  return {
    "id": case.id,
    "messages": [dict(m) for m in (messages or case.messages)],
    "spec": (spec or case.spec).render(),
  }


def ask(judge: Judge, rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
  """Log-odds of a judge that must answer every row.

  Raises:
    ValueError: an answer that is no number, by the id of its row.
  """
  if not rows:
    return np.zeros(0)
  odds = np.asarray(judge(rows), np.float64)
  for row, z in zip(rows, odds, strict=True):
    if np.isnan(z):
      raise ValueError(
        f"row {row['id']!r}: the judge answers NaN under a spec; use a judge"
        " that reads specs"
      )
  return odds


def key_of(row: Row) -> str:
  """What a judge's answer depends on: the conversation and the spec text."""
  return json.dumps([[dict(m) for m in row["messages"]], row.get("spec")])


def remember(judge: Judge) -> Judge:
  """The same judge, asked once for each (conversation, spec text)."""
  known: dict[str, float] = {}

  def remembering(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    keys = [key_of(r) for r in rows]
    new = {k: r for k, r in zip(keys, rows, strict=True) if k not in known}
    if new:
      known.update(zip(new, map(float, judge(list(new.values()))), strict=True))
    return np.array([known[k] for k in keys], np.float64)

  return remembering


def measured(
  values: Callable[[np.ndarray], Mapping[str, Any]],
  families: Sequence[str],
  *,
  bootstrap: int = 500,
  seed: int = 0,
) -> dict[str, Any]:
  """Finite values at weight 1, with `n`, `families` and `intervals`."""
  if not families:
    return {"n": 0, "families": 0, "intervals": {}}
  found = values(np.ones(len(families)))
  spread = metrics.intervals(
    lambda weight: dict(values(weight)),
    families,
    resamples=bootstrap,
    seed=seed,
  )
  kept = {k: float(v) for k, v in found.items() if np.isfinite(v)}
  return kept | {
    "n": len(families),
    "families": len(set(families)),
    "intervals": {k: list(v) for k, v in spread.items() if k in kept},
  }


def mean(weight: Weights, values: Any) -> Any:
  """Weighted mean of the finite values; NaN if there are none."""
  values = np.asarray(values, np.float64)
  known = np.isfinite(values)
  total = weight @ known.astype(np.float64)
  with np.errstate(invalid="ignore", divide="ignore"):
    return weight @ np.where(known, values, 0.0) / total


def labels(cases: Sequence[Case]) -> Float[np.ndarray, " n"]:
  """Gold probability of compliance."""
  return np.array([c.label for c in cases], np.float64)


def bases(cases: Sequence[Case]) -> Int[np.ndarray, " n"]:
  """Index of each case's base among the cases; -1 where it is none of them."""
  place = {c.id: i for i, c in enumerate(cases)}
  return np.array([place.get(c.base, -1) for c in cases], int)


def scores(judge: Judge, cases: Sequence[Case]) -> Float[np.ndarray, " n"]:
  """Log-odds of the cases as they stand."""
  return ask(judge, [question(c) for c in cases])
