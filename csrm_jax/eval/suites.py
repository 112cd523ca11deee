"""Suites: named or filed contract rows, flattened to sequences and pairs."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax.data import contract, sources, synthetic
from csrm_jax.data.prepare import is_heldout
from csrm_jax.data.sets import SETS
from csrm_jax.eval import real
from csrm_jax.eval.recipes import recipe, split_of, workdir_of
from csrm_jax.metrics import complies
from csrm_jax.spec import Spec

Row = dict[str, Any]

SYNTHETIC = ("synthetic_seen", "synthetic_unseen")
SYNTHETIC_ROWS = 400


class Preference(NamedTuple):
  """`win` and `lose` index the rows of a suite."""

  win: int
  lose: int
  kind: str  # of types.PAIR_KINDS
  weight: float


class Suite(NamedTuple):
  """What judges are asked, and what the answers should be.

  Attributes:
    name: as the user gave it.
    rows: one sequence to score each, like label rows: id, messages, family,
      weight; spec (absent: helpfulness is asked for); label, base and edit
      where there are any; gold: the lines of the spec that decide.
    pairs: the preferences among them: pair rows, spec pairs, ladders, and
      every edited row against its base if their gold verdicts differ.
    note: what was left out, in words; empty if nothing.
  """

  name: str
  rows: list[Row]
  pairs: list[Preference]
  note: str = ""


def names(text: str | Sequence[str]) -> list[str]:
  """Suites in "a,b" or a list, "real" spelt out, in order, each once.

  Raises:
    ValueError: there is none.
  """
  parts = text.split(",") if isinstance(text, str) else text
  found: list[str] = []
  for name in filter(None, (part.strip() for part in parts)):
    found += real.REAL if name == "real" else (name,)
  if not found:
    raise ValueError(
      "--suite is empty; name suites or .jsonl files, joined by commas"
    )
  return list(dict.fromkeys(found))


def spec_text(row: Mapping[str, Any]) -> str | None:
  """The rendered spec of a row; None if it has none."""
  spec = row.get("spec")
  if spec is None or isinstance(spec, str):
    return spec
  return Spec.parse(spec, origin=f"row {row.get('id')!r}").render()


def flatten(name: str, rows: Iterable[Mapping[str, Any]]) -> Suite:
  """Contract rows of any kind as one suite.

  Raises:
    ValueError: a `base` that names no label row, or no rows at all.
  """
  flat: list[Row] = []
  pairs: list[Preference] = []
  labelled: dict[str, int] = {}

  def add(row: Mapping[str, Any], part: str, messages, spec) -> int:
    flat.append(
      {
        "id": row["id"] + part,
        "messages": messages,
        "family": row.get("family") or contract.family_of(row),
        "weight": float(row.get("weight", 1.0)),
      }
      | ({} if spec is None else {"spec": spec})
    )
    return len(flat) - 1

  for row in rows:
    kind = contract.kind_of(row)
    weight = float(row.get("weight", 1.0))
    if kind == "label":
      at = add(row, "", row["messages"], row["spec"])
      labelled[row["id"]] = at
      for key in ("label", "base", "edit", "source", "gold"):
        if key in row:
          flat[at][key] = row[key]
    elif kind == "ladder":
      rungs = [
        add(row, f"#{i}", rung["messages"], rung["spec"])
        for i, rung in enumerate(row["ladder"])
      ]
      share = weight * 2 / (len(rungs) * (len(rungs) - 1))
      pairs += [
        Preference(rungs[j], rungs[i], "severity", share)
        for j in range(len(rungs))
        for i in range(j)
      ]
    elif kind == "spec_pair":
      win, lose = (
        add(row, f"#{side}", row["messages"], row[side])
        for side in ("chosen_spec", "rejected_spec")
      )
      pairs.append(Preference(win, lose, "spec", weight))
    else:
      spec = None if row["kind"] == "help" else row["spec"]
      win, lose = (
        add(row, f"#{side}", [*row["prompt"], *row[side]], spec)
        for side in ("chosen", "rejected")
      )
      pairs.append(Preference(win, lose, row["kind"], weight))
  if not flat:
    raise ValueError(f"suite {name}: no rows; name a file that holds some")
  return Suite(name, flat, pairs + _flips(name, flat, labelled))


def _flips(
  name: str, rows: list[Row], labelled: dict[str, int]
) -> list[Preference]:
  """Resolves `base` to row numbers, in place; gold flips become pairs."""
  pairs = []
  for at, row in enumerate(rows):
    if "base" not in row:
      continue
    base = labelled.get(row["base"])
    if base is None or base == at:
      raise ValueError(f"suite {name}: row {row['id']!r}: {_no_base(row)}")
    row["base_row"] = base
    if complies(row["label"]) != complies(rows[base]["label"]):
      right = complies(row["label"])
      win, lose = (at, base) if right else (base, at)
      pairs.append(Preference(win, lose, "spec", row["weight"]))
  return pairs


def _no_base(row: Row) -> str:
  return (
    f"field 'base': {row['base']!r} names no other label row of the suite; give"
    " the id of the unedited row"
  )


def read(
  name: str,
  *,
  data: str | Path | None = None,
  model: str | Path | None = None,
  rows: int = 0,
  seed: int = 0,
  fits: Callable[[Row], object] | None = None,
  aside: list[dict[str, Any]] | None = None,
) -> Suite:
  """A suite by name or by file.

  Args:
    name: "synthetic_seen", "synthetic_unseen" (400 rows unless `rows` says
      otherwise), "heldout" (the rows that preparation kept from training), one
      of `real.NAMES`, another real set's name (its families that the model's
      recipe holds out), or a .jsonl(.gz) file of contract rows.
    data: for "heldout" the prepared folder, for real sets their folder.
    model: a workdir, whose recipe says what was held out.
    rows: kept, by whole families (`some_families`); 0: all, of `real.NAMES`
      `real.ROWS`.
    seed: of the synthetic rows.
    fits: raises ValueError for a row of a file (its messages and spec) that
      the model cannot read.
    aside: receives the bad rows of a file, as `contract.read_rows` puts them
      aside; None: the first stops the reading.

  Raises:
    ValueError: unknown name, missing or broken file, bad row; says what to do.
  """
  if name in SYNTHETIC:
    made = synthetic.suite(name, size=rows or SYNTHETIC_ROWS, seed=seed)
    return flatten(name, made)
  config = recipe(model)
  if name == "heldout":
    found = list(contract.read_rows(_heldout_file(data, model, config)))
  elif name in real.NAMES:
    return _real(name, data=data, model=model, rows=rows)
  elif name in SETS:
    if not (data or config.data.path):
      raise ValueError(
        f"--suite={name}: --data is missing; give the folder of the real sets"
      )
    found = [
      row
      for row in sources.load(
        name, path=data or config.data.path, seed=config.seed
      )
      if is_heldout(row["family"], seed=config.seed, share=config.data.heldout)
    ]
  elif Path(name).is_file():
    found = _rows_of(Path(name), fits or (lambda row: None), aside)
  else:
    known = ", ".join((*SYNTHETIC, "heldout", "real", *real.NAMES, *SETS))
    raise ValueError(
      f"--suite={name}: neither a file nor a suite; use {known}, or the path "
      "of a .jsonl file"
    )
  kept = some_families(found, rows)
  suite = flatten(name, kept)
  if len(kept) < len(found):
    note = f"{len(kept)} of {len(found)} rows, whole families at random"
    suite = suite._replace(note=note)
  return suite


def _rows_of(
  path: Path,
  fits: Callable[[Row], object],
  aside: list[dict[str, Any]] | None,
) -> list[Row]:
  """The rows of a user's file that can be judged; see `read`."""
  lines = functools.cache(lambda: contract.line_numbers(path))
  counts: dict[str, int] = {}
  kept: dict[int, Row] = {}  # by number

  def refuse(n: int, row: Row, problem: str) -> None:
    line = lines()[n - 1]
    reason = f"{path}:{line}: {problem}"
    if aside is None:
      raise ValueError(reason)
    aside.append({"line": line, "reason": reason, "row": row})

  for row in contract.read_rows(
    path,
    on_bad_row="stop" if aside is None else "quarantine",
    quarantine=aside,
    counts=counts,
  ):
    n = counts["rows_read"]
    try:
      alone = {key: value for key, value in row.items() if key != "base"}
      for part in flatten(str(path), [alone]).rows:
        fits(part)
    except ValueError as error:
      refuse(n, row, f"field 'messages': {error}")
    else:
      kept[n] = row
  while lost := _baseless(kept):
    for n in lost:
      row = kept.pop(n)
      refuse(n, row, _no_base(row))
  if aside:
    aside.sort(key=lambda entry: entry["line"])
    if not kept:
      raise ValueError(
        f"{path}: all {len(aside)} rows are bad; {aside[0]['reason']}"
      )
  return list(kept.values())


def _baseless(kept: Mapping[int, Row]) -> list[int]:
  """Numbers of label rows whose `base` is no other label row."""
  labelled = {r["id"] for r in kept.values() if contract.kind_of(r) == "label"}
  return [
    n
    for n, row in kept.items()
    if contract.kind_of(row) == "label"
    and "base" in row
    and (row["base"] == row["id"] or row["base"] not in labelled)
  ]


def _real(
  name: str, *, data: Any, model: str | Path | None, rows: int
) -> Suite:
  """A suite of `real.NAMES`; its note says what was left out."""
  config = recipe(model)
  path = data or config.data.path
  if not path:
    raise ValueError(
      f"--suite={name}: --data is missing; give the folder of the real sets"
    )
  counts: dict[str, int] = {}
  split = split_of(model, data=path)
  made = real.build(name, path=path, split=split, rows=rows, counts=counts)
  note = ", ".join(f"{key} {n}" for key, n in counts.items() if n)
  if split.note:
    note += f"; {split.note}"
  return flatten(name, made)._replace(note=note)


def some_families(rows: Sequence[Row], count: int) -> list[Row]:
  """Rows of families that together hold `count` rows or just more; 0: all.

  Families are drawn by a hash of their names, so that a file which holds one
  set after the other is not cut down to the first. Rows keep their order.
  """
  if not count or len(rows) <= count:
    return list(rows)
  families = [row.get("family") or contract.family_of(row) for row in rows]
  sizes = collections.Counter(families)
  kept: set[str] = set()
  total = 0
  for family in sorted(sizes, key=contract.hash_family):
    if total >= count:
      break
    kept.add(family)
    total += sizes[family]
  return [r for r, f in zip(rows, families, strict=True) if f in kept]


def _heldout_file(data: Any, model: Any, config: Any) -> Path:
  """heldout.jsonl of the folder named, else of the model's workdir."""
  folders = [data] if data else []
  if workdir := workdir_of(model):
    folders.append(config.data.prepared or workdir / "data")
  for folder in map(Path, folders):
    for path in (folder / "heldout.jsonl", folder / "data" / "heldout.jsonl"):
      if path.is_file() and path.stat().st_size:
        return path
  places = ", ".join(map(str, folders)) or "a model without workdir"
  raise ValueError(
    f"--suite=heldout: no heldout.jsonl with rows in {places}; give "
    "--data=DIR, a folder that launch/prepare.py wrote with "
    "--config.data.heldout above 0"
  )
