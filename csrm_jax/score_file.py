"""A file of conversations to a file of scores, in JSON lines."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csrm_jax import storage
from csrm_jax.data import contract
from csrm_jax.judge import Judge
from csrm_jax.score import Score, check_options, encode_row, score_items
from csrm_jax.spec import Spec
from csrm_jax.storage import AnyPath


def score_file(
  judge: Judge,
  source: str | Path,
  output: str | AnyPath,
  *,
  spec: Spec | None = None,
  turns: str = "last",
  max_tokens: int = 0,
  on_bad_row: str = "stop",
  helpfulness: bool = False,
  progress: bool = False,
) -> dict[str, int]:
  """Scores the rows of a JSON-lines file; one line each, in their order.

  Args:
    judge: of `judge.load`.
    source: rows of the data contract; labels are not needed.
    output: file to write, here or gs://; rows put aside go to
      OUTPUT.quarantine.jsonl.
    spec: judges every row, in place of the rows' own specs.
    turns: see `score.score_rows`; "any" adds "calibrated" and "turn" to each
      line.
    max_tokens: see `score.score_rows`.
    on_bad_row: "stop" raises at the first bad row, before anything is scored;
      "quarantine" puts bad rows aside.
    helpfulness: see `score.score_rows`.
    progress: whether to show a bar.

  Returns:
    Counts: rows scored, quarantined, truncated; messages, rules cut.

  Raises:
    ValueError: file, line, field and remedy of a bad row.
  """
  check_options(
    judge, turns=turns, max_tokens=max_tokens, helpfulness=helpfulness
  )
  output = storage.path(output, flag="--output")
  counts: dict[str, int] = {}
  aside: list[dict[str, Any]] = []
  rows = contract.read_rows(
    source,
    on_bad_row=on_bad_row,
    quarantine=aside,
    counts=counts,
    kinds=("label",),
    need_label=False,
    need_spec=spec is None,
  )
  lines = functools.cache(lambda: contract.line_numbers(Path(source)))
  ids, items = [], []
  for row in rows:
    if spec is not None:
      row = row | {"spec": spec}
    try:
      item = encode_row(
        judge, row, turns=turns, max_tokens=max_tokens, helpfulness=helpfulness
      )
    except ValueError as error:
      line = lines()[counts["rows_read"] - 1]
      reason = f"{source}:{line}: field 'messages': {error}"
      if on_bad_row == "stop":
        raise ValueError(reason) from error
      plain = {k: v for k, v in row.items() if v is not spec}
      aside.append({"line": line, "reason": reason, "row": plain})
      continue
    ids.append(row["id"])
    items.append(item)
  if on_bad_row == "quarantine":
    aside.sort(key=lambda entry: entry["line"])
    _write_lines(contract.aside_of(output), aside)
  scores = score_items(judge, items, progress=progress)
  _write_lines(
    output,
    [
      _as_line(name, s, turns=turns, helpfulness=helpfulness)
      for name, s in zip(ids, scores, strict=True)
    ],
  )
  return {
    "rows": len(scores),
    "quarantined": len(aside),
    "truncated": sum(s.truncated for s in scores),
  } | {
    f"cut_{name}": sum(item.cut[name] for item in items)
    for name in ("messages", "shortened", "rules")
  }


def _as_line(
  name: str, s: Score, *, turns: str, helpfulness: bool
) -> dict[str, Any]:
  line = {"id": name, **s._asdict()}
  if not helpfulness:
    del line["helpfulness"]
  if turns == "last":
    del line["calibrated"], line["turn"]
  return line


def _write_lines(path: AnyPath, lines: Sequence[Mapping[str, Any]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.naming(path), path.open("wb") as out:
    for line in lines:
      out.write((json.dumps(line) + "\n").encode())
