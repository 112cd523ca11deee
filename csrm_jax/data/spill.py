"""Sorting more than fits in memory: sorted runs on disk, merged when read."""

import hashlib
import heapq
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MEMORY = 32 << 20  # bytes of items held before they go to disk
_BLOCK = 32 << 10  # bytes that are written and read at once
_MOST_RUNS = 64  # files merged at once; more are merged in turns


class Sorter:
  """Takes items in any order, gives them in theirs, as often as asked.

  Items are tuples whose first fields tell any two apart, so that the fields
  behind need no order. Memory holds `memory` bytes and a block of each run.
  """

  def __init__(self, folder: str | Path, memory: int = MEMORY) -> None:
    """Args: folder: new, of this sorter alone; memory: bytes."""
    self.folder = Path(folder)
    self.memory = memory
    self.held: list[tuple[int, Any]] = []
    self.size = 0
    self.runs: list[Path] = []
    self.written = 0

  def add(self, item: tuple, size: int = 100) -> None:
    """Takes an item that occupies about `size` bytes."""
    self.held.append((size, item))
    self.size += size + 100  # of the tuples and the list around it
    if self.size > self.memory:
      self._write(sorted(self.held, key=_item))
      self.held, self.size = [], 0

  def __iter__(self) -> Iterator[Any]:
    while len(self.runs) > _MOST_RUNS:
      first, self.runs = self.runs[:_MOST_RUNS], self.runs[_MOST_RUNS:]
      merged = heapq.merge(*map(_read, first), key=_item)
      self._write(merged)
      for path in first:
        path.unlink()
    self.held.sort(key=_item)
    runs = [*map(_read, self.runs), iter(self.held)]
    for _, item in heapq.merge(*runs, key=_item):
      yield item

  def _write(self, items: Iterable[tuple[int, Any]]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / f"run-{self.written:06d}"
    self.written += 1
    with path.open("wb") as out:
      block, size = [], 0
      for item in items:
        block.append(item)
        size += item[0]
        if size > _BLOCK:
          pickle.dump(block, out, pickle.HIGHEST_PROTOCOL)
          block, size = [], 0
      pickle.dump(block, out, pickle.HIGHEST_PROTOCOL)
    self.runs.append(path)


def _item(sized: tuple[int, Any]) -> Any:
  return sized[1]


def _read(path: Path) -> Iterator[tuple[int, Any]]:
  for block in pickles(path):
    yield from block


def pickles(path: Path) -> Iterator[Any]:
  """The objects pickled one after the other into a file of ours."""
  with path.open("rb") as file:
    while True:
      try:
        found = pickle.load(file)
      except EOFError:
        return
      yield found


def place(name: str) -> int:
  """Where a name stands among all: 64 bits of its hash, the same everywhere."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def bucket(at: int, number: int) -> int:
  """Which of `number` buckets holds place `at`; a bucket is a range of them."""
  return at * number >> 64
