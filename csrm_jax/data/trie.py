"""Packs tokenised families into rows of token tries: prefixes stored once.

Segments that begin with the same tokens share them, also across families, so a
spec or a prompt costs its tokens once per row. A row lists the nodes of its
tries in depth-first order; `Batch.subtree_end` is then the whole mask.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool

from csrm_jax.types import PAIR_KINDS, Batch, Example, Pair, Segment

# Rows kept open while packing. More find better neighbours for an example but
# cost a prefix look-up each.
_OPEN_ROWS = 8
COUNTS = (
  "tokens_alone",
  "split_families",
  "repeated_prefix_tokens",
  "tokens_in_tries",
  "padding",
)


class Packed(NamedTuple):
  """Rows and where each readout came from.

  Attributes:
    batch: NumPy arrays, one leading row axis.
    where: for every row, the (example index, segment index) of each used slot.
    counts: tokens_in_tries, tokens_alone (had each segment been stored by
      itself), padding, split_families, repeated_prefix_tokens.
  """

  batch: Batch
  where: list[list[tuple[int, int]]]
  counts: dict[str, int]


class _Row:
  """A row being filled: a forest as nested dicts, its slots and its pairs."""

  def __init__(self) -> None:
    self.forest: dict[int, dict] = {}
    self.size = 0
    self.slots: list[tuple[int, int, Segment]] = []
    self.pairs: list[tuple[int, int, Pair]] = []

  def shared(self, tokens: Sequence[int]) -> int:
    """Length of the prefix of `tokens` that the row already holds."""
    node, depth = self.forest, 0
    for token in tokens:
      child = node.get(token)
      if child is None:
        break
      node, depth = child, depth + 1
    return depth

  def add(self, index: int, example: Example, numbers: Sequence[int]) -> None:
    first = len(self.slots)
    for number, segment in zip(numbers, example.segments, strict=True):
      self.slots.append((index, number, segment))
      self.size += _insert(self.forest, segment.tokens)
    for pair in example.pairs:
      self.pairs.append((first + pair.win, first + pair.lose, pair))


def _insert(forest: dict[int, dict], tokens: Iterable[int]) -> int:
  """Adds one sequence; returns how many nodes were new."""
  new = 0
  for token in tokens:
    child = forest.get(token)
    if child is None:
      child = forest[token] = {}
      new += 1
    forest = child
  return new


def _trie_size(segments: Iterable[Segment]) -> int:
  forest: dict[int, dict] = {}
  return sum(_insert(forest, s.tokens) for s in segments)


def pack(
  examples: Sequence[Example], *, row_length: int, slots: int, pairs: int
) -> Packed:
  """Packs families into rows of `row_length` tokens.

  Families are taken in the order of their first tokens, so those under one
  spec meet in one row. A family that exceeds a row is split by pairs; the
  prefix that its parts share is stored again and counted.

  Args:
    examples: families; every segment has at least one token.
    row_length: tokens in a row.
    slots: readouts in a row.
    pairs: pairs in a row.

  Returns:
    The rows, in packing order (the loader shuffles), and their provenance.

  Raises:
    ValueError: a segment, or the two segments of one pair, exceed a row.
  """
  counts: dict[str, int] = {}
  order = sorted(
    range(len(examples)), key=lambda i: (first_tokens(examples[i]), i)
  )
  rows = list(
    pack_ordered(
      ((i, examples[i]) for i in order),
      row_length=row_length,
      slots=slots,
      pairs=pairs,
      counts=counts,
    )
  )
  leaves: list[Any] = [
    np.stack(x) for x in zip(*(r for r, _ in rows), strict=True)
  ]
  return Packed(Batch(*leaves), [where for _, where in rows], counts)


def pack_ordered(
  examples: Iterable[tuple[int, Example]],
  *,
  row_length: int,
  slots: int,
  pairs: int,
  counts: dict[str, int],
) -> Iterator[tuple[Batch, list[tuple[int, int]]]]:
  """As `pack`, of families that come in their order and rows given when full.

  Args:
    examples: (index, family), ordered by (`first_tokens`, index).
    row_length: tokens in a row.
    slots: readouts in a row.
    pairs: pairs in a row.
    counts: those of `Packed` are added to it.

  Returns:
    Rows (without the row axis), each with its provenance.

  Raises:
    ValueError: a segment, or the two segments of one pair, exceed a row.
  """
  for name in COUNTS:
    counts.setdefault(name, 0)
  limits = (row_length, slots, pairs)

  def closed(row: _Row) -> tuple[Batch, list[tuple[int, int]]]:
    counts["tokens_in_tries"] += row.size
    counts["padding"] += row_length - row.size
    return _arrays(row, *limits), [(i, n) for i, n, _ in row.slots]

  rows: list[_Row] = []
  for index, example in examples:
    counts["tokens_alone"] += sum(len(s.tokens) for s in example.segments)
    parts = list(_split(example, limits))
    if len(parts) > 1:
      counts["split_families"] += 1
      counts["repeated_prefix_tokens"] += sum(
        _trie_size(part.segments) for part, _ in parts
      ) - _trie_size(example.segments)
    for part, numbers in parts:
      row = _best_row(rows, part, limits)
      if row is None:
        if len(rows) == _OPEN_ROWS:
          fullest = max(rows, key=lambda r: r.size)
          rows.remove(fullest)
          yield closed(fullest)
        row = _Row()
        rows.append(row)
      row.add(index, part, numbers)
  for row in rows:
    yield closed(row)


def first_tokens(example: Example) -> tuple[int, ...]:
  """The least of the sequences: neighbours in their order share prefixes."""
  return min(s.tokens for s in example.segments)


def _best_row(rows: list[_Row], example: Example, limits) -> _Row | None:
  """The open row that shares most tokens with the example and has room."""
  row_length, slots, pairs = limits
  best, best_cost = None, row_length + 1
  size = None
  for row in rows:
    if len(row.slots) + len(example.segments) > slots:
      continue
    if len(row.pairs) + len(example.pairs) > pairs:
      continue
    # The example's segments share among themselves what `size` says, and
    # with the row at most the longest prefix any of them finds there.
    if size is None:
      size = _trie_size(example.segments)
    cost = _added(row, example, size)
    if row.size + cost <= row_length and cost < best_cost:
      best, best_cost = row, cost
  return best


def _added(row: _Row, example: Example, size: int) -> int:
  """New nodes that `example` would bring to `row`."""
  prefixes = {s.tokens[: row.shared(s.tokens)] for s in example.segments} - {()}
  held: dict[int, dict] = {}
  return size - sum(_insert(held, p) for p in prefixes)


def _split(
  example: Example, limits: tuple[int, int, int]
) -> Iterator[tuple[Example, list[int]]]:
  """Parts of a family that each fit a row, with their segment numbers."""
  row_length, slots, pairs = limits
  everything = list(range(len(example.segments)))
  if (
    _trie_size(example.segments) <= row_length
    and len(example.segments) <= slots
    and len(example.pairs) <= pairs
  ):
    yield example, everything
    return
  by_tokens = sorted(
    example.pairs, key=lambda p: example.segments[p.lose].tokens
  )
  paired = {n for p in example.pairs for n in (p.win, p.lose)}
  units: list[tuple[tuple[int, ...], Pair | None]] = [
    ((p.win, p.lose), p) for p in by_tokens
  ]
  units += [
    ((n,), None)
    for n in sorted(everything, key=lambda n: example.segments[n].tokens)
    if n not in paired
  ]
  labelled: set[int] = set()  # a label counts once, in its first part
  numbers: list[int] = []
  kept: list[Pair] = []

  def part() -> tuple[Example, list[int]]:
    segments = []
    for n in numbers:
      segment = example.segments[n]
      if n in labelled:
        segment = segment._replace(label=float("nan"))
      labelled.add(n)
      segments.append(segment)
    local = {n: i for i, n in enumerate(numbers)}
    moved = tuple(
      p._replace(win=local[p.win], lose=local[p.lose]) for p in kept
    )
    return Example(example.id, tuple(segments), moved), list(numbers)

  for members, pair in units:
    new = [n for n in dict.fromkeys(members) if n not in numbers]
    grown = [example.segments[n] for n in numbers + new]
    if (
      _trie_size(grown) > row_length
      or len(grown) > slots
      or len(kept) + (pair is not None) > pairs
    ):
      if numbers:
        yield part()
      numbers, kept = [], []
      new = list(dict.fromkeys(members))
      alone = _trie_size(example.segments[n] for n in new)
      if alone > row_length or len(new) > slots:
        raise ValueError(
          f"family {example.id!r}: {'a pair' if pair else 'a sequence'} needs "
          f"{alone} tokens and {len(new)} slots, a row has {row_length} and "
          f"{slots}; raise data.row_length or lower data.max_tokens"
        )
    numbers = numbers + new
    if pair is not None:
      kept = [*kept, pair]
  if numbers:
    yield part()


def _arrays(row: _Row, row_length: int, slots: int, pairs: int) -> Batch:
  """The arrays of one row, without the row axis."""
  tokens = np.zeros(row_length, np.int32)
  positions = np.zeros(row_length, np.int32)
  subtree_end = np.arange(1, row_length + 1, dtype=np.int32)
  index_of: dict[int, int] = {}  # id of a node's dict -> its row index
  # Depth-first without recursion: a node is entered, its children follow, and
  # the closing entry (token None) writes where its subtree ended.
  stack: list[tuple[int | None, dict, int]] = [
    (t, child, 0) for t, child in reversed(row.forest.items())
  ]
  at = 0
  while stack:
    token, node, depth = stack.pop()
    if token is None:
      subtree_end[index_of[id(node)]] = at
      continue
    tokens[at], positions[at] = token, depth
    index_of[id(node)] = at
    at += 1
    stack.append((None, node, depth))
    stack += [(t, child, depth + 1) for t, child in reversed(node.items())]

  readout = np.zeros(slots, np.int32)
  label = np.zeros(slots, np.float32)
  label_weight = np.zeros(slots, np.float32)
  for slot, (_, _, segment) in enumerate(row.slots):
    node = row.forest
    for token in segment.tokens:
      node = node[token]
    readout[slot] = index_of[id(node)]
    if not np.isnan(segment.label):
      label[slot] = segment.label
      label_weight[slot] = segment.weight
  pair = np.zeros((pairs, 2), np.int32)
  kind = np.zeros(pairs, np.int32)
  weight = np.zeros(pairs, np.float32)
  margin = np.zeros(pairs, np.float32)
  for i, (win, lose, p) in enumerate(row.pairs):
    pair[i] = win, lose
    kind[i] = PAIR_KINDS.index(p.kind)
    weight[i], margin[i] = p.weight, p.margin
  leaves: list[Any] = [
    tokens, positions, subtree_end, readout, label, label_weight,
    pair, kind, weight, margin,
  ]  # fmt: skip
  return Batch(*leaves)


def real_tokens(batch: Batch) -> Bool[Array | np.ndarray, "b l"]:
  """Mask [b l] of the tokens that are not padding.

  A real token has a parent or children; only a sequence of a single token
  would be taken for padding, and no template makes one.
  """
  at = np.arange(batch.tokens.shape[-1])
  real: Any = (batch.positions > 0) | (batch.subtree_end > at + 1)
  return real
