"""What an evaluation leaves: report, rows, pictures, a page, a table."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from csrm_jax import metrics
from csrm_jax.data import contract
from csrm_jax.eval import (
  comparison,
  failures,
  html,
  plots,
  recipes,
  sensitivity,
)
from csrm_jax.eval.suites import Suite
from csrm_jax.storage import AnyPath

METRICS = (
  "auroc",
  "auprc",
  "f1_unsafe",
  "f1_safe",
  "ece",
  "smece",
  "brier",
  "nll",
  "preference_accuracy",
  "flip_recall",
  "spurious_flips",
)
ROWS_FILE = "rows.jsonl"  # beside the report: a line per row and judge


def lines_of(
  suite: Suite, judge: str, log_odds: np.ndarray
) -> list[dict[str, Any]]:
  """rows.jsonl: one line per row and judge."""
  lines = []
  for row, z in zip(suite.rows, log_odds, strict=True):
    line: dict[str, Any] = {
      "suite": suite.name,
      "judge": judge,
      "id": row["id"],
    }
    if "spec" not in row or not np.isfinite(z):
      key = "log_odds" if "spec" in row else "helpfulness"
      line[key] = float(z) if np.isfinite(z) else None
    else:
      line |= {
        "log_odds": float(z),
        "p_comply": float(expit(z)),
        "verdict": "comply" if metrics.verdict(z) else "violate",
      }
    keys = ("label", "weight", "family", "base", "edit", "source")
    lines.append(line | {k: row[k] for k in keys if k in row})
  return lines


def check(output: AnyPath) -> None:
  """Refuses a folder in which `rows.jsonl` is somebody's data.

  Raises:
    ValueError: that file holds a line that no evaluation wrote.
  """
  path = output.parent / ROWS_FILE
  if not path.is_file():
    return
  with path.open("rb") as found:
    first = found.readline().decode("utf-8", "replace")
  if first.strip() and not ('"suite"' in first and '"judge"' in first):
    raise ValueError(
      f"--output={output}: {path} would be overwritten by the scores of each "
      "row, and no evaluation wrote it; give --output a folder of its own, "
      "such as evaluation/report.json"
    )


def write_aside(
  output: Path, aside: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
  """Bad rows with their suite, line and reason; an empty file if none."""
  output.parent.mkdir(parents=True, exist_ok=True)
  with contract.aside_of(output).open("w", encoding="utf-8") as out:
    for suite, entries in aside.items():
      for entry in entries:
        out.write(json.dumps({"suite": suite, **entry}) + "\n")


def write(
  output: Path,
  report: dict[str, Any],
  lines: Sequence[dict[str, Any]],
  scored: Mapping[str, plots.Scored],
  folder: Path | None,
) -> None:
  """The report last: where it stands, the rest stands too."""
  output.parent.mkdir(parents=True, exist_ok=True)
  pictures: dict[str, Path] = {}
  beside = output.parent
  with (beside / ROWS_FILE).open("w", encoding="utf-8") as out:
    for line in lines:
      out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
  labelled = {k: s for k, s in scored.items() if len(s.label)}
  if labelled:
    pictures["calibration"] = beside / "reliability.png"
    plots.reliability(labelled, pictures["calibration"])
  flipping = {
    name: suite
    for name, suite in report["suites"].items()
    if any(
      m in judge
      for judge in suite["judges"].values()
      for m in ("flip_recall", "spurious_flips")
    )
  }
  if flipping:
    pictures["edits of specs"] = beside / "flips.png"
    plots.flips(flipping, scored, pictures["edits of specs"])
  for name, found in report.get("sensitivity", {}).items():
    if "csrm" in found:  # a suite may be the path of a file
      drawn = sensitivity.draw(found["csrm"], beside / Path(name).stem)
      pictures |= {f"{name}: {p.stem}": p for p in drawn}
  if "sensitivity" in report:
    text = comparison.markdown(report)
    (beside / "probes.md").write_text(text, encoding="utf-8")
  if folder is not None:
    workdir = recipes.workdir_of(folder) or folder
    plots.training(workdir, beside / "training.png")
  html.write(
    output.with_suffix(".html"),
    report,
    sensitivity=_by_suite_and_judge(report.get("sensitivity", {})),
    failures=_by_suite_and_judge(report.get("failures", {})),
    pictures=pictures,
  )
  partial = output.with_name(output.name + ".partial")
  text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
  partial.write_text(text + "\n", encoding="utf-8")
  os.replace(partial, output)


def _by_suite_and_judge(found: Mapping[str, Mapping[str, Any]]) -> dict:
  return {f"{s}, {j}": r for s, by in found.items() for j, r in by.items()}


def table(report: Mapping[str, Any]) -> str:
  """The report as lines of text, a block a suite, a line a judge."""
  out = []
  for name, suite in report["suites"].items():
    head = f"{name}: {suite['rows']} judged, {suite['pairs']} pairs"
    if "base_rate" in suite:
      rate = suite["base_rate"]
      # F1, of its own class, of the judge that always names the larger one.
      larger = max(rate, 1.0 - rate)
      head += (
        f", {rate:.1%} comply, majority F1 {2 * larger / (1 + larger):.3f}"
      )
    out.append(head)
    shown = [
      m
      for m in METRICS
      if any(m in judge for judge in suite["judges"].values())
    ]
    out.append(" " * 15 + "".join(f"{_heading(m):>12}" for m in shown))
    for judge, values in suite["judges"].items():
      cells = [f"{values[m]:.3f}" if m in values else "-" for m in shown]
      out.append(f"{judge:<15}" + "".join(f"{c:>12}" for c in cells))
    out.append("")
  found = _by_suite_and_judge(report.get("failures", {}))
  for whom, checks in found.items():
    out += [f"failure checks: {whom}", failures.table(checks), ""]
  out += [f"note: {note}" for note in report.get("notes", [])]
  out.append(
    f"{report['seconds']:.0f} s, peak memory "
    f"{report['peak_memory_gib']:.2f} GiB"
  )
  return "\n".join(out)


def _heading(metric: str) -> str:
  short = {"preference_accuracy": "pref_acc", "spurious_flips": "spurious"}
  return short.get(metric, metric)
