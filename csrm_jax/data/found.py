"""What a runner makes of the rows before the files of a folder are written."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax.data import balance
from csrm_jax.data.contract import Key, Row
from csrm_jax.data.families import Bucket
from csrm_jax.data.pieces import Recipe, is_heldout
from csrm_jax.data.sources import AUGMENTED
from csrm_jax.data.spill import Sorter


class Records(NamedTuple):
  """A packed bucket: its place in the order of the records, and their file."""

  stage: int
  bucket: int
  path: str
  sums: Bucket


class Found(NamedTuple):
  """All that the files of a prepared folder are made from.

  Attributes:
    counts: for the manifest.
    facts: of augmented rows, sums of `balance.facts_of`.
    heldout: (key, line) of rows kept from training.
    bad: (key, line) of rows put aside.
    families: ("heldout" | "augmented", split, family), repeated.
    digests: (split, hash) of augmented rows.
    records: packed buckets, in any order.
  """

  counts: dict[str, int]
  facts: Counter[balance.Fact]
  heldout: Sorter
  bad: Sorter
  families: Sorter
  digests: Sorter
  records: list[Records]


def empty(work: Path) -> Found:
  """Nothing yet; what does not fit in memory goes to the folder `work`."""
  return Found(
    counts={},
    facts=Counter(),
    heldout=Sorter(work / "heldout"),
    bad=Sorter(work / "bad"),
    families=Sorter(work / "families"),
    digests=Sorter(work / "digests"),
    records=[],
  )


def sift(
  recipe: Recipe, key: Key, row: Row
) -> Iterator[tuple[str, tuple[Any, ...]]]:
  """What the manifest and `heldout.jsonl` take of a row: (field, item).

  A row that yields no "heldout" is for training.
  """
  family = row["family"]
  held = is_heldout(family, seed=recipe.seed, share=recipe.heldout)
  split = "heldout" if held else "train"
  if row["source"] in AUGMENTED:
    for fact in balance.facts_of(row):
      yield "facts", fact
    yield "families", ("augmented", split, family)
    yield "digests", (split, balance.digest(row).hex())
  if held:
    yield "heldout", (key, line(row))
    yield "families", ("heldout", split, family)


def put(found: Found, field: str, item: tuple[Any, ...]) -> None:
  """Adds an item of `sift` to what was found."""
  if field == "facts":
    found.facts[item] += 1
  else:
    text = item[-1]
    getattr(found, field).add(item, len(text))


def put_aside(found: Found, key: Key, row: Any, reason: str) -> None:
  """Keeps a bad row with its reason."""
  put(found, "bad", (key, line({"reason": reason, "row": row})))


def line(row: Any) -> str:
  """A row as a line of JSON without its end."""
  text = json.dumps(row, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:  # half of a surrogate pair, in a bad row
    return json.dumps(row)
  return text


def unique(items: Iterator[Any]) -> Iterator[Any]:
  """Each of the items that come in order once."""
  return (item for item, _ in itertools.groupby(items))
