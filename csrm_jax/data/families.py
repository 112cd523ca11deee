"""Families of tokens, packed bucket by bucket into records.

What a bucket becomes depends on its rows in the order of their keys alone,
whoever brings them and in which order.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.data.contract import Key, Row
from csrm_jax.data.pieces import TOKEN, Encoded, Recipe, add
from csrm_jax.data.shuffle import shuffle_specs
from csrm_jax.data.trie import COUNTS, first_tokens, pack_ordered
from csrm_jax.types import Batch, Example, Pair, Segment

# Sequences of a bucket hold so many tokens, prefixes counted each time: some
# thousand families, packed in one process. Small data are one bucket.
BUCKET_TOKENS = 1 << 24
# Rows whose specs are shuffled among themselves.
BUCKET_ROWS = 1 << 16


class Bucket(NamedTuple):
  """What became of a bucket of families, its records aside."""

  counts: dict[str, int]
  families: int
  rows: int
  label: float  # weighted sum over readouts
  weight: float


def family_of(name: str, rows: Iterable[Encoded]) -> Example:
  """Joins the rows of a family; equal sequences become one segment."""
  segments: list[Segment] = []
  pairs: list[Pair] = []
  index: dict[bytes, int] = {}

  def put(tokens: bytes, label: float = float("nan"), weight=1.0) -> int:
    at = index.get(tokens)
    if at is not None and np.isnan(label):
      return at
    segment = Segment(_ints(tokens), label, weight)
    if at is None:
      at = index[tokens] = len(segments)
      segments.append(segment)
    elif np.isnan(segments[at].label):
      segments[at] = segment
    else:  # judged twice: both judgements count, on the same tokens
      segments.append(segment)
    return at

  for row in rows:
    if row.kind == "label":
      put(row.tokens[0], row.label, row.weight)
      continue
    at = [put(tokens) for tokens in row.tokens]
    if row.kind == "severity":  # most severe first; a ladder counts once
      rungs = len(at)
      share = row.weight * 2 / (rungs * (rungs - 1))
      pairs += [
        Pair(at[j], at[i], "severity", row.margin, share)
        for i in range(rungs)
        for j in range(i + 1, rungs)
      ]
    else:
      pairs.append(Pair(at[0], at[1], row.kind, row.margin, row.weight))
  return Example(name, tuple(segments), tuple(pairs))


def _ints(tokens: bytes) -> tuple[int, ...]:
  return tuple(np.frombuffer(tokens, TOKEN).tolist())


# -- Buckets --------------------------------------------------------------


def buckets(amount: int, target: int) -> int:
  """How many buckets an amount fills, of rows or tokens; at least one."""
  return max(1, -(-amount // target))


def shuffle_bucket(
  recipe: Recipe, rows: list[tuple[Key, Row]]
) -> tuple[list[tuple[Key, Row]], dict[str, int]]:
  """The rows of a bucket under the specs of each other; see `shuffle_specs`."""
  rows = sorted(rows, key=lambda keyed: keyed[0])
  counts: dict[str, int] = {}
  made = shuffle_specs((r for _, r in rows), seed=recipe.seed, counts=counts)
  keys = [key for key, _ in rows]
  return list(zip(keys, made, strict=True)), counts


def pack_bucket(
  recipe: Recipe,
  families: Iterable[tuple[str, list[tuple[Key, bytes]]]],
  write: Callable[[bytes], Any],
) -> Bucket:
  """Packs families into records.

  Args:
    recipe: its shape.
    families: name and (key, `Piece.encoded`) of each row, in any order.
    write: takes the records, one after the other.

  Raises:
    ValueError: a sequence, or the two of one pair, exceed a row.
  """
  # Compact until its turn: as tuples of integers tokens take ten times more.
  waiting: list[tuple[bytes, Key, bytes]] = []
  for name, rows in families:
    rows = sorted(rows)
    encoded = [Encoded(*pickle.loads(blob)) for _, blob in rows]
    example = family_of(name, encoded)
    first = np.array(first_tokens(example), TOKEN).tobytes()
    waiting.append((first, rows[0][0], _compact(example)))
  waiting.sort(key=lambda one: one[:2])
  counts: dict[str, int] = {}
  ordered = ((i, _expanded(blob)) for i, (_, _, blob) in enumerate(waiting))
  number, label, weight = 0, 0.0, 0.0
  dtype = row_dtype(**recipe.shape)
  record = np.zeros((), dtype)
  for row, _ in pack_ordered(ordered, **recipe.shape, counts=counts):
    for name, leaf in zip(Batch._fields, row, strict=True):
      record[name] = leaf
    write(record.tobytes())
    number += 1
    weights = np.asarray(row.label_weight, np.float64)
    weight += float(weights.sum())
    label += float((weights * np.asarray(row.label)).sum())
  return Bucket(counts, len(waiting), number, label, weight)


def _compact(example: Example) -> bytes:
  segments = [
    (np.array(s.tokens, np.int32).tobytes(), s.label, s.weight)
    for s in example.segments
  ]
  pairs = [tuple(p) for p in example.pairs]
  return pickle.dumps((example.id, segments, pairs), pickle.HIGHEST_PROTOCOL)


def _expanded(blob: bytes) -> Example:
  name, segments, pairs = pickle.loads(blob)
  return Example(
    name,
    tuple(
      Segment(tuple(np.frombuffer(t, np.int32).tolist()), label, weight)
      for t, label, weight in segments
    ),
    tuple(Pair(*p) for p in pairs),
  )


def merged(buckets: Iterable[Bucket]) -> Bucket:
  """The sum of all; of none, zeros."""
  total = Bucket(dict.fromkeys(COUNTS, 0), 0, 0, 0.0, 0.0)
  for one in buckets:
    add(total.counts, one.counts)
    total = Bucket(
      total.counts,
      total.families + one.families,
      total.rows + one.rows,
      total.label + one.label,
      total.weight + one.weight,
    )
  return total


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


def stage_buckets(
  taken: Mapping[str, tuple[int, int]], number: int, tokens: int
) -> list[int]:
  """Buckets of each of `number` stages and of the rest; `tokens`: of all."""
  sums = [0] * number
  for stage, n in taken.values():
    sums[stage] += n
  return [buckets(n, BUCKET_TOKENS) for n in (*sums, tokens - sum(sums))]
