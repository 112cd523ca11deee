"""Batch k of a training run: a pure function of (rows, seed, k, batch size)."""

import bisect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from csrm_jax.data.prepare import read_meta, row_dtype
from csrm_jax.types import Batch

Rows = Callable[[int], Batch]
RECORDS = "train.array_record"


def open_rows(folder: str | Path, *, seed: int) -> Rows:
  """Prepared rows without end: row i of a run as a function of i.

  The stages of `data.stages` come first, each once and shuffled in itself; the
  other rows follow in a new random order each epoch. A row is a `Batch` without
  the row axis (NumPy).

  Raises:
    ValueError: no prepared rows in `folder`, or fewer than the manifest says;
      the function does for a record that is damaged.
  """
  meta = read_meta(folder)
  path = Path(folder) / RECORDS
  remedy = f"the file was cut or changed: delete {folder} to prepare it again"
  try:
    source: Any = grain.sources.ArrayRecordDataSource(str(path))
    number = len(source)
  except Exception as error:  # ArrayRecord has its own for each damage
    raise ValueError(f"{path}: {error}; {remedy}") from error
  if number != meta["rows"]:
    raise ValueError(
      f"{path}: {number} rows, but meta.json says {meta['rows']}; {remedy}"
    )
  dtype = row_dtype(**meta["shape"])
  numbers = record_numbers(folder, seed=seed)

  def row(index: int) -> Batch:
    record = numbers(index)
    try:
      fields = np.frombuffer(source[record], dtype)[0]
    except Exception as error:
      raise ValueError(f"{path}: record {record}: {error}; {remedy}") from error
    return Batch(*(fields[name] for name in Batch._fields))

  return row


def record_numbers(folder: str | Path, *, seed: int) -> Callable[[int], int]:
  """Which record of the file is row i of a run, as a function of i."""
  meta = read_meta(folder)
  records = grain.MapDataset.range(meta["rows"])
  seed %= 2**32
  ends = list(itertools.accumulate(meta["stage_rows"], initial=0))
  stages: list[Any] = [
    records[start:end].shuffle(seed=seed)
    for start, end in itertools.pairwise(ends)
  ]
  rest: Any = records[ends[-1] :].shuffle(seed=seed).repeat()

  def number(index: int) -> int:
    if index < ends[-1]:
      stage = bisect.bisect_right(ends, index) - 1
      return int(stages[stage][index - ends[stage]])
    return int(rest[index - ends[-1]])

  return number


def batch_at(
  rows: Rows,
  step: int,
  *,
  batch_rows: int,
  sharding: NamedSharding | None = None,
) -> Batch:
  """Batch number `step`, each host reading only the rows it holds.

  Args:
    rows: of `open_rows`.
    step: number of the batch, from 0.
    batch_rows: rows over all hosts.
    sharding: of the row axis; None gives NumPy arrays of the whole batch.
  """
  first = step * batch_rows
  if sharding is None:
    picked = [rows(first + i) for i in range(batch_rows)]
    leaves: list[Any] = [np.stack(x) for x in zip(*picked, strict=True)]
    return Batch(*leaves)
  cache: dict[int, Batch] = {}

  def field(name: str, shape: tuple[int, ...]) -> jax.Array:
    def local(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_rows)
      for i in range(start, stop):
        if i not in cache:
          cache[i] = rows(first + i)
      block = np.stack([getattr(cache[i], name) for i in range(start, stop)])
      return block[(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, local)

  example = rows(first)
  return Batch(
    *(
      field(name, (batch_rows, *np.shape(getattr(example, name))))
      for name in Batch._fields
    )
  )
