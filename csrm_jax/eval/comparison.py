"""Judges side by side, in Markdown: what moves them, and where they fail."""

from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.eval.checks_spec import Result

# (probe, number, what it is, what a right judge has)
_FIGURES = (
  ("flips", "flip_recall", "verdicts that follow a flip", "1"),
  ("flips", "spurious_flips", "verdicts that move without one", "0"),
  ("leave_one_out", "accuracy", "the deciding rule moves most", "1"),
  ("leave_one_out", "chance", "... by chance", ""),
  ("leave_one_out", "verdict_follows", "a deciding rule removed: flips", "1"),
  ("leave_one_out", "verdict_moves", "an idle rule removed: flips", "0"),
  ("contradiction", "unsafe_forbid", "forbidden: unsafe", "1"),
  ("contradiction", "unsafe_both", "forbidden and allowed: unsafe", ""),
  ("contradiction", "unsafe_allow", "allowed: unsafe", "0"),
  ("contradiction", "between", "both lies between", "1"),
  ("distractors", "f1_unsafe_0", "F1 unsafe, no idle rules added", "1"),
  ("distractors", "f1_unsafe_80", "F1 unsafe, 80 idle rules added", "1"),
  ("distractors", "same_verdict_80", "same verdict with 80 more", "1"),
  ("paraphrase", "verdict_equality", "same verdict in other words", "1"),
  ("permutation", "verdict_equality", "same verdict in any order", "1"),
  ("permutation", "std", "log-odds: deviation over orders", "0"),
  ("length", "correlation", "correlation with length", "0"),
  ("length", "padding_flips", "longer by nothing: flips", "0"),
  ("margins", "accuracy_spec", "pairs of specs in order", "1"),
  ("margins", "accuracy_resp", "pairs of responses in order", "1"),
)


def markdown(report: Mapping[str, Any]) -> str:
  """Two tables a suite: sensitivity and failure checks, a column a judge.

  Args:
    report: of `eval.run.evaluate` with probes.
  """
  out: list[str] = []
  for suite, by_judge in report.get("sensitivity", {}).items():
    counted = ", ".join(
      f"{name} {found['cases']} cases of {found['families']} families,"
      f" {found['rows_asked']} rows asked"
      for name, found in list(by_judge.items())[:1]
    )
    out += [f"## Sensitivity: `{suite}`", "", f"By judge; {counted}.", ""]
    out += [*_sensitivity(by_judge), ""]
  for suite, by_judge in report.get("failures", {}).items():
    out += [f"## Failure checks: `{suite}`", "", *_failures(by_judge), ""]
  return "\n".join(out)


def _sensitivity(by_judge: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Numbers with their 95 % intervals; those nobody has are left out."""
  body = []
  for probe, name, says, ideal in _FIGURES:
    cells = [_number(found[probe], name) for found in by_judge.values()]
    if any(cells):
      body.append([says, ideal, *(cell or "-" for cell in cells)])
  return _table(("", "right", *by_judge), body)


def _number(values: Mapping[str, Any], name: str) -> str:
  if name not in values:
    return ""
  text = f"{values[name]:.3f}"
  if name in values["intervals"]:
    low, high = values["intervals"][name]
    text += f" ({low:.3f} to {high:.3f})"
  return text


def _failures(by_judge: Mapping[str, Mapping[str, Result]]) -> list[str]:
  names = dict.fromkeys(n for checks in by_judge.values() for n in checks)
  body = []
  for name in names:
    results = [checks.get(name) for checks in by_judge.values()]
    mark = next((r["pass_mark"] for r in results if r), "")
    body.append([name, mark or "-", *map(_outcome, results)])
  passed = [
    f"{sum(r['passed'] is True for r in checks.values())} of"
    f" {sum(r['passed'] is not None for r in checks.values())}"
    for checks in by_judge.values()
  ]
  return _table(("check", "mark", *by_judge), [*body, ["passed", "", *passed]])


def _outcome(found: Result | None) -> str:
  if found is None or found["value"] is None:
    return "-"
  word = {True: "yes", False: "**no**", None: "-"}[found["passed"]]
  return f"{word} {found['value']:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [heads, ["---"] * len(heads), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]
