"""Preparation on this machine: all cores, and memory that data do not fill."""

import itertools
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax.data import families, found, pieces, sources, spill, stages
from csrm_jax.data.contract import Key, Row
from csrm_jax.data.families import pack_bucket
from csrm_jax.data.found import Found, Records
from csrm_jax.data.pieces import Piece, Recipe
from csrm_jax.data.workers import Workers

CHUNK = 128  # rows that a process tokenises at once
FEW = 4096  # rows; so many are done sooner than processes start


class _File(NamedTuple):
  """A bucket of families, pickled one after the other."""

  stage: int
  bucket: int
  path: Path


def run(
  recipe: Recipe,
  reading: sources.Reading,
  parts: Iterable[sources.Part],
  wanted: list[stages.Stage],
  work: Path,
  *,
  shuffle: bool,
  workers: int,
) -> Found:
  """Reads, tokenises and packs; equal for any number of workers.

  Args:
    recipe: what decides the records.
    reading: how the parts are read.
    parts: of `sources.parts`.
    wanted: of `stages.parse_stages`.
    work: folder for all that does not fit in memory.
    shuffle: whether training rows exchange their specs.
    workers: processes.

  Raises:
    ValueError: a row is bad, or cannot be packed.
  """
  made = found.empty(work)
  rows = _training(recipe, reading, parts, work, made)
  if shuffle:
    rows = _shuffled(recipe, rows, work, made)
  sorted_pieces = spill.Sorter(work / "pieces")
  tokens = 0
  with Workers(recipe, workers) as pool:
    chunks = _chunks(rows, CHUNK)
    for chunk in pool.map(pieces.encode, chunks, FEW // CHUNK):
      for piece in chunk.pieces:
        sorted_pieces.add(piece, len(piece.encoded) + 300)
        tokens += piece.tokens
      for key, row, reason in chunk.bad:
        found.put_aside(made, key, row, reason)
        pieces.add(made.counts, {"quarantined": 1})
      pieces.add(made.counts, chunk.counts)
    taken = {}
    if wanted:
      together = pieces.by_family(sorted_pieces)
      candidates = (stages.candidate(*family) for family in together)
      taken = stages.staged(candidates, wanted)
    numbers = families.stage_buckets(taken, len(wanted), tokens)
    files = _files(sorted_pieces, taken, numbers, work)
    made.records.extend(pool.map(_packed, files, len(numbers)))
  return made


def _training(
  recipe: Recipe,
  reading: sources.Reading,
  parts: Iterable[sources.Part],
  work: Path,
  made: Found,
) -> Iterator[tuple[Key, Row]]:
  def bad(key: Key, row: Any, reason: str) -> None:
    found.put_aside(made, key, row, reason)

  for part in parts:
    for key, row in sources.read(
      part, reading, bad=bad, counts=made.counts, folder=work
    ):
      training = True
      for field, item in found.sift(recipe, key, row):
        found.put(made, field, item)
        training = training and field != "heldout"
      if training:
        yield key, row


def _shuffled(
  recipe: Recipe, rows: Iterable[tuple[Key, Row]], work: Path, made: Found
) -> Iterator[tuple[Key, Row]]:
  held = spill.Sorter(work / "shuffle")
  number = 0
  for key, row in rows:
    blob = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
    held.add((spill.place(row["family"]), key, blob), len(blob))
    number += 1
  buckets = families.buckets(number, families.BUCKET_ROWS)
  for _, together in itertools.groupby(
    held, key=lambda item: spill.bucket(item[0], buckets)
  ):
    bucket = [(key, pickle.loads(blob)) for _, key, blob in together]
    exchanged, counts = families.shuffle_bucket(recipe, bucket)
    pieces.add(made.counts, counts)
    yield from exchanged


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  """Lists of `size` items; those before a failure come before it."""
  chunk: list[Any] = []
  try:
    for item in items:
      chunk.append(item)
      if len(chunk) == size:
        yield chunk
        chunk = []
  except Exception:
    yield chunk
    raise
  if chunk:
    yield chunk


def _files(
  ordered: Iterable[Piece],
  taken: dict[str, tuple[int, int]],
  numbers: list[int],
  work: Path,
) -> Iterator[_File]:
  """Buckets as files: in each stage the families come bucket by bucket."""
  (work / "buckets").mkdir(parents=True)
  last = len(numbers) - 1
  writing: dict[int, tuple[_File, Any]] = {}
  for name, family in pieces.by_family(ordered):
    stage = taken[name][0] if name in taken else last
    bucket = spill.bucket(family[0].place, numbers[stage])
    if stage in writing and writing[stage][0].bucket != bucket:
      done, out = writing.pop(stage)
      out.close()
      yield done
    if stage not in writing:
      file = _File(stage, bucket, work / "buckets" / f"{stage}-{bucket}")
      writing[stage] = (file, file.path.open("wb"))
    rows = [(piece.key, piece.encoded) for piece in family]
    pickle.dump((name, rows), writing[stage][1], pickle.HIGHEST_PROTOCOL)
  for done, out in writing.values():
    out.close()
    yield done


def _packed(recipe: Recipe, file: _File) -> Records:
  path = file.path.with_name(f"{file.path.name}.records")
  with path.open("wb") as out:
    sums = pack_bucket(recipe, spill.pickles(file.path), out.write)
  file.path.unlink()
  return Records(file.stage, file.bucket, str(path), sums)
