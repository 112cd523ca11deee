"""The table of ablations: spread over seeds, and Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADLINE = {
  "auroc": "AUROC",
  "flip_recall": "flip recall",
  "spurious_flips": "spurious flips",
  "smece": "smECE",
  "f1_unsafe": "F1 unsafe",
  "preference_accuracy": "pairs in order",
}
# By suite, then by metric: mean, min, max and how many seeds.
Spread = dict[str, dict[str, dict[str, float]]]


def spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
  """Mean and range over seeds of every headline metric, by row and suite."""
  found: dict[str, Spread] = {}
  for name in dict.fromkeys(row["row"] for row in rows):
    of_row = [row for row in rows if row["row"] == name]
    for suite in of_row[0]["suites"]:
      for metric in HEADLINE:
        values = [
          row["suites"][suite]["metrics"][metric]
          for row in of_row
          if metric in row["suites"].get(suite, {}).get("metrics", {})
        ]
        if values:
          found.setdefault(name, {}).setdefault(suite, {})[metric] = {
            "mean": sum(values) / len(values),
            "min": min(values),
            "max": max(values),
            "seeds": len(values),
          }
  return found


def markdown(result: Mapping[str, Any]) -> str:
  """What was trained, then a table a suite.

  Args:
    result: of `ablation.ablate`.
  """
  rows = result["rows"]
  if not rows:
    return "No row is finished yet.\n"
  names = list(dict.fromkeys(row["row"] for row in rows))
  seeds = len({row["seed"] for row in rows})
  of_seeds = "seed 0" if seeds == 1 else f"seeds 0 to {seeds - 1}"
  versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
  of = result["machine"]
  out = [
    f"`python {result['command']}`: {of_seeds}, {of['cores']} cores"
    f" ({of['cpu']}), {versions}.",
    "",
    *_table(
      ("row", "what differs", "steps", "tokens", "minutes"),
      [_trained(rows, name) for name in names],
    ),
  ]
  meaning = (
    "mean (lowest to highest) over seeds"
    if seeds > 1
    else "value (95 % bootstrap over conversation families)"
  )
  for suite in rows[0]["suites"]:
    said = rows[0]["suites"][suite]
    shown = [
      m
      for m in HEADLINE
      if any(m in result["spread"].get(n, {}).get(suite, {}) for n in names)
    ]
    head = f"`{suite}`: {said['rows']} rows, {said['pairs']} pairs; {meaning}."
    body = [
      [name, *(_cell(result, rows, name, suite, m) for m in shown)]
      for name in names
    ]
    heads = ("row", *(HEADLINE[m] for m in shown))
    out += ["", head, "", *_table(heads, body)]
  return "\n".join(out) + "\n"


def _trained(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
  of_row = [row for row in rows if row["row"] == name]

  def mean(key: str) -> float:
    return sum(row[key] for row in of_row) / len(of_row)

  return [
    name,
    of_row[0]["says"],
    f"{mean('steps'):.0f}",
    f"{mean('tokens'):,.0f}",
    f"{mean('seconds') / 60:.1f}",
  ]


def _cell(
  result: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  name: str,
  suite: str,
  metric: str,
) -> str:
  found = result["spread"].get(name, {}).get(suite, {}).get(metric)
  if not found:
    return "-"
  low, high = found["min"], found["max"]
  if found["seeds"] == 1:
    (row,) = (
      r
      for r in rows
      if r["row"] == name
      and metric in r["suites"].get(suite, {}).get("metrics", {})
    )
    intervals = row["suites"][suite]["metrics"]["intervals"]
    if metric not in intervals:
      return f"{found['mean']:.3f}"
    low, high = intervals[metric]
  return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [heads, ["---"] * len(heads), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]
