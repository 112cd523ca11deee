"""One self-contained HTML page: report, sensitivity, failures, pictures."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from csrm_jax.eval.checks_spec import Result

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff;
  --line: #d4d8dd; --soft: #f3f5f7; --good: #1a6f3c; --bad: #b3261e;
  --accent: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb;
  --paper: #14171a; --line: #3a4047; --soft: #1f2429; --good: #6fcf97;
  --bad: #ff8a80; --accent: #8ab8ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem;
  border-bottom: 2px solid var(--accent); } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; min-width: 12rem; }
thead th { background: var(--soft); }
small { opacity: .75; display: block; }
.yes { color: var(--good); } .no { color: var(--bad); font-weight: bold; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PNG = b"\x89PNG\r\n\x1a\n"
_CELLS = Sequence[tuple[str, str]]  # (class, escaped HTML)


def write(path: str | Path, report: Mapping[str, Any], **parts: Any) -> Path:
  """Writes `page(report, **parts)` as UTF-8 and returns the path."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page(report, **parts), encoding="utf-8")
  return path


def page(
  report: Mapping[str, Any],
  *,
  sensitivity: Mapping[str, Mapping[str, Any]] | None = None,
  failures: Mapping[str, Mapping[str, Result]] | None = None,
  pictures: Mapping[str, str | Path] | None = None,
  tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
  title: str = "Evaluation",
) -> str:
  """The page. It loads nothing, runs nothing and escapes every text.

  Args:
    report: of `eval.run.evaluate`.
    sensitivity: of `eval.sensitivity.report`, by whom they concern.
    failures: of `eval.failures.check`, by whom they concern.
    pictures: PNG files by caption.
    tables: further rows by heading; the columns are the keys of the first row,
      and `x_interval` is shown below `x`.
    title: of the page.

  Raises:
    ValueError: a picture that is missing or no PNG.
  """
  body = [f"<h1>{escape(title)}</h1>", _facts(report)]
  for name, suite in report.get("suites", {}).items():
    body.append(_suite(name, suite))
  for whom, checks in (failures or {}).items():
    head = f"<h2>Failure checks: {escape(whom)}</h2>"
    body.append(head + _failures(checks))
  for whom, found in (sensitivity or {}).items():
    head = f"<h2>Sensitivity: {escape(whom)}</h2>"
    body.append(head + _sensitivity(found))
  for heading, rows in (tables or {}).items():
    body.append(f"<h2>{escape(heading)}</h2>" + _records(rows))
  if pictures:
    body.append("<h2>Pictures</h2>")
    body += [_picture(text, Path(path)) for text, path in pictures.items()]
  if report.get("notes"):
    items = "".join(f"<li>{escape(str(n))}</li>" for n in report["notes"])
    body.append(f"<h2>Notes</h2><ul>{items}</ul>")
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
    "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
  )


def _number(value: Any, bounds: Sequence[float] | None = None) -> str:
  if value is None:
    return "-"
  if isinstance(value, bool | str):
    return escape(str(value))
  if isinstance(value, int):
    return str(value)
  text = f"{value:.3f}"
  if bounds:
    text += f"<small>{bounds[0]:.3f} to {bounds[1]:.3f}</small>"
  return text


def _table(heads: Sequence[str], rows: Sequence[_CELLS]) -> str:
  top = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
  lines = []
  for row in rows:
    cells = "".join(
      f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"
      for kind, text in row
    )
    lines.append(f"<tr>{cells}</tr>")
  return (
    f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
  )


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of plain values; texts wrap, numbers have their intervals."""
  heads = [k for k in (rows[0] if rows else {}) if not k.endswith("_interval")]
  if not heads:
    return "<p>none</p>"
  cells = [
    [
      (
        "text" if isinstance(row.get(k), str) else "",
        _number(row.get(k), row.get(f"{k}_interval")),
      )
      for k in heads
    ]
    for row in rows
  ]
  return _table(heads, cells)


def _facts(report: Mapping[str, Any]) -> str:
  rows = [
    [("", escape(str(key))), ("text", _number(value))]
    for key, value in {
      **report.get("model", {}),
      "seconds": report.get("seconds"),
      "peak memory, GiB": report.get("peak_memory_gib"),
    }.items()
    if value is not None
  ]
  return _table(("model", ""), rows)


def _suite(name: str, suite: Mapping[str, Any]) -> str:
  judges = suite.get("judges", {})
  shown = list(
    dict.fromkeys(
      key
      for values in judges.values()
      for key, value in values.items()
      if isinstance(value, int | float)
    )
  )
  rows = [
    [("", escape(judge))]
    + [
      ("", _number(values.get(m), values.get("intervals", {}).get(m)))
      for m in shown
    ]
    for judge, values in judges.items()
  ]
  head = f"{suite.get('rows', 0)} rows, {suite.get('pairs', 0)} pairs"
  if "base_rate" in suite:
    head += f", {suite['base_rate']:.1%} comply"
  return (
    f"<h2>{escape(name)}</h2><p>{escape(head)}; small: 95 % bootstrap over"
    " conversation families.</p>" + _table(("judge", *shown), rows)
  )


def _failures(failures: Mapping[str, Result]) -> str:
  rows = []
  for name, r in failures.items():
    passed = r["passed"]
    word = "-" if passed is None else "yes" if passed else "no"
    also = ", ".join(f"{k} {_number(v)}" for k, v in sorted(r["also"].items()))
    rows.append(
      [
        ("", escape(name)),
        (word.strip("-"), word),
        ("", _number(r["value"], r["interval"])),
        ("", escape(r["pass_mark"] or "-")),
        ("", str(r["n"])),
        ("text", escape(also)),
      ]
    )
  heads = ("check", "passed", "value", "mark", "n", "beside it")
  return _table(heads, rows)


def _sensitivity(found: Mapping[str, Any]) -> str:
  plain = [
    [("", escape(k)), ("", _number(v))]
    for k, v in found.items()
    if not isinstance(v, Mapping)
  ]
  parts = [_table(("counted", ""), plain)] if plain else []
  for probe, values in found.items():
    if not isinstance(values, Mapping):
      continue
    intervals = values.get("intervals", {})
    rows = [
      [("", escape(name)), ("", _number(value, intervals.get(name)))]
      for name, value in values.items()
      if isinstance(value, int | float)
    ]
    parts.append(f"<h3>{escape(probe)}</h3>" + _table(("number", ""), rows))
    if values.get("largest"):
      parts.append(_largest(values["largest"]))
  return "".join(parts)


def _largest(items: Sequence[Mapping[str, Any]]) -> str:
  """The rule that moves each of some cases most."""
  rows = [
    [
      ("", escape(str(item["id"]))),
      ("text", escape(f"S{item['rule']}: {item['text']}")),
      ("", _number(item["shift"])),
      ("", "-" if item["decisive"] is None else _rules(item["decisive"])),
    ]
    for item in items[:12]
  ]
  heads = ("case", "rule that moves it most", "log-odds without it", "decisive")
  return _table(heads, rows)


def _rules(numbers: Sequence[int]) -> str:
  return escape(", ".join(f"S{i}" for i in numbers) or "none")


def _picture(caption: str, path: Path) -> str:
  data = path.read_bytes() if path.is_file() else b""
  if not data.startswith(_PNG):
    raise ValueError(
      f"{path}: {'no PNG' if data else 'no such file'}; give a picture that"
      " an evaluation wrote, or leave it out"
    )
  text, code = escape(caption), base64.b64encode(data).decode()
  return (
    f'<figure><img alt="{text}" src="data:image/png;base64,{code}">'
    f"<figcaption>{text}</figcaption></figure>"
  )
