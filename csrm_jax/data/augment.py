"""Rows of the data contract out of annotated conversations, by editing specs.

Source: CSRM (arXiv:2605.30487), configuration augmentation; sizes and shares
are ours. Conversations stay as they are but for `refuse_sub`. Every choice
hashes (seed, row, operator): the order of the rows decides nothing, of the
rows as a whole only how often which rule is broken does.

A label row is called ROW#base, ROW#OP or ROW#OP1+OP2, after the operators that
made it; `edit` names the last one and `base` the row before it.
"""

import hashlib
import itertools
import random
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax.data import spill
from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.augment_rows import (
  help_pairs,
  label_row,
  response_pairs,
  spec_row,
)
from csrm_jax.data.edits import (
  Edit,
  breaks,
  domain_of,
  judge,
  word,
)
from csrm_jax.data.edits_keep import MOST_RULES
from csrm_jax.data.operators import NEUTRAL, OPERATORS
from csrm_jax.spec import Rule, Spec

Row = dict[str, Any]

MOST_PAIRS = 4  # of responses, per prompt and kind
HELP_STEP = 1.0  # least gap in helpfulness
_EMPTY = 0.015  # share of conversations judged under no rules at all
_GEOMETRIC, _MOST_ANCHOR = 0.35, 12  # rules of a first spec; median 3
# Flips make more labels of 1 than of 0; the second edit evens that out.
_SECOND = {0: 0.95, 1: 0.65}
# Drawing weights after a first label of (0, 1); 1 where nothing is said.
# Chosen so that `balance` has little to thin.
_WEIGHTS = {
  "leave_out": (1.5, 0.0),
  "allow": (1.5, 0.0),
  "add_trigger": (0.5, 8.0),
  "refuse_sub": (0.3, 0.3),
  "forbid_refusal": (0.2, 1.0),
  "carve_out": (1.0, 0.2),
}


class Plan(NamedTuple):
  """What all conversations of a taxonomy share; made by `plan`."""

  taxonomy: Taxonomy
  donors: tuple[Rule, ...]  # each as often as it is broken
  violating: float  # probability that a spec is one the response violates
  seed: int
  ops: tuple[str, ...]
  never: frozenset[str]
  extras: Mapping[str, Mapping[str, Any]]

  def rng(self, row: Annotated, what: str) -> random.Random:
    return random.Random(f"{self.seed}:{row.id}:{what}")


def augment(
  rows: Iterable[Annotated],
  taxonomies: Iterable[Taxonomy],
  *,
  seed: int,
  counts: dict[str, int],
  ops: Collection[str] | None = None,
  never: Collection[str] = (),
  distractors: int = MOST_RULES,
  folder: str | Path | None = None,
) -> Iterator[tuple[str, list[Row]]]:
  """Label rows, spec pairs, response pairs and help pairs, prompt by prompt.

  Each conversation gets a first spec (`edit` is "base"), one labelled edit of
  it, and often a second edit that keeps the label. Pass the rows through
  `balance`.

  Args:
    rows: conversations, with unique ids.
    taxonomies: all that the rows name.
    seed: same seed, same rows.
    counts: receives what was made and what could not be.
    ops: names in OPERATORS; None: all.
    never: ids of rules that no spec may permit by word. A response that breaks
      one of them only ever gets labels of 0.
    distractors: most rules that `distract` adds.
    folder: holds all conversations but those of one prompt, which memory does;
      None: the system's for temporary files.

  Yields:
    The least id of a prompt's conversations, and the rows made of them.

  Raises:
    ValueError: an unknown operator or taxonomy, an id used twice, or a last
      message that is not the assistant's.
  """
  named = {t.name: t for t in taxonomies}
  with tempfile.TemporaryDirectory(dir=folder) as work:
    by_id = spill.Sorter(Path(work) / "id")
    for i, row in enumerate(rows):
      by_id.add((row.id, i, row), size_of(row))
    for (one, *_), (two, _, row) in itertools.pairwise(by_id):
      if one == two:
        raise ValueError(used_twice(row.id))
    plans = {}
    for name, taxonomy in named.items():
      found = (broken(r, taxonomy) for *_, r in by_id if r.taxonomy == name)
      plans[name] = plan(
        taxonomy,
        found,
        seed=seed,
        ops=ops,
        never=never,
        distractors=distractors,
      )
    by_prompt = spill.Sorter(Path(work) / "prompt")
    for *_, row in by_id:
      check(row, named)
      by_prompt.add((prompt_of(row), row.id, row), size_of(row))
    prompts = spill.Sorter(Path(work) / "first")
    for _, found in itertools.groupby(by_prompt, key=lambda item: item[0]):
      together = [row for _, _, row in found]
      size = sum(map(size_of, together))
      prompts.add((together[0].id, together), size)
    for first, together in prompts:
      mine = plans[together[0].taxonomy]
      yield first, list(rows_of(together, mine, counts))


def used_twice(name: str) -> str:
  """What to say of an id of two conversations."""
  return f"row {name!r}: field 'id': {name!r} is used twice; make ids unique"


def broken(row: Annotated, taxonomy: Taxonomy) -> tuple[int, ...]:
  """Numbers of the rules of the taxonomy that a conversation breaks."""
  rules = enumerate(taxonomy.rules)
  return tuple(i for i, rule in rules if breaks(row, rule) == 1)


def plan(
  taxonomy: Taxonomy,
  found: Iterable[Sequence[int]],
  *,
  seed: int,
  ops: Collection[str] | None = None,
  never: Collection[str] = (),
  distractors: int = MOST_RULES,
) -> Plan:
  """What `rows_of` must know of all conversations of a taxonomy.

  Args:
    taxonomy: theirs.
    found: `broken` of each conversation, in order of their ids.
    seed: see `augment`, as all that follows.

  Raises:
    ValueError: an unknown operator.
  """
  if unknown := sorted(set(ops or ()) - set(OPERATORS)):
    raise ValueError(
      f"ops: {unknown[0]!r} is no operator; choose from {', '.join(OPERATORS)}"
    )
  number = violating = 0
  donors: list[Rule] = []
  for rules in found:
    number += 1
    violating += bool(rules)
    donors += [taxonomy.rules[i] for i in rules]
  share = violating / max(number, 1)
  return Plan(
    taxonomy=taxonomy,
    donors=tuple(donors),
    violating=min(0.8, max(0.5, 0.5 / max(share, 1e-9))),
    seed=seed,
    ops=tuple(op for op in OPERATORS if ops is None or op in ops),
    never=frozenset(never),
    extras={
      "borrow": {"donors": tuple(donors)},
      "distract": {"most": distractors},
    },
  )


def prompt_of(row: Annotated) -> bytes:
  """What conversations with the same prompt have in common, as a hash.

  A lone response has no prompt to share.
  """
  key = (row.taxonomy, row.family, row.messages[:-1] or row.id)
  return _hash(repr(key))


def size_of(row: Annotated) -> int:
  """About how many bytes a conversation occupies."""
  texts = sum(len(text) for _, text in row.messages)
  return 1000 + texts + 100 * len(row.violated)


def check(row: Annotated, named: Mapping[str, Taxonomy]) -> None:
  """Raises ValueError for a row without a taxonomy or a response."""
  fault = ""
  if row.taxonomy not in named:
    known = ", ".join(sorted(named)) or "none"
    fault = (
      f"field 'taxonomy': {row.taxonomy!r} is not among those given "
      f"({known}); pass it in taxonomies"
    )
  elif not row.messages or row.messages[-1][0] != "assistant":
    fault = "field 'messages': must end with the assistant's; append it"
  if fault:
    raise ValueError(f"row {row.id!r}: {fault}")


def _count(counts: dict[str, int], key: str, n: int = 1) -> None:
  counts[f"augment_{key}"] = counts.get(f"augment_{key}", 0) + n


# -- One conversation -----------------------------------------------------


def first_spec(row: Annotated, plan: Plan) -> Spec | None:
  """A spec of the taxonomy's rules under which the label is known, or None."""
  rng = plan.rng(row, "base")
  rules = plan.taxonomy.rules
  broken = [r for r in rules if breaks(row, r) == 1]
  inert = [r for r in rules if breaks(row, r) == 0]
  fatal = [r for r in broken if r.id in plan.never]
  if rng.random() < _EMPTY and not fatal:
    return Spec()
  size = 2
  while rng.random() > _GEOMETRIC and size < _MOST_ANCHOR:
    size += 1
  if broken and (fatal or rng.random() < plan.violating):
    chosen, rest = [rng.choice(fatal or broken)], list(rules)
  else:
    # As often as it is broken elsewhere, so that no rule gives a label away.
    drawn = rng.choices(plan.donors, k=20) if plan.donors else []
    ids = {r.id for r in inert}
    chosen, rest = [r for r in drawn if r.id in ids][:1], inert
  more = [r for r in rest if r.id not in {c.id for c in chosen}]
  chosen += rng.sample(more, min(len(more), size - len(chosen)))
  rng.shuffle(chosen)
  spec = Spec(rules=tuple(_worded(r, plan, rng) for r in chosen))
  if judge(row, spec) < 0:  # a level lets this response pass; others may not
    known = [i for i, r in enumerate(spec.rules) if breaks(row, r) is not None]
    spec = spec.keep(known)
  return spec if spec.rules and judge(row, spec) >= 0 else None


def _worded(rule: Rule, plan: Plan, rng: random.Random) -> Rule:
  rule = word(rule, plan.taxonomy, rng)
  unlevelled = {"level": None}
  return rule.model_copy(update=unlevelled) if rule.id in plan.never else rule


def _is_permitted(before: Annotated, edit: Edit, plan: Plan) -> bool:
  """Whether an edit permits none of the rules that are never permitted."""
  for spec in (edit.spec, *(s for pair in edit.pairs for s in pair)):
    for rule in spec.rules:
      mild = rule.polarity == "allow" or rule.level is not None
      if mild and domain_of(rule) in plan.never:
        return False
  if not _is_fatal(edit.row, plan):
    return True
  softer = any(judge(before, p.lenient) == 1 for p in edit.pairs)
  return edit.label != 1 and not softer


def _is_fatal(row: Annotated, plan: Plan) -> bool:
  rules = [r for r in plan.taxonomy.rules if r.id in plan.never]
  return any(breaks(row, r) == 1 for r in rules)


def _apply(op: str, row: Annotated, spec: Spec, plan: Plan) -> Edit | None:
  extras = plan.extras.get(op, {})
  edit = OPERATORS[op](row, spec, plan.taxonomy, plan.seed, **extras)
  return edit if edit and _is_permitted(row, edit, plan) else None


def _order(
  ops: Iterable[str], row: Annotated, plan: Plan, label: int, what: str
) -> list[str]:
  """The operators in random order; the first to apply is a weighted draw."""
  ticket = {}
  for op in ops:
    rate = _WEIGHTS.get(op, (1.0, 1.0))[label]
    ticket[op] = plan.rng(row, f"{what}:{op}").expovariate(max(rate, 1e-9))
  return sorted(ticket, key=lambda op: ticket[op])


class _Judged(NamedTuple):
  """A label row, with what pairs of responses need of it."""

  id: str
  row: Annotated
  spec: Spec
  ordered: bool


def _conversation(
  row: Annotated, plan: Plan, counts: dict[str, int]
) -> Iterator[tuple[_Judged | None, Row]]:
  """Label rows, each with its judgement, and spec pairs, with None."""
  spec = first_spec(row, plan)
  if spec is None:
    _count(counts, "without_known_label")
    return
  base = f"{row.id}#base"
  label = judge(row, spec)
  yield _Judged(base, row, spec, True), label_row(row, base, spec, label)
  for op in _order(plan.ops, row, plan, label, "first"):
    edit = _apply(op, row, spec, plan)
    if edit is None:
      continue
    name = f"{row.id}#{op}"
    for i, pair in enumerate(edit.pairs):
      yield None, spec_row(row, f"{name}:pair{i}", pair)
    if edit.label >= 0:
      break
    _count(counts, f"unlabelled_{op}")
  else:
    _count(counts, "without_edit")
    return
  parent = "" if op == "refuse_sub" else base  # another conversation
  yield (
    _Judged(name, edit.row, edit.spec, edit.ordered),
    label_row(edit.row, name, edit.spec, edit.label, op, parent),
  )
  if plan.rng(row, "second").random() > _SECOND[edit.label]:
    return
  neutral = [o for o in NEUTRAL if o in plan.ops]
  seconds = _order(neutral, row, plan, edit.label, "second")
  # A refusal also meets specs that it violates, half of the time.
  if op == "refuse_sub" and plan.rng(row, "must").random() < 0.5:
    seconds = [o for o in ("forbid_refusal",) if o in plan.ops] + seconds
  for second in seconds:
    again = None
    if second != op:
      again = _apply(second, edit.row, edit.spec, plan)
    if again is not None:
      chain = f"{name}+{second}"
      for i, pair in enumerate(again.pairs):
        yield None, spec_row(again.row, f"{chain}:pair{i}", pair)
      yield (
        _Judged(chain, again.row, again.spec, False),
        label_row(again.row, chain, again.spec, again.label, second, name),
      )
      return
  _count(counts, "without_second_edit")


# -- Responses to one prompt ----------------------------------------------


def rows_of(
  rows: Sequence[Annotated], plan: Plan, counts: dict[str, int]
) -> Iterator[Row]:
  """All rows out of the conversations of one prompt, given by id."""
  judged: list[_Judged] = []
  for row in rows:
    for judgement, made in _conversation(row, plan, counts):
      if judgement is not None:
        judged.append(judgement)
      kind = "spec_pairs" if judgement is None else f"rows_{made['edit']}"
      _count(counts, kind)
      yield made
  responses = {j.row.id: j.row for j in judged} | {r.id: r for r in rows}
  specs = {j.spec.render(): j for j in reversed(judged) if j.ordered}
  pairs = [
    pair
    for j in specs.values()
    for pair in response_pairs(
      list(responses.values()),
      j.spec,
      j.id,
      may_win=lambda row: not _is_fatal(row, plan),
    )
  ]
  offered = list(help_pairs(rows, step=HELP_STEP))
  helps = [pair for pair, sure in offered if sure]
  _count(
    counts, "help_pairs_refusal_unequal_or_unknown", len(offered) - len(helps)
  )
  for kind, found in (("resp", pairs), ("help", helps)):
    found.sort(key=lambda r: _hash(f"{plan.seed}:{r['id']}"))
    _count(counts, f"{kind}_pairs", len(found[:MOST_PAIRS]))
    _count(counts, f"{kind}_pairs_beyond_most", len(found[MOST_PAIRS:]))
    yield from found[:MOST_PAIRS]


def _hash(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()
