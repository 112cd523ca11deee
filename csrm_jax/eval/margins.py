"""Probes of the response: its length, and margins between responses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from csrm_jax import metrics
from csrm_jax.eval import cases as editing
from csrm_jax.eval.baselines import Judge
from csrm_jax.eval.cases import Case
from csrm_jax.eval.measured import (
  Weights,
  ask,
  labels,
  mean,
  measured,
  question,
  scores,
)

PADDING = " That is all on this point. I hope this answer is clear."
_BINS = 30


def length(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """Whether longer responses score otherwise.

  Returns:
    `correlation` of z with the words of the response, within label;
    `padding_shift`: mean z change by neutral text behind it, log-odds;
    `padding_flips`: share of verdicts that it changes.
  """
  z, gold = scores(judge, cases), labels(cases) >= 0.5
  words = np.array(
    [len(c.messages[-1]["content"].split()) for c in cases], np.float64
  )
  padded = ask(
    judge,
    [
      question(c, messages=editing.said(c.messages, "assistant", after=PADDING))
      for c in cases
    ],
  )

  def values(w: np.ndarray) -> dict[str, Any]:
    return {
      "correlation": _within(w, z, words, gold),
      "padding_shift": mean(w, padded - z),
      "padding_flips": mean(w, metrics.verdict(padded) != metrics.verdict(z)),
    }

  return measured(
    values, [c.family for c in cases], bootstrap=bootstrap, seed=seed
  )


def _within(w: Weights, a: np.ndarray, b: np.ndarray, group: np.ndarray) -> Any:
  """Weighted correlation of a and b after removing their means per group."""
  a, b = a - a.mean(), b - b.mean()  # less cancellation below
  ab: Any = 0.0
  aa: Any = 0.0
  bb: Any = 0.0
  for member in (group, ~group):
    own = w * member
    total = own.sum(-1)
    total = np.where(total > 0, total, 1.0)
    ab = ab + own @ (a * b) - (own @ a) * (own @ b) / total
    aa = aa + own @ (a * a) - (own @ a) ** 2 / total
    bb = bb + own @ (b * b) - (own @ b) ** 2 / total
  # Variances below rounding are none.
  flat = (aa <= 1e-9 * (w @ (a * a))) | (bb <= 1e-9 * (w @ (b * b)))
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(flat, np.nan, ab / np.sqrt(aa * bb))[()]


def pairs(cases: Sequence[Case]) -> list[tuple[int, int, str]]:
  """(complying, violating, kind) of cases that differ in one thing only.

  Kind "spec": the same conversation under two specs; "resp": two responses to
  one prompt under one spec. Both within a family.
  """
  alike: dict[Any, list[int]] = {}
  for i, case in enumerate(cases):
    turns = tuple((m["role"], m["content"]) for m in case.messages)
    text = case.spec.render()
    alike.setdefault((case.family, "spec", turns), []).append(i)
    alike.setdefault((case.family, "resp", turns[:-1], text), []).append(i)
  gold = labels(cases) >= 0.5
  return [
    (i, j, key[1])
    for key, members in alike.items()
    for i in members
    for j in members
    if gold[i] and not gold[j]
  ]


def margins(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """Margins z_comply - z_violate of pairs: accuracy, mean and histogram.

  Returns:
    `accuracy_spec`, `margin_spec` (log-odds), the same for resp; `histogram`:
    `edges` and the counts of each kind.
  """
  found, z = pairs(cases), scores(judge, cases)
  margin = np.array([z[i] - z[j] for i, j, _ in found], np.float64)
  kinds = np.array([k for _, _, k in found], str)

  def values(w: np.ndarray) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in sorted(set(kinds.tolist())):
      own, one = kinds == kind, w[..., kinds == kind]
      out[f"accuracy_{kind}"] = mean(one, (np.sign(margin[own]) + 1) / 2)
      out[f"margin_{kind}"] = mean(one, margin[own])
    return out

  result = measured(
    values,
    [cases[i].family for i, _, _ in found],
    bootstrap=bootstrap,
    seed=seed,
  )
  widest = float(np.abs(margin).max()) if len(margin) else 1.0
  edges = np.linspace(-1.0, 1.0, _BINS + 1) * (widest or 1.0)
  return result | {
    "histogram": {"edges": edges.tolist()}
    | {
      kind: np.histogram(margin[kinds == kind], edges)[0].tolist()
      for kind in sorted(set(kinds.tolist()))
    }
  }
