"""Thins augmented rows until no operator tells the label, and describes them.

Source: ours. Without `borrow` and these bounds, an inserted rule would predict
a violation and an omitted one compliance, whatever the response says.
"""

import array
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.data.contract import kind_of
from csrm_jax.data.operators import INSERTING, ONE_SIDED, OPERATORS
from csrm_jax.data.spill import place
from csrm_jax.spec import Spec

Row = dict[str, Any]

BAND = (0.35, 0.65)  # share of violations after an operator
INSERTED = (0.4, 0.6)  # the same where a rule was inserted
UNEDITED = (0.3, 0.4)  # share of label rows under first specs
EMPTY = 0.02  # most label rows under the spec without rules
LEAST = 20  # rows; the share of fewer says nothing, they are left alone


class Sort(NamedTuple):
  """What balancing needs to know of a label row, its id aside."""

  chain: tuple[str, ...]  # operators that made it; () for a first spec
  label: int
  empty: bool  # its spec has no rules


# Hashes of the ids of label rows, by sort; in a sort the lowest go first. Eight
# bytes a row are all that is kept, and parts add up.
Tally = dict[Sort, array.array]
# Of each sort the least hash that stays.
Cuts = dict[Sort, int]


class _Bound(NamedTuple):
  """The rows under one bound, those it counts, and the bound."""

  name: str
  member: Callable[[Sort], bool]
  counted: Callable[[Sort], bool]
  low: float
  high: float


def chain(row: Mapping[str, Any]) -> tuple[str, ...]:
  """The operators that made a label row of `augment`; () for a first spec.

  Raises:
    ValueError: the row is not a label row of `augment`.
  """
  _, mark, tail = row["id"].rpartition("#")
  ops = tuple(tail.split("+"))
  if mark and ops == ("base",):
    return ()
  if not mark or not set(ops) <= set(OPERATORS):
    raise ValueError(
      f"row {row['id']!r}: field 'id': does not end in #base or #OPERATOR; "
      "balance what data/augment.py makes, before other rows are added"
    )
  return ops


def _is_violation(sort: Sort) -> bool:
  return sort.label == 0


def _bounds(unedited: tuple[float, float]) -> Iterator[_Bound]:
  for op in sorted(set(OPERATORS) - set(ONE_SIDED)):
    low, high = INSERTED if op in INSERTING else BAND
    yield _Bound(op, lambda x, op=op: op in x.chain, _is_violation, low, high)
  yield _Bound(
    "inserted",
    lambda x: not set(INSERTING).isdisjoint(x.chain),
    _is_violation,
    *INSERTED,
  )
  yield _Bound("unedited", lambda x: True, lambda x: not x.chain, *unedited)
  yield _Bound("empty", lambda x: True, lambda x: x.empty, 0.0, EMPTY)


def balance(
  rows: Iterable[Row],
  *,
  least: int = LEAST,
  unedited: tuple[float, float] = UNEDITED,
) -> tuple[list[Row], dict[str, int]]:
  """Drops label rows until every bound holds, by rank of a hash of their ids.

  Bounds are on the share of violations per operator that meets both labels
  (`BAND`; `INSERTED` if it inserts a rule, and for all that do together), on
  first specs (`UNEDITED`) and on specs without rules (`EMPTY`). A row counts
  for each operator in its chain. The first pass counts and decides, the second
  drops. A row whose base went loses its `base`. Pairs stay.

  Args:
    rows: of `augment`, in any order.
    least: rows; an operator with fewer is left alone.
    unedited: bounds on the share of first specs. Few operators, or none, make
      few edits: then the upper one must give way.

  Returns:
    The rows that stay, in their order, and the counts of those thinned, by
    bound.

  Raises:
    ValueError: a label row that is not of `augment`, or an id used twice.
  """
  rows = list(rows)
  cuts, counts = decide(tally(rows), least=least, unedited=unedited)
  kept, lost = thin(rows, cuts)
  return kept, counts | lost


def tally(rows: Iterable[Row]) -> Tally:
  """The first pass, over some of the rows.

  Raises:
    ValueError: a label row that is not of `augment`, or an id used twice.
  """
  found: Tally = {}
  seen: set[str] = set()
  for row in rows:
    if kind_of(row) != "label":
      continue
    if row["id"] in seen:
      raise ValueError(
        f"row {row['id']!r}: field 'id': is used twice; make ids unique"
      )
    seen.add(row["id"])
    ranks = found.setdefault(_sort(row), array.array("Q"))
    ranks.append(place(row["id"]))
  return found


def add(found: Tally, more: Tally) -> None:
  """Adds a tally to another."""
  for sort, ranks in more.items():
    found.setdefault(sort, array.array("Q")).extend(ranks)


def decide(
  found: Tally,
  *,
  least: int = LEAST,
  unedited: tuple[float, float] = UNEDITED,
) -> tuple[Cuts, dict[str, int]]:
  """Where each sort of row is cut, and how many rows go for which bound.

  Args:
    found: of all rows.
    least: see `balance`.
    unedited: see `balance`.
  """
  ranks = {
    sort: np.sort(np.frombuffer(found[sort], np.uint64))
    for sort in sorted(found)
  }
  gone = dict.fromkeys(ranks, 0)
  counts: dict[str, int] = {}
  active = []
  for bound in _bounds(unedited):
    size = sum(len(r) for sort, r in ranks.items() if bound.member(sort))
    if size >= least:
      active.append(bound)
    elif size:
      counts[f"too_few_{bound.name}"] = size
  counts |= {f"thinned_{bound.name}": 0 for bound in active}
  thinning = True
  while thinning:
    thinning = False
    for bound in active:
      number, side = _surplus(bound, ranks, gone)
      if number:
        _take(number, side, bound, ranks, gone)
        counts[f"thinned_{bound.name}"] += number
        thinning = True
        break  # which may have moved the shares of the bounds before
  cuts = {
    sort: int(r[gone[sort]]) if gone[sort] < len(r) else 2**64
    for sort, r in ranks.items()
    if gone[sort]
  }
  return cuts, {f"balance_{k}": n for k, n in counts.items()}


def thin(rows: Iterable[Row], cuts: Cuts) -> tuple[list[Row], dict[str, int]]:
  """The second pass, over rows that hold the bases of all among them."""
  rows = list(rows)
  kept = {
    row["id"]
    for row in rows
    if kind_of(row) == "label" and place(row["id"]) >= cuts.get(_sort(row), 0)
  }
  out, lost = [], 0
  for row in rows:
    if kind_of(row) == "label":
      if row["id"] not in kept:
        continue
      if "base" in row and row["base"] not in kept:
        row = {k: v for k, v in row.items() if k != "base"}
        lost += 1
    out.append(row)
  return out, {"balance_bases_lost": lost}


def _sort(row: Row) -> Sort:
  return Sort(chain(row), int(row["label"]), _is_empty(row["spec"]))


def _is_empty(spec: Any) -> bool:
  parsed = Spec.parse(spec)
  return not parsed.rules and not parsed.text


def _surplus(
  bound: _Bound, ranks: Mapping[Sort, np.ndarray], gone: Mapping[Sort, int]
) -> tuple[int, list[Sort]]:
  """The fewest rows whose removal puts the bound's share into its band.

  Returns how many, and the sorts that they are taken from.
  """
  yes = [s for s in ranks if bound.member(s) and bound.counted(s)]
  no = [s for s in ranks if bound.member(s) and not bound.counted(s)]
  n = sum(len(ranks[s]) - gone[s] for s in yes)
  total = n + sum(len(ranks[s]) - gone[s] for s in no)
  slack = 1e-9  # of rounding: 0.4 * 5 must count as 2
  if n > bound.high * total + slack:
    # Smallest k with (n - k) <= high (total - k).
    k = math.ceil((n - bound.high * total) / (1 - bound.high) - slack)
    return k, yes
  if n < bound.low * total - slack:
    k = math.ceil((bound.low * total - n) / bound.low - slack)
    return k, no
  return 0, []


def _take(
  number: int,
  side: Sequence[Sort],
  bound: _Bound,
  ranks: Mapping[Sort, np.ndarray],
  gone: dict[Sort, int],
) -> None:
  """Removes the `number` lowest ranks of some sorts."""
  groups = [list(side)]
  if bound.name == "inserted":
    # For many bounds at once, first those that only one bound holds.
    one_sided = [s for s in side if not set(ONE_SIDED).isdisjoint(s.chain)]
    groups = [one_sided, [s for s in side if s not in one_sided]]
  for sorts in groups:
    left = [ranks[s][gone[s] :] for s in sorts]
    size = sum(map(len, left))
    k = min(number, size)
    number -= k
    if k == size:
      gone.update({s: len(ranks[s]) for s in sorts})
    elif k:
      last = np.partition(np.concatenate(left), k - 1)[k - 1]
      for s in sorts:
        ends = int(np.searchsorted(ranks[s], last, side="right"))
        gone[s] = max(gone[s], ends)


def manifest(
  rows: Iterable[Row],
  *,
  split: Callable[[str], str] = lambda family: "train",
) -> dict[str, Any]:
  """What rows of `augment` consist of; equal for any order of the rows.

  Args:
    rows: balanced or not.
    split: name of the split that a family belongs to.

  Returns:
    `rows` by kind; `operators`: rows and share of violations by operator in
    their chain ("inserted": by any that inserts a rule, "base": first specs);
    `edits`: the same by last operator; `unedited` and `empty`: shares of the
    label rows; `families` and `hashes` (sha256 of the sorted rows) by split.
  """
  facts: Counter[Fact] = Counter()
  families: set[tuple[str, str]] = set()
  digests: list[tuple[str, str]] = []
  for row in rows:
    part = split(row["family"])
    facts.update(facts_of(row))
    families.add((part, row["family"]))
    digests.append((part, digest(row).hex()))
  splits = Counter(part for part, _ in families)
  return described(facts, splits, sorted(digests))


Fact = tuple[str, ...]  # a table of the manifest, and a name in it


def facts_of(row: Row) -> list[Fact]:
  """What a row adds to the counts of the manifest, one each."""
  kind = kind_of(row)
  found: list[Fact] = [("rows", row["kind"] if kind == "pair" else kind)]
  if kind != "label":
    return found
  ops = chain(row) or ("base",)
  inserted = [] if set(INSERTING).isdisjoint(ops) else ["inserted"]
  for table, names in (
    ("operators", {*ops, *inserted}),
    ("edits", set(ops[-1:])),
  ):
    found += [(table, name) for name in names]
    if row["label"] == 0:
      found += [(table, name, "violating") for name in names]
  return [*found, ("empty",)] if _is_empty(row["spec"]) else found


def digest(row: Row) -> bytes:
  """The hash of a row, 32 bytes."""
  plain = json.dumps(row, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(plain.encode()).digest()


def described(
  facts: Mapping[Fact, int],
  families: Mapping[str, int],
  digests: Iterable[tuple[str, str]],
) -> dict[str, Any]:
  """The manifest out of its parts.

  Args:
    facts: sums of `facts_of`.
    families: number of families by split.
    digests: (split, `digest` in hexadecimal), in order.
  """
  hashes: dict[str, Any] = {}
  for part, one in digests:
    hashes.setdefault(part, hashlib.sha256()).update(bytes.fromhex(one))
  labels = max(facts.get(("rows", "label"), 0), 1)
  tables = {
    table: {
      name[1]: {
        "rows": n,
        "violating": facts.get((*name, "violating"), 0) / n,
      }
      for name, n in sorted(facts.items())
      if name[0] == table and len(name) == 2
    }
    for table in ("operators", "edits")
  }
  return {
    "rows": {f[1]: n for f, n in sorted(facts.items()) if f[0] == "rows"},
    **tables,
    "unedited": facts.get(("edits", "base"), 0) / labels,
    "empty": facts.get(("empty",), 0) / labels,
    "families": dict(sorted(families.items())),
    "hashes": {k: "sha256:" + v.hexdigest() for k, v in sorted(hashes.items())},
  }
