"""Suites: named or filed contract rows, flattened to sequences and pairs."""

import collections
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax.config import default
from csrm_jax.data import contract, sources, synthetic
from csrm_jax.data.prepare import is_heldout
from csrm_jax.data.sets import SETS
from csrm_jax.data.shuffle import shuffle_specs
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
      where there are any.
    pairs: the preferences among them: pair rows, spec pairs, ladders, and
      every edited row against its base if their gold verdicts differ.
    note: what was left out, in words; empty if nothing.
  """

  name: str
  rows: list[Row]
  pairs: list[Preference]
  note: str = ""


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
      for key in ("label", "base", "edit", "source"):
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
      raise ValueError(
        f"suite {name}: row {row['id']!r}: field 'base': {row['base']!r} names "
        "no other label row of the suite; give the id of the unedited row"
      )
    row["base_row"] = base
    if complies(row["label"]) != complies(rows[base]["label"]):
      right = complies(row["label"])
      win, lose = (at, base) if right else (base, at)
      pairs.append(Preference(win, lose, "spec", row["weight"]))
  return pairs


def read(
  name: str,
  *,
  data: str | Path | None = None,
  model: str | Path | None = None,
  rows: int = 0,
  seed: int = 0,
) -> Suite:
  """A suite by name or by file.

  Args:
    name: "synthetic_seen", "synthetic_unseen" (400 rows unless `rows` says
      otherwise), "heldout" (the rows that preparation kept from training), a
      real set's name (its families that the model's recipe holds out), or a
      .jsonl(.gz) file of contract rows.
    data: for "heldout" the prepared folder, for real sets their folder.
    model: a workdir, whose recipe says what was held out.
    rows: kept, by whole families (`some_families`); 0: all.
    seed: of the synthetic rows.

  Raises:
    ValueError: unknown name, missing or broken file; says what to do.
  """
  if name in SYNTHETIC:
    made = synthetic.suite(name, size=rows or SYNTHETIC_ROWS, seed=seed)
    return flatten(name, made)
  config = recipe(model)
  if name == "heldout":
    found = list(contract.read_rows(_heldout_file(data, model, config)))
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
    found = list(contract.read_rows(name))
  else:
    known = ", ".join((*SYNTHETIC, "heldout", *SETS))
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


def workdir_of(model: str | Path | None) -> Path | None:
  """The workdir that a model path means, itself or one of its checkpoints."""
  if not model:
    return None
  folder = Path(model)
  if folder.parent.name == "checkpoints":
    folder = folder.parent.parent
  return folder if (folder / "model.json").is_file() else None


def recipe(model: str | Path | None) -> Any:
  """The config of a workdir; the defaults for anything else.

  Keys that this version does not know are ignored: they cannot concern it.
  """
  config = default()
  folder = workdir_of(model)
  if folder and (folder / "config.json").is_file():
    text = (folder / "config.json").read_text(encoding="utf-8")
    _overwrite(config, json.loads(text))
  return config


def _overwrite(config: Any, values: Mapping[str, Any]) -> None:
  for key, value in values.items():
    if key not in config:
      continue
    if isinstance(value, dict):
      _overwrite(config[key], value)
    elif value is not None:
      config[key] = value


def training_rows(model: str | Path | None) -> Iterator[Row]:
  """The contract rows that a workdir's model was trained on.

  Of anything else than a workdir, the default recipe's: synthetic rows.

  Raises:
    ValueError: the recipe's data are not where it found them.
  """
  config = recipe(model)
  rows = (
    row
    for row in sources.load(
      config.data.source,
      path=config.data.path,
      seed=config.seed,
      limit=config.data.examples or _synthetic_families(config.data.source),
      max_rules=config.data.max_rules,
      kinds=config.data.kinds,
      operators=config.data.operators,
    )
    if not is_heldout(
      row["family"], seed=config.seed, share=config.data.heldout
    )
  )
  if config.data.shuffle_specs:
    yield from shuffle_specs(rows, seed=config.seed, counts={})
  else:
    yield from rows


def _synthetic_families(source: str) -> int:
  """The synthetic set has no size of its own: enough to train a baseline."""
  return 1500 if source == "synthetic" else 0


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
