"""Rows under the specs of other rows: what a model learns without its spec."""

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

from csrm_jax.data.contract import Row, family_of

Slot = tuple[str, str]  # (family, spec as JSON)


def shuffle_specs(
  rows: Iterable[Row], *, seed: int, counts: dict[str, int]
) -> list[Row]:
  """The same rows, their specs permuted across families; labels stay.

  What is permuted are the slots (family, spec): rows of a family that share a
  spec share the wrong one too, and different ones stay different. So rows
  pack into as many tokens as before, and a token budget buys as many labels.
  Where a text stands under which foreign spec says nothing about its label.

  Args:
    rows: of the contract; those without a spec (help pairs) stay as they are.
    seed: same seed and rows, same specs.
    counts: receives shuffled_specs, the slots that got another family's spec,
      and unshuffled_specs, those for which none other was left.

  Raises:
    ValueError: the rows have fewer than two different specs.
  """
  rows = list(rows)
  slots: dict[Slot, None] = {}
  for row in rows:
    name = _family(row)
    slots |= {(name, _key(holder[at])): None for holder, at in _places(row)}
  if len({spec for _, spec in slots}) < 2:
    raise ValueError(
      "--config.data.shuffle_specs=True: the rows share a single spec, so "
      "there is none to exchange it for; give more data or switch it off"
    )
  other = _permuted(list(slots), random.Random(f"shuffle_specs:{seed}"))
  kept = sum(slot[1] == spec for slot, spec in other.items())
  counts["shuffled_specs"] = len(slots) - kept
  counts["unshuffled_specs"] = kept
  return [_exchanged(row, other) for row in rows]


def _permuted(slots: list[Slot], rng: random.Random) -> dict[Slot, str]:
  """A spec for each slot, foreign to its family and new to it if possible.

  A random permutation, mended by swaps with random partners.
  """
  given = [spec for _, spec in slots]
  rng.shuffle(given)
  own: dict[str, set[str]] = {}
  got: dict[str, list[str]] = {}
  for (family, spec), new in zip(slots, given, strict=True):
    own.setdefault(family, set()).add(spec)
    got.setdefault(family, []).append(new)

  def fits(family: str, spec: str, instead: str) -> bool:
    rest = list(got[family])
    rest.remove(instead)
    return spec not in own[family] and spec not in rest

  for i, (family, _) in enumerate(slots):
    if fits(family, given[i], given[i]):
      continue
    for j in rng.sample(range(len(slots)), min(len(slots), 200)):
      other, mine, theirs = slots[j][0], given[i], given[j]
      if (
        other != family
        and fits(family, theirs, mine)
        and fits(other, mine, theirs)
      ):
        for name, old, new in ((family, mine, theirs), (other, theirs, mine)):
          got[name].remove(old)
          got[name].append(new)
        given[i], given[j] = theirs, mine
        break
  return dict(zip(slots, given, strict=True))


def _family(row: Row) -> str:
  return row.get("family") or family_of(row)


def _key(spec: Any) -> str:
  return json.dumps(spec, sort_keys=True, ensure_ascii=False)


def _places(row: Row) -> Iterator[tuple[Any, str]]:
  """Every (object, key) in a row that holds a spec."""
  for holder in (row, *row.get("ladder", ())):
    for at in ("spec", "chosen_spec", "rejected_spec"):
      if holder.get(at) is not None:
        yield holder, at


def _exchanged(row: Row, other: dict[Slot, str]) -> Row:
  name = _family(row)
  row = dict(row)
  if "ladder" in row:
    row["ladder"] = [dict(rung) for rung in row["ladder"]]
  for holder, at in _places(row):
    holder[at] = json.loads(other[name, _key(holder[at])])
  return row
