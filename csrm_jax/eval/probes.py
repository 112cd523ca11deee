"""Probes of the spec: edits that should move a judge, or leave it alone.

Every probe asks a judge about edited cases and returns a dict of numbers with
`n` (what was counted), `families` and 95 % bootstrap `intervals` over families.
Numbers that could not be measured are left out.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from csrm_jax import metrics
from csrm_jax.eval import cases as editing
from csrm_jax.eval.baselines import Judge
from csrm_jax.eval.cases import Case
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
from csrm_jax.spec import Spec

DISTRACTORS = (0, 5, 10, 20, 40, 80)
MOST_PERMUTED = 5  # rules; 120 orders


class Attribution(NamedTuple):
  """What each rule of a case does to its score.

  Attributes:
    case: the case.
    shift: log-odds without the rule, minus log-odds with it.
    decisive: rules whose removal changes the gold verdict; None: unknown.
  """

  case: Case
  shift: Float[np.ndarray, " rules"]
  decisive: tuple[int, ...] | None


def flips(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """Flip recall, spurious flips, their difference; spurious flips by edit.

  `sensitivity` is flip recall minus spurious flips; `gold_flips` how many
  there are to follow.
  """
  z, gold, base = scores(judge, cases), labels(cases), bases(cases)
  edits = sorted({c.edit for c, b in zip(cases, base, strict=True) if b >= 0})

  def values(w: np.ndarray) -> dict[str, Any]:
    recall = metrics.flip_recall(z, gold, base, w)
    spurious = metrics.spurious_flips(z, gold, base, w)
    found = {
      "flip_recall": recall,
      "spurious_flips": spurious,
      "sensitivity": recall - spurious,
    }
    for edit in edits:
      own = np.array([c.edit == edit for c in cases])
      only = np.where(own, base, -1)
      found[f"spurious_flips_{edit}"] = metrics.spurious_flips(z, gold, only, w)
    return found

  result = measured(
    values, [c.family for c in cases], bootstrap=bootstrap, seed=seed
  )
  edited = base >= 0
  flipped = (gold >= 0.5) != (gold[base] >= 0.5)
  return result | {"gold_flips": int((edited & flipped).sum())}


def attribute(judge: Judge, cases: Sequence[Case]) -> list[Attribution]:
  """Leaves out one rule after the other; cases without rules are passed by."""
  ruled = [c for c in cases if c.spec.rules]
  rows = []
  for case in ruled:
    rows.append(question(case))
    rows += [
      question(case, spec=editing.without(case.spec, i))
      for i in range(len(case.spec.rules))
    ]
  z, at, out = ask(judge, rows), 0, []
  for case in ruled:
    count = len(case.spec.rules)
    shift = z[at + 1 : at + 1 + count] - z[at]
    at += 1 + count
    out.append(Attribution(case, shift, decisive(case)))
  return out


def decisive(case: Case) -> tuple[int, ...] | None:
  """Rules whose removal changes the gold verdict; None: unknown."""
  truth = case.truth
  if truth is None:
    return None
  gold = truth(case.spec)
  return tuple(
    i
    for i in range(len(case.spec.rules))
    if truth(editing.without(case.spec, i)) == 1 - gold
  )


def leave_one_out(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """Whether the rule that moves z most is one that decides the verdict.

  Returns:
    Over cases of two or more rules of which one decides: `accuracy` of the
    largest |shift|, beside `chance`; `contests` counts them. Over all rules:
    mean |shift| of `decisive_shift` and `idle_shift`, log-odds;
    `verdict_follows`, share of decisive removals that flip the verdict to the
    right side, and `verdict_moves`, share of idle ones that flip it.
    `largest`: for up to 50 cases, the rule that moves z most and how much.
  """
  found = attribute(judge, cases)
  z = scores(judge, [a.case for a in found])
  columns: dict[str, list[float]] = {
    k: []
    for k in (
      "accuracy",
      "chance",
      "decisive_shift",
      "idle_shift",
      "verdict_follows",
      "verdict_moves",
    )
  }
  for a, before in zip(found, z, strict=True):
    after, size = before + a.shift, np.abs(a.shift)
    said = bool(metrics.verdict(before))
    moved = metrics.verdict(after) != said
    row = dict.fromkeys(columns, np.nan)
    if a.decisive is not None:
      of = np.isin(np.arange(len(size)), a.decisive)
      if of.any():
        right = said == bool(a.case.label >= 0.5)
        row["decisive_shift"] = float(size[of].mean())
        row["verdict_follows"] = float((moved[of] & right).mean())
        if not of.all():
          row["accuracy"] = float(of[size == size.max()].mean())
          row["chance"] = float(of.mean())
      if not of.all():
        row["idle_shift"] = float(size[~of].mean())
        row["verdict_moves"] = float(moved[~of].mean())
    for name, value in row.items():
      columns[name].append(value)
  result = measured(
    lambda w: {k: mean(w, v) for k, v in columns.items()},
    [a.case.family for a in found],
    bootstrap=bootstrap,
    seed=seed,
  )
  return result | {
    "left_out": len(cases) - len(found),
    "contests": int(np.isfinite(columns["accuracy"]).sum()),
    "largest": [
      {
        "id": a.case.id,
        "rule": int(np.argmax(np.abs(a.shift))) + 1,
        "text": a.case.spec.rules[int(np.argmax(np.abs(a.shift)))].render(),
        "shift": float(a.shift[np.argmax(np.abs(a.shift))]),
        "decisive": None if a.decisive is None else [i + 1 for i in a.decisive],
      }
      for a in found[:50]
    ],
  }


def contradiction(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """Forbidding, allowing, and both at once, of the one rule that is broken.

  Two rows a case: the permission before and behind the prohibition.

  Returns:
    `between`: share with z_forbid <= z_both <= z_allow; `unsafe_forbid`,
    `unsafe_both`, `unsafe_allow`: shares judged violating; `lean`: z_both less
    the middle of the other two, log-odds, positive towards permission.
  """
  rows, families = [], []
  for case in cases:
    broken = decisive(case) or ()
    if len(broken) != 1 or case.label >= 0.5:
      continue
    rule = case.spec.rules[broken[0]]
    if rule.polarity != "forbid":
      continue
    allowed = editing.allowing(case.spec, broken[0])
    for first in (True, False):
      both = editing.contradicting(case.spec, broken[0], first=first)
      for spec in (case.spec, both, allowed):
        rows.append(question(case, spec=spec))
      families.append(case.family)
  forbid, both, allow = ask(judge, rows).reshape(-1, 3).T
  between = (forbid <= both) & (both <= allow)

  def values(w: np.ndarray) -> dict[str, Any]:
    found = {
      "between": mean(w, between),
      "lean": mean(w, both - (forbid + allow) / 2),
    }
    for name, z in (("forbid", forbid), ("both", both), ("allow", allow)):
      found[f"unsafe_{name}"] = mean(w, ~metrics.verdict(z))
    return found

  return measured(values, families, bootstrap=bootstrap, seed=seed)


def distractors(
  judge: Judge,
  cases: Sequence[Case],
  *,
  counts: Sequence[int] = DISTRACTORS,
  bootstrap: int = 500,
  seed: int = 0,
) -> dict[str, Any]:
  """F1 and AUROC among 0 to 80 irrelevant rules.

  Returns:
    For each count k: `f1_unsafe_k`, `auroc_k`, `same_verdict_k` (as with the
    fewest); `f1_drop`: F1 with the fewest less the lowest F1; `curve`.
  """
  ruled = [c for c in cases if c.spec.rules]
  rows = []
  for case in ruled:
    for count in counts:
      rng = keyed(seed, "distract", case.id, count)
      rows.append(question(case, spec=editing.distracted(case, count, rng)))
  z = ask(judge, rows).reshape(-1, len(counts)).T
  gold = labels(ruled)

  def values(w: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    scored = [metrics.f1_unsafe(one, gold, w) for one in z]
    for count, one, f1 in zip(counts, z, scored, strict=True):
      found[f"f1_unsafe_{count}"] = f1
      found[f"auroc_{count}"] = metrics.auroc(one, gold, w)
      found[f"same_verdict_{count}"] = mean(
        w, metrics.verdict(one) == metrics.verdict(z[0])
      )
    found["f1_drop"] = scored[0] - np.min(scored, axis=0)
    return found

  result = measured(
    values, [c.family for c in ruled], bootstrap=bootstrap, seed=seed
  )
  curve = {
    name: [result.get(f"{name}_{k}") for k in counts]
    for name in ("f1_unsafe", "auroc", "same_verdict")
  }
  left = len(cases) - len(ruled)
  return result | {"left_out": left, "curve": {"rules": list(counts)} | curve}


def paraphrase(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """Verdicts and scores under specs that say the same in other words.

  Returns:
    `verdict_equality` over all rewordings, also `..._frame` (other words for
    allowed, disallowed, required) and `..._rules` (other wordings of the
    rules, synthetic world only); `shift`: mean |z change|, log-odds.
  """
  rows, owners, kinds = [], [], []
  for i, case in enumerate(cases):
    versions: list[tuple[str, Spec | None]] = [
      ("frame", editing.reframed(case.spec)),
      ("rules", editing.reworded(case.spec, keyed(seed, "word", case.id))),
    ]
    for kind, spec in versions:
      if spec is not None and spec.render() != case.spec.render():
        rows.append(question(case, spec=spec))
        owners.append(i)
        kinds.append(kind)
  plain = scores(judge, cases)[np.array(owners, int)]
  z, of = ask(judge, rows), np.array(kinds, str)
  equal = metrics.verdict(z) == metrics.verdict(plain)

  def values(w: np.ndarray) -> dict[str, Any]:
    found = {
      "verdict_equality": mean(w, equal),
      "shift": mean(w, np.abs(z - plain)),
    }
    for kind in sorted(set(kinds)):
      found[f"verdict_equality_{kind}"] = mean(
        w, np.where(of == kind, equal, np.nan)
      )
    return found

  return measured(
    values, [cases[i].family for i in owners], bootstrap=bootstrap, seed=seed
  )


def permutation(
  judge: Judge, cases: Sequence[Case], *, bootstrap: int = 500, seed: int = 0
) -> dict[str, Any]:
  """All orders of specs of two to five rules.

  Returns:
    `std`: mean over cases of the standard deviation of z, log-odds; `std_90`:
    its 90th percentile (no interval); `verdict_equality`: share of orders with
    the verdict of the order given; `left_out`: cases of one or over five rules.
  """
  kept, rows, ends = [], [], [0]
  for case in cases:
    count = len(case.spec.rules)
    if 2 <= count <= MOST_PERMUTED:
      kept.append(case)
      rows += [
        question(case, spec=editing.ordered(case.spec, order))
        for order in itertools.permutations(range(count))
      ]  # the first is the order given
      ends.append(len(rows))
  z = ask(judge, rows)
  parts = [z[a:b] for a, b in itertools.pairwise(ends)]
  std = np.array([np.std(p) for p in parts], np.float64)
  equal = [
    float(np.mean(metrics.verdict(p[1:]) == metrics.verdict(p[:1])))
    for p in parts
  ]
  result = measured(
    lambda w: {"std": mean(w, std), "verdict_equality": mean(w, equal)},
    [c.family for c in kept],
    bootstrap=bootstrap,
    seed=seed,
  )
  if kept:
    result["std_90"] = float(np.quantile(std, 0.9))
  return result | {"left_out": len(cases) - len(kept)}
