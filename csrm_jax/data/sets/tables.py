"""Data sets as published: folders of JSON, CSV or parquet files."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csrm_jax.data.contract import Row, objects

_ENDINGS = (
  ".jsonl",
  ".jsonl.gz",
  ".jsonl.xz",
  ".json",
  ".csv",
  ".parquet",
)
# What download tools put beside the data.
_NO_DATA = {"dataset_infos.json", "dataset_dict.json", "state.json"}
# 1 == True, so that numbers are covered too.
_TRUE = {True: 1, "true": 1, "1": 1, False: 0, "false": 0, "0": 0}


def files(path: str | Path | None, name: str, folder: str) -> list[Path]:
  """The data files of a set: `path` itself, or all within FOLDER/`folder`.

  Raises:
    ValueError: no folder given, or no file found.
  """
  if not path:
    raise ValueError(
      f"source {name!r} needs its files; give --config.data.path=FOLDER, where "
      f"FOLDER holds {folder}/, or the path of one file"
    )
  top = Path(path)
  if top.is_file():
    return [top]
  home = top if top.name == folder else top / folder
  found = [
    file
    for file in sorted(home.rglob("*"))
    if file.is_file()
    and file.name.endswith(_ENDINGS)
    and file.name not in _NO_DATA
    and not any(p.startswith(".") for p in file.relative_to(home).parts)
  ]
  if not found:
    raise ValueError(
      f"--config.data.path={path}: source {name!r} needs data files "
      f"({', '.join(_ENDINGS)}) in {home}, and there are none; download the "
      "data set there, or name one file"
    )
  return found


def records(
  path: str | Path | None,
  name: str,
  folder: str,
  fields: tuple[str, ...],
  counts: dict[str, int],
) -> Iterator[tuple[Path, Row]]:
  """(file, record) of all files of a set, counted as `{name}_read`.

  Raises:
    ValueError: file, row, field and remedy of what is missing.
  """
  for file in files(path, name, folder):
    for number, row in enumerate(_read(file), 1):
      counts[f"{name}_read"] = counts.get(f"{name}_read", 0) + 1
      for field in fields:
        if field not in row:
          raise ValueError(
            f"{file}: row {number}: field {field!r}: missing; {name} is read "
            f"as published, with {', '.join(fields)}"
          )
      yield file, row


def truth(value: Any, field: str, file: Path) -> int:
  """1 or 0 for a boolean in any notation; CSV files know only text.

  Raises:
    ValueError: it is none.
  """
  plain = value.strip().lower() if isinstance(value, str) else value
  if isinstance(plain, str | int | float) and plain in _TRUE:
    return _TRUE[plain]
  raise ValueError(
    f"{file}: field {field!r}: {value!r}: must be true or false; use the "
    "published file"
  )


def _read(file: Path) -> Iterator[Row]:
  if file.suffix == ".parquet":
    yield from _parquet(file)
  elif file.suffix == ".csv":
    csv.field_size_limit(1 << 30)
    with file.open(encoding="utf-8-sig", newline="") as lines:
      yield from csv.DictReader(lines)
  elif file.suffix == ".json" and _opens_with_list(file):
    try:
      yield from json.loads(file.read_text("utf-8"))
    except ValueError as error:
      raise ValueError(f"{file}: not JSON: {error}; fetch it again") from None
  else:
    yield from objects(file, ())


def _opens_with_list(file: Path) -> bool:
  with file.open(encoding="utf-8-sig") as text:
    return text.read(1024).lstrip().startswith("[")


def _parquet(file: Path) -> Iterator[Row]:
  try:
    import pyarrow.parquet as parquet
  except ImportError:
    raise ValueError(
      f"{file}: parquet files need the package pyarrow; install it, or give "
      "the data as .jsonl"
    ) from None
  for batch in parquet.ParquetFile(file).iter_batches():
    yield from batch.to_pylist()
