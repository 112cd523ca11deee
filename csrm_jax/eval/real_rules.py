"""Suites out of PolyGuard: the same text under its own rule and under others.

Within a policy, what one text has as its own spec another has as its wrong
one, so that a spec is as often complied with as violated, and so is a text:
neither tells the label alone.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.polyguard import Clause, clause_text

KINDS = ("rules", "texts", "all", "policy")


class _Case(NamedTuple):
  """A text and where it stands in the rotation of its policy."""

  raw: Row
  lender: Row  # its rule is the wrong one for this text
  borrower: Row  # to which the rule of this text is the wrong one


def rows(
  raws: Sequence[Row],
  kind: str,
  *,
  policies: Mapping[str, Sequence[Clause]],
  size: int,
  counts: dict[str, int],
) -> list[Row]:
  """Label rows of about `size`, from each domain as many texts.

  rules: violating texts under their own rule (0) and under one of another
  category of the same policy (1, an edit of the first), and again under an edit
  of each of the two specs that keeps its label.
  texts: violating (0) and repaired (1) texts under the rule.
  all: the violating text under both rules, the repaired one under its own.
  policy: the violating text under its whole policy, one category left out:
  another than its own (0), or its own (1). The long specs.

  Args:
    raws: lines of the set, of whole families.
    kind: of KINDS; all use the same texts.
    policies: all rules of each policy.
    size: of "rules", roughly; a quarter of it is the number of texts.
    counts: receives what was left out.

  Raises:
    ValueError: an unknown kind.
  """
  if kind not in KINDS:
    raise ValueError(f"kind {kind!r}; use one of {', '.join(KINDS)}")
  drawn = _drawn(_unambiguous(raws, counts), size // 4)
  out: list[Row] = []
  for policy in sorted({raw["policy"] for raw in drawn}):
    mine = [raw for raw in drawn if raw["policy"] == policy]
    for case in _rotated(mine, counts):
      out.extend(_rows_of(case, kind, policies[policy]))
  return out


def policies_of(raws: Iterable[Row]) -> dict[str, tuple[Clause, ...]]:
  """The rules that the lines of the set name, by policy, in sorted order."""
  found: dict[str, set[Clause]] = {}
  for raw in raws:
    found.setdefault(raw["policy"], set()).add(_clause(raw))
  return {policy: tuple(sorted(rules)) for policy, rules in found.items()}


def _clause(raw: Row) -> Clause:
  return Clause(raw["category"], raw["rule"])


def _hash(text: str) -> int:
  return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def _unambiguous(raws: Sequence[Row], counts: dict[str, int]) -> list[Row]:
  """One line a text; none of those that stand under several rules."""
  rules: dict[str, set[str]] = {}
  for raw in raws:
    text = hash_family(raw["violating"])
    rules.setdefault(text, set()).add(raw["rule"])
  kept: dict[str, Row] = {}
  for raw in raws:
    text = hash_family(raw["violating"])
    reason = ""
    if len(rules[text]) > 1:
      reason = "text_under_several_rules"
    elif text in kept:
      reason = "duplicate"
    if reason:
      counts[reason] = counts.get(reason, 0) + 1
    else:
      kept[text] = raw
  return list(kept.values())


def _drawn(raws: Sequence[Row], number: int) -> list[Row]:
  """As many texts of each domain, by a hash of their families."""
  domains: dict[str, list[Row]] = {}
  for raw in raws:
    domains.setdefault(raw["policy"].split("/")[0], []).append(raw)
  drawn: list[Row] = []
  for name in sorted(domains):
    found = sorted(domains[name], key=lambda r: hash_family(r["violating"]))
    drawn += found[: max(1, round(number / len(domains)))]
  return drawn


def _rotated(raws: Sequence[Row], counts: dict[str, int]) -> list[_Case]:
  """Pairs the texts of a policy so that each rule is used and lent once.

  Sorted by category and shifted by the size of the largest, no text meets its
  own category; a category of more than half of the texts is thinned first.
  """
  sizes = Counter(raw["category"] for raw in raws)
  largest = max(sorted(sizes), key=lambda c: sizes[c])
  shift = min(sizes[largest], len(raws) - sizes[largest])
  key = "text_without_other_category"
  counts[key] = counts.get(key, 0) + sizes[largest] - shift
  by_category: dict[str, list[Row]] = {}
  for raw in sorted(raws, key=lambda r: hash_family(r["violating"])):
    by_category.setdefault(raw["category"], []).append(raw)
  ordered = [
    raw
    for category in sorted(by_category)
    for raw in by_category[category][: shift if category == largest else None]
  ]
  n = len(ordered) if shift else 0
  return [
    _Case(raw, ordered[(i + shift) % n], ordered[(i - shift) % n])
    for i, raw in enumerate(ordered[:n])
  ]


def _rows_of(
  case: _Case, kind: str, clauses: Sequence[Clause]
) -> Iterator[Row]:
  raw, own = case.raw, _clause(case.raw)
  if kind == "policy":
    yield from _under_policy(case, clauses)
    return
  right, wrong = _spec(own), _spec(_clause(case.lender))
  yield _row(raw, "right", right, 0) | {"gold": [0]}
  if kind in ("rules", "all"):
    yield _row(raw, "wrong", wrong, 1, "other_rule", "right")
  if kind in ("texts", "all"):
    yield _row(raw, "repaired", right, 1, text="compliant")
  if kind == "rules":
    for part, owner, borrower in (
      ("right", raw, case.borrower),
      ("wrong", case.lender, raw),
    ):
      edit, spec, at = _edited(owner, borrower, clauses)
      label = int(part == "wrong")
      row = _row(raw, f"{part}_{edit}", spec, label, edit, part)
      yield row | ({} if label else {"gold": [at]})


def _row(
  raw: Row,
  part: str,
  spec: str,
  label: int,
  edit: str = "",
  base: str = "",
  *,
  text: str = "violating",
) -> Row:
  row = {
    "id": f"{raw['id']}/{part}",
    "messages": [{"role": "assistant", "content": raw[text]}],
    "label": label,
    "spec": spec,
    "source": "polyguard",
    "family": hash_family(raw["violating"]),
  }
  return row | ({"edit": edit, "base": f"{raw['id']}/{base}"} if base else {})


def _titled(clause: Clause) -> bool:
  return _hash(f"title:{clause.text}") % 2 == 0


def _spec(clause: Clause) -> str:
  return clause_text((clause,), _titled(clause))


def _edited(
  owner: Row, borrower: Row, clauses: Sequence[Clause]
) -> tuple[str, str, int]:
  """(name, spec, line of the rule) of an edit that keeps both their labels.

  Either a rule of a third category stands beside it, or its category becomes
  its title, or no longer is. The edit belongs to the rule, so that one text has
  it as its own and another as a wrong one.
  """
  clause, key = _clause(owner), _hash(f"edit:{owner['id']}")
  taken = (owner["category"], borrower["category"])
  inert = [c for c in clauses if c.category not in taken]
  if inert and key % 2:
    more = inert[key // 4 % len(inert)]
    ahead = key // 2 % 2 == 0
    rules = (more, clause) if ahead else (clause, more)
    return "add_inert", clause_text(rules, _titled(clause)), int(ahead)
  return "retitle", clause_text((clause,), not _titled(clause)), 0


def _under_policy(case: _Case, clauses: Sequence[Clause]) -> Iterator[Row]:
  own, other = case.raw["category"], case.lender["category"]
  for part, without in (("with_own", other), ("without_own", own)):
    rules = tuple(c for c in clauses if c.category != without)
    spec = clause_text(rules, True)
    if without == own:
      yield _row(
        case.raw, f"policy_{part}", spec, 1, "leave_out", "policy_with_own"
      )
    else:
      gold = {"gold": [rules.index(_clause(case.raw))]}
      yield _row(case.raw, f"policy_{part}", spec, 0) | gold
