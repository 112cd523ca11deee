"""Failure modes of a judge: every check with its pass mark, and their table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax import metrics
from csrm_jax.eval import cases as editing
from csrm_jax.eval import checks_response, checks_spec
from csrm_jax.eval.baselines import Judge
from csrm_jax.eval.cases import Case
from csrm_jax.eval.checks_spec import Result, result
from csrm_jax.eval.measured import labels, measured, remember, scores


def unseen_gap(
  judge: Judge, seen: Sequence[Case], unseen: Sequence[Case], **how: Any
) -> Result:
  """AUROC on rules met in training less AUROC on rules never met: no mark."""
  both = [*seen, *unseen]
  z, gold = scores(judge, both), labels(both)
  of = np.arange(len(both)) < len(seen)

  def values(w: np.ndarray) -> dict[str, Any]:
    one, two = (metrics.auroc(z, gold, w * m) for m in (of, ~of))
    return {"gap": one - two, "auroc_seen": one, "auroc_unseen": two}

  found = measured(values, [c.family for c in both], **how)
  return result(found, "gap", "")


CHECKS: Mapping[str, Callable[..., Result]] = {
  "spec_ignored": checks_spec.spec_ignored,
  "spec_leaks": checks_spec.spec_leaks,
  "odd_rules": checks_spec.odd_rules,
  "rule_order": checks_spec.rule_order,
  "wording": checks_spec.wording,
  "long_spec": checks_spec.long_spec,
  "retrieval": checks_spec.retrieval,
  "permissive_bias": checks_spec.permissive_bias,
  "length_correlation": checks_response.length_correlation,
  "length_padding": checks_response.length_padding,
  "refusal_rules": checks_response.refusal_rules,
  "refusal_reward": checks_response.refusal_reward,
  "sycophancy": checks_response.sycophancy,
  "injection": checks_response.injection,
  "style": checks_response.style,
  "overconfidence": checks_response.overconfidence,
  "saturation": checks_response.saturation,
}
# They ask more than five rows a case.
_COSTLY = ("rule_order", "long_spec", "injection")


def check(
  judge: Judge,
  cases: Sequence[Case],
  *,
  unseen: Sequence[Case] = (),
  names: Sequence[str] = tuple(CHECKS),
  limit: int = 0,
  bootstrap: int = 500,
  seed: int = 0,
) -> dict[str, Result]:
  """Every check; a JSON-able dict by name.

  Args:
    judge: from rows to log-odds; asked once for each distinct row.
    cases: of `cases.synthetic` or `cases.from_rows`.
    unseen: cases of rules that training never met, for `unseen_gap`.
    names: of `CHECKS`.
    limit: cases, as `cases.some` draws them, for the costly checks; 0: all.
    bootstrap: resamples of families.
    seed: of edits and resamples.

  Raises:
    ValueError: no cases, or an unknown name.
  """
  for name in names:
    if name not in CHECKS:
      raise ValueError(f"check {name!r}: use {', '.join(CHECKS)}")
  if not cases:
    raise ValueError("failures: no cases; give a suite that holds some")
  told, few = remember(judge), editing.some(cases, limit)
  how: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
  found = {
    name: CHECKS[name](told, few if name in _COSTLY else cases, **how)
    for name in names
  }
  if unseen:
    found["unseen_gap"] = unseen_gap(told, cases, unseen, **how)
  return found


def table(results: Mapping[str, Result]) -> str:
  """The checks as lines of text: name, verdict, value, mark, interval, n."""
  lines = [
    f"{'check':<20}{'passed':>8}{'value':>9}  {'mark':<12}{'95 %':>18}{'n':>7}"
  ]
  for name, r in results.items():
    passed = {True: "yes", False: "NO", None: "-"}[r["passed"]]
    value = "-" if r["value"] is None else f"{r['value']:.3f}"
    low_high = r["interval"]
    spread = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "-"
    lines.append(
      f"{name:<20}{passed:>8}{value:>9}  {r['pass_mark'] or '-':<12}"
      f"{spread:>18}{r['n']:>7}"
    )
  marked = [r for r in results.values() if r["passed"] is not None]
  passed = sum(bool(r["passed"]) for r in marked)
  lines.append(
    f"{passed} of {len(marked)} passed,"
    f" {len(results) - len(marked)} without a verdict"
  )
  return "\n".join(lines)
