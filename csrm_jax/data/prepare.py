"""Contract rows to packed rows on disk, with a manifest of what went where.

A prepared folder holds `train.array_record` (one packed row a record),
`heldout.jsonl` (contract rows of the families kept from training, for
calibration and evaluation) and `meta.json`.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from csrm_jax import storage
from csrm_jax.config import Config
from csrm_jax.data import balance, contract, sources, template
from csrm_jax.data.shuffle import shuffle_specs
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.data.trie import pack
from csrm_jax.spec import Spec
from csrm_jax.types import Batch, Example, Pair, Segment

# Bumped when equal inputs would give other records.
_FORMAT = 1


def row_dtype(row_length: int, slots: int, pairs: int) -> np.dtype:
  """Layout of one record: the fields of `Batch`, little-endian, in order."""
  shapes = {
    "tokens": ("<i4", (row_length,)),
    "positions": ("<i4", (row_length,)),
    "subtree_end": ("<i4", (row_length,)),
    "readout": ("<i4", (slots,)),
    "label": ("<f4", (slots,)),
    "label_weight": ("<f4", (slots,)),
    "pair": ("<i4", (pairs, 2)),
    "pair_kind": ("<i4", (pairs,)),
    "pair_weight": ("<f4", (pairs,)),
    "pair_margin": ("<f4", (pairs,)),
  }
  return np.dtype([(name, *shapes[name]) for name in Batch._fields])


def is_heldout(family: str, *, seed: int, share: float) -> bool:
  """Whether a family is kept from training; a pure function of its name."""
  digest = hashlib.sha256(f"{seed}:{family}".encode()).digest()
  return int.from_bytes(digest[:8], "little") < share * 2**64


class _Family:
  """Collects the segments and pairs of one family; equal tokens merge."""

  def __init__(self, name: str) -> None:
    self.name = name
    self.segments: list[Segment] = []
    self.pairs: list[Pair] = []
    self.index: dict[tuple[int, ...], int] = {}

  def add(self, tokens: tuple[int, ...], label=float("nan"), weight=1.0) -> int:
    at = self.index.get(tokens)
    if at is None:
      at = self.index[tokens] = len(self.segments)
      self.segments.append(Segment(tokens, label, weight))
    elif not np.isnan(label):
      if np.isnan(self.segments[at].label):
        self.segments[at] = Segment(tokens, label, weight)
      else:  # judged twice: both judgements count, on the same tokens
        self.segments.append(Segment(tokens, label, weight))
    return at

  def example(self) -> Example:
    return Example(self.name, tuple(self.segments), tuple(self.pairs))


def examples(
  rows: Iterable[Mapping[str, Any]],
  tokenizer: Tokenizer,
  *,
  max_tokens: int,
  counts: dict[str, int],
  bad: Any = None,
) -> list[Example]:
  """Tokenises contract rows and joins them into families.

  Args:
    rows: valid rows of the data contract.
    tokenizer: of the backbone.
    max_tokens: of one sequence; longer ones are cut by `template.fit_to`.
    counts: receives rows_label, rows_pair, ..., cut_messages, cut_rules, ...
    bad: called with (row, reason) for a row that cannot be cut to fit; if
      None such a row raises.

  Returns:
    One Example per family, in order of first appearance.

  Raises:
    ValueError: a response and one rule alone exceed `max_tokens`.
  """
  families: dict[str, _Family] = {}
  specs: dict[str, Spec] = {}

  def encode(messages, row) -> tuple[int, ...]:
    spec = row.get("spec")
    if spec is not None:
      key = spec if isinstance(spec, str) else json.dumps(spec, sort_keys=True)
      if key not in specs:
        specs[key] = Spec.parse(spec, origin=f"row {row.get('id')!r}")
      spec = specs[key]
    ids, cut = template.fit_to(tokenizer, messages, spec, max_tokens)
    for name, n in cut.items():
      counts[f"cut_{name}"] = counts.get(f"cut_{name}", 0) + n
    return tuple(ids)

  for row in rows:
    kind = contract.kind_of(row)
    try:
      encoded = _encode_row(row, kind, encode)
    except ValueError as error:
      if bad is None:
        raise ValueError(f"row {row.get('id')!r}: {error}") from error
      bad(row, str(error))
      continue
    counts[f"rows_{kind}"] = counts.get(f"rows_{kind}", 0) + 1
    name = row.get("family") or contract.family_of(row)
    family = families.setdefault(name, _Family(name))
    weight = float(row.get("weight", 1.0))
    margin = float(row.get("margin", 0.0))
    if kind == "label":
      family.add(encoded[0], float(row["label"]), weight)
      continue
    at = [family.add(tokens) for tokens in encoded]
    if kind == "ladder":  # most severe first; a ladder counts once
      rungs = len(at)
      share = weight * 2 / (rungs * (rungs - 1))
      family.pairs += [
        Pair(at[j], at[i], "severity", margin, share)
        for i in range(rungs)
        for j in range(i + 1, rungs)
      ]
    else:
      name = "spec" if kind == "spec_pair" else row["kind"]
      family.pairs.append(Pair(at[0], at[1], name, margin, weight))
  return [family.example() for family in families.values()]


def _encode_row(row, kind, encode) -> list[tuple[int, ...]]:
  """Token sequences of a row: one for a label row, (winner, loser), ..."""
  if kind == "label":
    return [encode(row["messages"], row)]
  if kind == "pair":
    # Helpfulness is read on the spec-free form, so the spec cannot leak in.
    spec = {} if row["kind"] == "help" else {"spec": row["spec"]}
    return [
      encode(list(row["prompt"]) + list(row[side]), {"id": row["id"], **spec})
      for side in ("chosen", "rejected")
    ]
  if kind == "spec_pair":
    return [
      encode(row["messages"], {"id": row["id"], "spec": row[side]})
      for side in ("chosen_spec", "rejected_spec")
    ]
  return [
    encode(rung["messages"], {"id": row["id"], **rung})
    for rung in row["ladder"]
  ]


def preparation_key(config: Config, tokenizer: Tokenizer) -> str:
  """Fingerprint of everything that decides the records."""
  described = {
    "format": _FORMAT,
    "seed": config.seed,
    "data": {
      k: v
      for k, v in config.data.to_dict().items()
      if k not in ("path", "prepared")
    },
    "template": template.fingerprint(tokenizer),
    "inputs": sources.fingerprint(config.data.source, path=config.data.path),
  }
  text = json.dumps(described, sort_keys=True)
  return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read_meta(folder: str | Path) -> dict[str, Any]:
  """The manifest of a prepared folder.

  Raises:
    ValueError: if there is none.
  """
  path = Path(folder) / "meta.json"
  if not path.is_file():
    raise ValueError(
      f"{folder}: no meta.json here, so no prepared rows; write them with "
      "launch/prepare.py --workdir=DIR"
    )
  return storage.read_json(
    path, remedy=f"delete {folder} to have the rows made again"
  )


@dataclasses.dataclass
class Stage:
  """A stage of `data.stages`: which sources, and room for how many families."""

  sources: frozenset[str]
  room: int


def parse_stages(text: str) -> list[Stage]:
  """Stages out of "source,source:families;source:families".

  Raises:
    ValueError: a stage without sources, or without a positive number.
  """
  stages = []
  for part in filter(None, (p.strip() for p in text.split(";"))):
    names, _, number = part.rpartition(":")
    sources = frozenset(filter(None, (n.strip() for n in names.split(","))))
    if not sources or not number.strip().isdecimal() or int(number) < 1:
      raise ValueError(
        f"--config.data.stages={text}: {part!r} is no stage; write "
        "source,source:families, for example synthetic/presence:36"
      )
    stages.append(Stage(sources, int(number)))
  return stages


def _stage(stages: list[Stage], source: str) -> int:
  """Number of the first stage with room for a family of `source`; else last."""
  for i, stage in enumerate(stages):
    if stage.room and source in stage.sources:
      stage.room -= 1
      return i
  return len(stages)


def prepare(
  config: Config, folder: str | Path, tokenizer: Tokenizer
) -> dict[str, Any]:
  """Writes packed rows of `config.data` into `folder`, replacing what is there.

  Returns:
    The manifest, as in `meta.json`.

  Raises:
    ValueError: bad rows (see `data/contract.py`), or nothing to train on.
  """
  folder = Path(folder)
  data = config.data
  stages = parse_stages(data.stages)
  partial = folder.with_name(folder.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  counts: dict[str, int] = {"families_heldout": 0}
  held = (partial / "heldout.jsonl").open("w", encoding="utf-8")
  quarantine = partial / "quarantine.jsonl"

  def bad(row, reason: str) -> None:
    counts["quarantined"] = counts.get("quarantined", 0) + 1
    with quarantine.open("a", encoding="utf-8") as out:
      line = {"reason": reason, "row": row}
      out.write(json.dumps(line, ensure_ascii=False) + "\n")

  heldout_families: set[str] = set()
  placed: dict[str, int] = {}  # family: its stage
  augmented: list[contract.Row] = []

  def training() -> Iterator[contract.Row]:
    rows = sources.load(
      data.source,
      path=data.path,
      seed=config.seed,
      **sources.options(data),
      on_bad_row=data.on_bad_row,
      bad=bad,
      counts=counts,
    )
    for row in rows:
      family = row["family"]
      if row["source"] in sources.AUGMENTED:
        augmented.append(row)
      if is_heldout(family, seed=config.seed, share=data.heldout):
        heldout_families.add(family)
        held.write(json.dumps(row, ensure_ascii=False) + "\n")
      else:
        if family not in placed:
          placed[family] = _stage(stages, row["source"])
        yield row

  rows: Iterable[contract.Row] = training()
  if data.shuffle_specs:  # held-out rows keep theirs: they measure
    rows = shuffle_specs(rows, seed=config.seed, counts=counts)
  made = examples(
    rows,
    tokenizer,
    max_tokens=data.max_tokens or data.row_length // 2,
    counts=counts,
    bad=bad if data.on_bad_row == "quarantine" else None,
  )
  held.close()
  if not made:
    raise ValueError(
      f"data.source {data.source!r} gave no training rows; lower data.heldout "
      f"(now {data.heldout}) or give more data"
    )
  counts["families_heldout"] = len(heldout_families)
  counts["families_train"] = len(made)
  shape = {k: data[k] for k in ("row_length", "slots", "pairs")}
  parts = [
    [x for x in made if placed[x.id] == i] for i in range(len(stages) + 1)
  ]
  packed = [pack(part, **shape) for part in parts if part]
  for part in packed:
    for name, n in part.counts.items():
      counts[name] = counts.get(name, 0) + n
  digest = hashlib.sha256(template.fingerprint(tokenizer).encode())
  writer = ArrayRecordWriter(
    str(partial / "train.array_record"), "group_size:1"
  )
  number = sum(len(part.where) for part in packed)
  records = np.empty(number, row_dtype(**shape))
  for name in Batch._fields:
    leaves = [getattr(part.batch, name) for part in packed]
    records[name] = np.concatenate(leaves)
  for record in records:
    digest.update(record.tobytes())
    writer.write(record.tobytes())
  writer.close()
  weight = records["label_weight"]
  meta = {
    "key": preparation_key(config, tokenizer),
    "fingerprint": "sha256:" + digest.hexdigest(),
    "tokenizer": tokenizer.fingerprint(),
    "template": template.fingerprint(tokenizer),
    "source": data.source,
    "seed": config.seed,
    "operators": data.operators,
    "shuffle_specs": data.shuffle_specs,
    "shape": shape,
    "rows": number,
    "stage_rows": [len(part.where) for part in packed[:-1]],
    "stage_families": [len(part) for part in parts],
    "label_balance": float(
      np.sum(records["label"] * weight) / max(float(np.sum(weight)), 1e-9)
    ),
    "counts": dict(sorted(counts.items())),
  }
  if augmented:
    meta["augmentation"] = balance.manifest(
      augmented,
      split=lambda f: "heldout" if f in heldout_families else "train",
    )
  (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
  return meta


def ensure(config: Config, workdir: str | Path, tokenizer: Tokenizer) -> Path:
  """The folder of prepared rows for this config, written first if needed.

  The workdir's own folder is rewritten when stale; a folder that the user
  named (`data.prepared`) never is.

  Raises:
    ValueError: `data.prepared` was made from something else; the message has
      both fingerprints.
  """
  key = preparation_key(config, tokenizer)
  if config.data.prepared:
    folder = Path(config.data.prepared)
    found = read_meta(folder)["key"]
    if found != key:
      raise ValueError(
        f"data.prepared {folder}: rows are stale: made from {found}, this "
        f"config and tokenizer ask for {key}; a named folder is never "
        "rewritten: prepare into a new one, or leave data.prepared unset"
      )
    return folder
  folder = Path(workdir) / "data"
  if not (folder / "meta.json").is_file() or read_meta(folder)["key"] != key:
    prepare(config, folder, tokenizer)
  return folder
