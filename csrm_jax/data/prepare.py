"""Contract rows to packed rows on disk, with a manifest of what went where.

A prepared folder holds `train.array_record` (one packed row a record),
`heldout.jsonl` (contract rows of the families kept from training, for
calibration and evaluation) and `meta.json`.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from csrm_jax import storage
from csrm_jax.config import Config
from csrm_jax.data import balance, families, found, local, sources, template
from csrm_jax.data.families import Bucket, row_dtype
from csrm_jax.data.found import Found
from csrm_jax.data.pieces import Recipe, is_heldout
from csrm_jax.data.stages import Stage, parse_stages
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.data.workers import number_of

__all__ = ["ensure", "is_heldout", "prepare", "read_meta", "row_dtype"]

# Bumped when equal inputs would give other records.
_FORMAT = 2
# Where the rows are and who works on them decides nothing.
_NO_MATTER = ("path", "prepared", "workers", "runner", "beam_options")
# Synthetic groups that one of Beam's processes makes at once.
_GROUPS = 256


def preparation_key(config: Config, tokenizer: Tokenizer) -> str:
  """Fingerprint of everything that decides the records."""
  described = {
    "format": _FORMAT,
    "seed": config.seed,
    "data": {
      k: v for k, v in config.data.to_dict().items() if k not in _NO_MATTER
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


def prepare(
  config: Config, folder: str | Path, tokenizer: Tokenizer
) -> dict[str, Any]:
  """Writes packed rows of `config.data` into `folder`, replacing what is there.

  `data.runner` says who does the work; the files are the same.

  Returns:
    The manifest, as in `meta.json`.

  Raises:
    ValueError: bad rows (see `data/contract.py`), or nothing to train on.
  """
  folder = Path(folder)
  data = config.data
  stages = parse_stages(data.stages)
  workers = number_of(data.workers)
  if data.runner not in ("local", "beam"):
    raise ValueError(
      f"--config.data.runner={data.runner}: must be local or beam"
    )
  partial = folder.with_name(folder.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  work = partial / "work"
  work.mkdir(parents=True)
  recipe = Recipe(
    tokenizer=tokenizer,
    seed=config.seed,
    heldout=data.heldout,
    max_tokens=data.max_tokens or data.row_length // 2,
    shape={k: data[k] for k in ("row_length", "slots", "pairs")},
    quarantine=data.on_bad_row == "quarantine",
  )
  options = sources.options(data)
  limit = options.pop("limit")
  reading = sources.Reading(
    path=data.path, seed=config.seed, on_bad_row=data.on_bad_row, **options
  )
  sources.check(reading)
  if data.runner == "beam":
    made = _beam().run(
      recipe,
      reading,
      sources.parts(data.source, limit, groups=_GROUPS),
      stages,
      work,
      shuffle=data.shuffle_specs,
      options=data.beam_options,
    )
  else:
    made = local.run(
      recipe,
      reading,
      sources.parts(data.source, limit),
      stages,
      work,
      shuffle=data.shuffle_specs,
      workers=workers,
    )
  if not made.records:
    raise ValueError(
      f"data.source {data.source!r} gave no training rows; lower data.heldout "
      f"(now {data.heldout}) or give more data"
    )
  meta = _written(config, recipe, stages, made, partial)
  shutil.rmtree(work)
  shutil.rmtree(folder, ignore_errors=True)
  partial.rename(folder)
  return meta


def _beam() -> Any:
  if not importlib.util.find_spec("apache_beam"):
    raise ValueError(
      "--config.data.runner=beam needs Apache Beam, which is not installed: "
      "pip install -e '.[beam]', or leave data.runner at local"
    )
  from csrm_jax.data import beam

  return beam


def _written(
  config: Config, recipe: Recipe, stages: list[Stage], made: Found, out: Path
) -> dict[str, Any]:
  """Writes the files of a prepared folder and returns the manifest."""
  data, tokenizer = config.data, recipe.tokenizer
  with (out / "heldout.jsonl").open("w", encoding="utf-8") as lines:
    lines.writelines(line + "\n" for _, line in made.heldout)
  if made.counts.get("quarantined"):
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as lines:
      lines.writelines(line + "\n" for _, line in made.bad)
  digest = hashlib.sha256(template.fingerprint(tokenizer).encode())
  writer = ArrayRecordWriter(str(out / "train.array_record"), "group_size:1")
  size = row_dtype(**recipe.shape).itemsize
  parts: list[list[Bucket]] = [[] for _ in range(len(stages) + 1)]
  for packed in sorted(made.records, key=lambda r: (r.stage, r.bucket)):
    for record in _read(Path(packed.path), size):
      digest.update(record)
      writer.write(record)
    Path(packed.path).unlink()
    parts[packed.stage].append(packed.sums)
  writer.close()
  sums = [families.merged(part) for part in parts]
  total = families.merged(sums)
  held = 0
  splits: dict[str, int] = {}  # of augmented rows
  for kind, split, _ in found.unique(iter(made.families)):
    if kind == "heldout":
      held += 1
    else:
      splits[split] = splits.get(split, 0) + 1
  counts = {
    **made.counts,
    **total.counts,
    "families_heldout": held,
    "families_train": total.families,
  }
  meta = {
    "key": preparation_key(config, tokenizer),
    "fingerprint": "sha256:" + digest.hexdigest(),
    "tokenizer": tokenizer.fingerprint(),
    "template": template.fingerprint(tokenizer),
    "source": data.source,
    "seed": config.seed,
    "operators": data.operators,
    "shuffle_specs": data.shuffle_specs,
    "shape": recipe.shape,
    "rows": total.rows,
    # The last part that has families is the one that repeats.
    "stage_rows": [part.rows for part in sums if part.families][:-1],
    "stage_families": [part.families for part in sums],
    "label_balance": total.label / max(total.weight, 1e-9),
    "counts": dict(sorted(counts.items())),
  }
  if splits:
    meta["augmentation"] = balance.described(
      made.facts, splits, iter(made.digests)
    )
  (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
  return meta


def _read(path: Path, size: int) -> Iterator[bytes]:
  with path.open("rb") as file:
    while record := file.read(size):
      yield record


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
