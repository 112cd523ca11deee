"""Strictness ladders: wordings of one rule from lenient to strict, tested.

Two wordings become a spec pair only if a judge's verdicts bear the order out.
Source: CSRM (arXiv:2605.30487), severity augmentation. Of the statistical test
the lower bound of the difference is ours: without it equal texts pass.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from csrm_jax.data.annotated import Annotated
from csrm_jax.data.proposers import Judge, Proposer, ask_judge
from csrm_jax.metrics import clopper_pearson_lower
from csrm_jax.spec import Rule, Spec, Subcategory, complies

# Lower bounds, each one-sided at 95 %, that a pair of wordings must exceed.
ORDER = 0.95  # P(strict flags | lenient flags); needs 59 rows without a miss
GAP = 0.02  # P(strict flags, lenient does not), over the pool
EQUAL = 0.98  # P(same verdict), over the pool; needs 149 rows without a miss
STATUSES = ("ordered", "equal", "undecided", "failed", "too_few", "identical")
_MOST = 16  # sub-categories: more would split hairs


class Rung(NamedTuple):
  """One wording, d_number: the larger the number, the stricter.

  Attributes:
    number: how many of the most severe sub-categories it is to forbid; in a
      ladder from severities, how many severities.
    rule: the base rule, reworded.
    flagged: conversations of the pool that the judge finds violating; -1 if
      nobody was asked.
  """

  number: int
  rule: Rule
  flagged: int = -1


class Cell(NamedTuple):
  """The evidence on one pair of rungs; bounds are one-sided, at 95 %.

  Attributes:
    strict, lenient: numbers of the rungs.
    n: conversations that the lenient rung flags; where a verdict is missing,
      those that may be a miss.
    k: those of them that both flag.
    order: lower bound of k / n.
    gap: lower bound of the share of the pool that only the strict rung flags.
    equality: lower bound of the share of the pool with equal verdicts.
    unanswered: conversations without a verdict under one of the two; they
      raise no bound, whatever the verdict would be.
    status: of STATUSES. "ordered": a spec pair. "equal": a paraphrase.
      "undecided": ordered, but neither different nor equal enough. "failed":
      not ordered. "too_few": n is so small that no k could pass. "identical":
      one text.
  """

  strict: int
  lenient: int
  n: int
  k: int
  order: float
  gap: float
  equality: float
  unanswered: int
  status: str


class Ladder(NamedTuple):
  """The wordings of a rule and what is known of their order.

  Attributes:
    rule: the base rule.
    subcategories: most severe first.
    rungs: d_1, d_2, ...: lenient to strict.
    pairs: (strict, lenient) numbers of the rungs that are ordered.
    paraphrases: (strict, lenient) numbers of those that mean the same.
    cells: all pairs of rungs, with evidence; empty if ordered by construction.
    counts: pool (conversations tested), outside (not violating the base rule),
      unanswered (base rule without verdict), uncovered (violating, but under no
      sub-category), and cells by status.
  """

  rule: Rule
  subcategories: tuple[Subcategory, ...]
  rungs: tuple[Rung, ...]
  pairs: tuple[tuple[int, int], ...]
  paraphrases: tuple[tuple[int, int], ...]
  cells: tuple[Cell, ...]
  counts: dict[str, int]


# -- From severities -------------------------------------------------------


def from_severities(rule: Rule) -> list[Rule]:
  """Guidelines d_1 .. d_{K-1} of a rule with K distinct severities.

  d_k forbids the k highest severities and allows the rest by name; the rule's
  own guideline, which speaks for one level, gives way.

  Raises:
    ValueError: the rule forbids nothing, or has no sub-categories.
  """
  _check(rule)
  if not rule.subcategories:
    raise ValueError(
      f"rule {rule.id!r}: field 'subcategories': empty; list them with their "
      "severities, or build the ladder with a proposer"
    )
  levels = sorted({s.severity for s in rule.subcategories}, reverse=True)
  return [
    rule.model_copy(update={"guideline": "", "level": level})
    for level in levels[:-1]
  ]


def exact(rule: Rule) -> Ladder:
  """The ladder of `from_severities`, each pair ordered by construction.

  Raises:
    ValueError: as `from_severities`.
  """
  rules = from_severities(rule)
  rungs = tuple(Rung(k, r) for k, r in enumerate(rules, 1))
  ranked = sorted(rule.subcategories, key=lambda s: -s.severity)
  pairs = tuple(_couples(len(rungs)))
  return Ladder(rule, tuple(ranked), rungs, pairs, (), (), {})


# -- By a judge ------------------------------------------------------------


def build(
  rule: Rule,
  conversations: Sequence[Annotated],
  judge: Judge,
  proposer: Proposer,
  *,
  most: int = _MOST,
) -> Ladder:
  """Proposes wordings of a rule and keeps the pairs that the judge orders.

  Args:
    rule: the base rule; it forbids.
    conversations: what the wordings are tested on, up to 200 in the source;
      those that the judge finds violating under the base rule are used.
    judge: its verdict is the sign of the log-odds.
    proposer: of sub-categories, their order and the wordings.
    most: sub-categories from which on no further ones are asked for.

  Returns:
    The ladder, with the evidence on every pair of rungs.

  Raises:
    ValueError: the rule does not forbid, or an answer of judge or proposer is
      not of the kind asked for.
  """
  _check(rule)
  base = ask_judge(judge, [(c, rule) for c in conversations])
  pool = [c for c, z in zip(conversations, base, strict=True) if z < 0]
  counts: Counter[str] = Counter(
    pool=len(pool),
    outside=int(np.sum(base >= 0)),
    unanswered=int(np.sum(np.isnan(base))),
  )
  found, counts["uncovered"] = _cover(rule, pool, judge, proposer, most)
  ranked = _by_severity(rule, found, proposer)
  rules = [
    proposer.write_guideline(rule, ranked[:k], ranked[k:])
    for k in range(1, len(ranked))
  ]
  asked = [(c, wording) for wording in rules for c in pool]
  odds = ask_judge(judge, asked).reshape(len(rules), len(pool))
  rungs = tuple(
    Rung(k, wording, int(np.sum(odds[k - 1] < 0)))
    for k, wording in enumerate(rules, 1)
  )
  cells = tuple(
    compare(rungs[j - 1], rungs[i - 1], odds[j - 1], odds[i - 1])
    for j, i in _couples(len(rungs))
  )
  counts.update({status: 0 for status in STATUSES})
  counts.update(cell.status for cell in cells)
  return Ladder(
    rule,
    tuple(ranked),
    rungs,
    tuple((c.strict, c.lenient) for c in cells if c.status == "ordered"),
    tuple((c.strict, c.lenient) for c in cells if c.status == "equal"),
    cells,
    dict(counts),
  )


def compare(
  strict: Rung,
  lenient: Rung,
  strict_odds: Float[np.ndarray, " n"],
  lenient_odds: Float[np.ndarray, " n"],
) -> Cell:
  """The evidence that one rung is stricter than another.

  Args:
    strict: the rung meant to be stricter.
    lenient: the other.
    strict_odds: log-odds of compliance of each conversation; NaN: no answer.
    lenient_odds: the same under the other rung.
  """
  strict_flags, lenient_flags = strict_odds < 0, lenient_odds < 0  # NaN: False
  strict_keeps, lenient_keeps = strict_odds >= 0, lenient_odds >= 0
  rows = len(strict_odds)
  k = int(np.sum(lenient_flags & strict_flags))
  n = k + int(np.sum(~lenient_keeps & ~strict_flags))
  same = k + int(np.sum(strict_keeps & lenient_keeps))
  only = int(np.sum(strict_flags & lenient_keeps))
  order = clopper_pearson_lower(k, n)
  gap = clopper_pearson_lower(only, rows)
  equality = clopper_pearson_lower(same, rows)
  if strict.rule.render() == lenient.rule.render():
    status = "identical"
  elif clopper_pearson_lower(n, n) <= ORDER:
    status = "too_few"
  elif order <= ORDER:
    status = "failed"
  elif gap > GAP:
    status = "ordered"
  elif equality >= EQUAL:
    status = "equal"
  else:
    status = "undecided"
  unanswered = int(np.sum(np.isnan(strict_odds) | np.isnan(lenient_odds)))
  return Cell(
    strict.number, lenient.number, n, k, order, gap, equality, unanswered,
    status,
  )  # fmt: skip


def _cover(
  rule: Rule,
  pool: Sequence[Annotated],
  judge: Judge,
  proposer: Proposer,
  most: int,
) -> tuple[list[Subcategory], int]:
  """Sub-categories, grown until each conversation of the pool is under one.

  Returns:
    The sub-categories, and how many conversations none of them covers.
  """
  found = list(proposer.propose_subcategories(rule))
  asked = [(c, _only(rule, sub)) for sub in found for c in pool]
  odds = ask_judge(judge, asked).reshape(len(found), len(pool))
  left = [c for c, z in zip(pool, odds.T, strict=True) if not np.any(z < 0)]
  missed: list[Annotated] = []  # asked about, and still under none
  while left:
    first, *left = left
    missed.append(first)
    if len(found) >= most:
      continue
    new = proposer.propose_one(rule, first, found)
    if new is None or new.id in {s.id for s in found}:
      continue
    found.append(new)
    odds = ask_judge(judge, [(c, _only(rule, new)) for c in (*left, *missed)])
    under = (odds < 0).tolist()  # NaN: not known to be
    split = len(left)
    missed = [c for c, u in zip(missed, under[split:], strict=True) if not u]
    left = [c for c, u in zip(left, under[:split], strict=True) if not u]
  return found, len(missed)


def _only(rule: Rule, sub: Subcategory) -> Rule:
  """The rule, forbidding nothing but one sub-category."""
  return rule.model_copy(
    update={"guideline": "", "level": None, "subcategories": (sub,)}
  )


def _by_severity(
  rule: Rule, found: Sequence[Subcategory], proposer: Proposer
) -> list[Subcategory]:
  """Most severe first, with severities that count down to 1."""
  left, ranked = list(found), []
  while left:
    worst = proposer.most_severe(rule, left)
    if worst not in left:
      raise ValueError(
        f"proposer: most_severe named {worst.id!r} for rule {rule.id!r}; it "
        f"must be one of {', '.join(repr(s.id) for s in left)}"
      )
    left.remove(worst)
    rank = len(found) - len(ranked)
    ranked.append(worst.model_copy(update={"severity": rank}))
  return ranked


def _couples(rungs: int) -> Iterator[tuple[int, int]]:
  """(strict, lenient) numbers of all pairs of rungs."""
  for j in range(2, rungs + 1):
    for i in range(1, j):
      yield j, i


def _check(rule: Rule) -> None:
  if rule.polarity != "forbid":
    raise ValueError(
      f"rule {rule.id!r}: field 'polarity': {rule.polarity!r} has no ladder; "
      "give a forbid rule"
    )


# -- Rows ------------------------------------------------------------------


def rows(
  ladder: Ladder,
  conversations: Sequence[Annotated],
  *,
  counts: dict[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
  """Spec pairs of the data contract: the more lenient wording wins.

  Each conversation has weight 1 over all its pairs.

  Args:
    ladder: with its ordered pairs.
    conversations: that violate the base rule. Of others the ladder says
      nothing: those whose annotation complies with it are left out.
    counts: receives ladder_pairs, ladder_complying (conversations left out)
      and ladder_without_pairs (conversations, if no pair is ordered).
  """
  counts = {} if counts is None else counts
  texts = {r.number: Spec(rules=(r.rule,)).render() for r in ladder.rungs}
  base = Spec(rules=(ladder.rule,))

  def count(what: str) -> None:
    counts[what] = counts.get(what, 0) + 1

  for conversation in conversations:
    if complies(base, conversation.violated) == 1:
      count("ladder_complying")
      continue
    if not ladder.pairs:
      count("ladder_without_pairs")
    for strict, lenient in ladder.pairs:
      count("ladder_pairs")
      yield {
        "id": f"{conversation.id}/{ladder.rule.id}/{strict}>{lenient}",
        "messages": conversation.turns(),
        "chosen_spec": texts[lenient],
        "rejected_spec": texts[strict],
        "weight": 1.0 / len(ladder.pairs),
        "family": conversation.family,
        "source": f"{conversation.source}/ladder",
        "edit": "ladder",
      }
