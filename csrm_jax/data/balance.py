"""Thins augmented rows until no operator tells the label, and describes them.

Source: ours. Without `borrow` and these bounds, an inserted rule would predict
a violation and an omitted one compliance, whatever the response says.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from csrm_jax.data.contract import kind_of
from csrm_jax.data.operators import INSERTING, ONE_SIDED, OPERATORS
from csrm_jax.spec import Spec

Row = dict[str, Any]

BAND = (0.35, 0.65)  # share of violations after an operator
INSERTED = (0.4, 0.6)  # the same where a rule was inserted
UNEDITED = (0.3, 0.4)  # share of label rows under first specs
EMPTY = 0.02  # most label rows under the spec without rules
LEAST = 20  # rows; the share of fewer says nothing, they are left alone


class _Label(NamedTuple):
  """What balancing needs to know of a label row."""

  chain: tuple[str, ...]  # operators that made it; () for a first spec
  label: int
  rank: bytes  # hash of its id; the lowest go first
  empty: bool


class _Bound(NamedTuple):
  """The rows under one bound, those it counts, and the bound."""

  name: str
  member: Callable[[_Label], bool]
  counted: Callable[[_Label], bool]
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


def _is_violation(label: _Label) -> bool:
  return label.label == 0


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
  labels: dict[str, _Label] = {}
  for row in rows:
    if kind_of(row) == "label":
      if row["id"] in labels:
        raise ValueError(
          f"row {row['id']!r}: field 'id': is used twice; make ids unique"
        )
      labels[row["id"]] = _Label(
        chain(row),
        int(row["label"]),
        hashlib.sha256(row["id"].encode()).digest(),
        _is_empty(row["spec"]),
      )
  kept, counts = _thinned(labels, least, unedited)
  out = []
  counts["bases_lost"] = 0
  for row in rows:
    if row["id"] in labels and kind_of(row) == "label":
      if row["id"] not in kept:
        continue
      if "base" in row and row["base"] not in kept:
        row = {k: v for k, v in row.items() if k != "base"}
        counts["bases_lost"] += 1
    out.append(row)
  return out, {f"balance_{k}": n for k, n in counts.items()}


def _is_empty(spec: Any) -> bool:
  return not Spec.parse(spec).rules and not Spec.parse(spec).text


def _thinned(
  labels: dict[str, _Label], least: int, unedited: tuple[float, float]
) -> tuple[set[str], dict[str, int]]:
  """Ids that stay, and how many went for which bound."""
  kept = set(labels)
  counts: dict[str, int] = {}
  active = []
  for bound in _bounds(unedited):
    size = sum(map(bound.member, labels.values()))
    if size >= least:
      active.append(bound)
    elif size:
      counts[f"too_few_{bound.name}"] = size
  counts |= {f"thinned_{bound.name}": 0 for bound in active}
  while True:
    for bound in active:
      gone = _surplus(bound, {i: labels[i] for i in kept})
      if gone:
        kept -= gone
        counts[f"thinned_{bound.name}"] += len(gone)
        break  # which may have moved the shares of the bounds before
    else:
      return kept, counts


def _surplus(bound: _Bound, labels: Mapping[str, _Label]) -> set[str]:
  """The fewest ids whose removal puts the bound's share into its band."""
  yes, no = [], []
  for name, label in labels.items():
    if bound.member(label):
      (yes if bound.counted(label) else no).append(name)
  n, total = len(yes), len(yes) + len(no)
  slack = 1e-9  # of rounding: 0.4 * 5 must count as 2
  if n > bound.high * total + slack:
    # Smallest k with (n - k) <= high (total - k).
    k = math.ceil((n - bound.high * total) / (1 - bound.high) - slack)
    side = yes
  elif n < bound.low * total - slack:
    k = math.ceil((bound.low * total - n) / bound.low - slack)
    side = no
  else:
    return set()

  def rank(name: str) -> tuple[bool, bytes]:
    # For many bounds at once, first those that only one bound holds.
    one_sided = not set(ONE_SIDED).isdisjoint(labels[name].chain)
    return (bound.name == "inserted" and not one_sided, labels[name].rank)

  return set(sorted(side, key=rank)[:k])


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
  kinds: Counter[str] = Counter()
  seen: dict[str, Counter[str]] = {"operators": Counter(), "edits": Counter()}
  broken: dict[str, Counter[str]] = {"operators": Counter(), "edits": Counter()}
  families: dict[str, set[str]] = {}
  hashes: dict[str, list[bytes]] = {}
  empty = 0
  for row in rows:
    kind = kind_of(row)
    name = row["kind"] if kind == "pair" else kind
    kinds[name] += 1
    part = split(row["family"])
    families.setdefault(part, set()).add(row["family"])
    plain = json.dumps(row, sort_keys=True, ensure_ascii=False)
    hashes.setdefault(part, []).append(hashlib.sha256(plain.encode()).digest())
    if kind != "label":
      continue
    ops = chain(row) or ("base",)
    empty += _is_empty(row["spec"])
    inserted = [] if set(INSERTING).isdisjoint(ops) else ["inserted"]
    for table, names in (("operators", {*ops, *inserted}), ("edits", ops[-1:])):
      seen[table].update(names)
      if row["label"] == 0:
        broken[table].update(names)
  labels = max(kinds["label"], 1)
  return {
    "rows": dict(sorted(kinds.items())),
    **{
      table: {
        name: {"rows": n, "violating": broken[table][name] / n}
        for name, n in sorted(seen[table].items())
      }
      for table in seen
    },
    "unedited": seen["edits"]["base"] / labels,
    "empty": empty / labels,
    "families": {k: len(v) for k, v in sorted(families.items())},
    "hashes": {
      k: "sha256:" + hashlib.sha256(b"".join(sorted(v))).hexdigest()
      for k, v in sorted(hashes.items())
    },
  }
