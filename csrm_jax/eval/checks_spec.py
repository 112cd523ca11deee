"""Failure checks of the spec: is it read, whatever its order, words, length?

Each check takes a judge and cases and returns a `Result` of plain values. Pass
marks are this project's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from csrm_jax import metrics
from csrm_jax.eval import cases as editing
from csrm_jax.eval import probes
from csrm_jax.eval.baselines import Judge
from csrm_jax.eval.cases import Case
from csrm_jax.eval.judges import spec_shuffled
from csrm_jax.eval.measured import (
  ask,
  bases,
  keyed,
  labels,
  mean,
  measured,
  question,
  scores,
)
from csrm_jax.eval.protocols import gold_ranks
from csrm_jax.spec import Spec


class Result(TypedDict):
  """One check.

  `value` is None where nothing could be measured, `passed` also where there
  is no mark; `n` counts what the value is a mean of.
  """

  value: float | None
  pass_mark: str
  passed: bool | None
  n: int
  interval: list[float] | None
  also: dict[str, float]


def result(found: Mapping[str, Any], name: str, mark: str) -> Result:
  """The number `name` of a probe against a mark like "abs <= 0.2"."""
  value = found.get(name)
  passed = None
  if value is not None and mark:
    *absolute, sign, bound = mark.split()
    size = abs(value) if absolute else value
    limit = float(bound)
    passed = {
      "<=": size <= limit,
      "<": size < limit,
      ">=": size >= limit,
      ">": size > limit,
    }[sign]
  skipped = {name, "n", "families"}
  also = {
    k: float(v)
    for k, v in found.items()
    if isinstance(v, int | float) and k not in skipped
  }
  return {
    "value": value,
    "pass_mark": mark,
    "passed": passed,
    "n": found["n"],
    "interval": found["intervals"].get(name),
    "also": also,
  }


def spec_ignored(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Flip recall; beside it that of the judge reading other rows' specs."""
  found = probes.flips(judge, cases, **how)
  blind = probes.flips(_shuffled(judge, cases, how), cases, bootstrap=0)
  if "flip_recall" in blind:
    found["flip_recall_shuffled"] = blind["flip_recall"]
  return result(found, "flip_recall", ">= 0.8")


def _shuffled(
  judge: Judge, cases: Sequence[Case], how: Mapping[str, Any]
) -> Judge:
  if len({c.spec.render() for c in cases}) < 2:
    return judge  # one spec: there is no other
  return spec_shuffled(judge, seed=how.get("seed", 0))


def spec_leaks(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """AUROC on the rows of gold flips under shuffled, empty, inverted specs.

  What a judge still knows there it did not learn from the spec.
  """
  gold, base = labels(cases), bases(cases)
  flip = {
    i
    for at, b in enumerate(base)
    if b >= 0 and (gold[at] >= 0.5) != (gold[b] >= 0.5)
    for i in (at, int(b))
  }
  kept = [cases[i] for i in sorted(flip)]
  own = labels(kept)
  ruled = np.array([bool(c.spec.rules) for c in kept], bool)
  swapped = scores(_shuffled(judge, kept, how), kept)
  empty = ask(judge, [question(c, spec=Spec()) for c in kept])
  turned = ask(
    judge, [question(c, spec=editing.inverted(c.spec)) for c in kept]
  )

  def values(w: np.ndarray) -> dict[str, Any]:
    return {
      "auroc_shuffled": metrics.auroc(swapped, own, w),
      "auroc_empty": metrics.auroc(empty, own, w),
      "auroc_inverted": metrics.auroc(turned, own, w * ruled),
    }

  found = measured(values, [c.family for c in kept], **how)
  return result(found, "auroc_shuffled", "< 0.6")


def odd_rules(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Verdicts that move when a rule is added that the response keeps (O9)."""
  known = [c for c in cases if c.truth is not None]
  specs = [
    editing.distracted(
      c, 1, keyed(how.get("seed", 0), "odd", c.id), polarity="forbid"
    )
    for c in known
  ]
  before = scores(judge, known)
  after = ask(
    judge, [question(c, spec=s) for c, s in zip(known, specs, strict=True)]
  )
  moved = metrics.verdict(before) != metrics.verdict(after)
  found = measured(
    lambda w: {"moved": mean(w, moved), "shift": mean(w, after - before)},
    [c.family for c in known],
    **how,
  )
  return result(found, "moved", "<= 0.05")


def rule_order(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Standard deviation of z over the orders of the rules, log-odds (O7)."""
  return result(probes.permutation(judge, cases, **how), "std", "<= 0.3")


def wording(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Equal verdicts under paraphrased specs (O8)."""
  found = probes.paraphrase(judge, cases, **how)
  return result(found, "verdict_equality", ">= 0.95")


def long_spec(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Loss of F1 among up to 80 irrelevant rules (O13)."""
  return result(probes.distractors(judge, cases, **how), "f1_drop", "<= 0.05")


def retrieval(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Share of deciding rules that BM25 puts among the first 10 of 80 and more.

  It judges what a judge is shown when the spec is cut, not the judge.
  """
  del judge
  rows, families = [], []
  for case in cases:
    if gold := probes.decisive(case):
      rng = keyed(how.get("seed", 0), "retrieve", case.id)
      spec = editing.distracted(case, 80, rng)
      ids = [r.id for r in spec.rules]
      places = [ids.index(case.spec.rules[i].id) for i in gold]
      rows.append((spec, case.messages, places))
      families.append(case.family)
  rank = gold_ranks(rows)
  found = measured(
    lambda w: {
      "recall_10": mean(w, rank <= 10),
      "recall_20": mean(w, rank <= 20),
    },
    families,
    **how,
  )
  return result(found, "recall_10", ">= 0.9")


def permissive_bias(judge: Judge, cases: Sequence[Case], **how: Any) -> Result:
  """Contradictory rules score between prohibition and permission (O11)."""
  return result(probes.contradiction(judge, cases, **how), "between", ">= 0.9")
