"""What the operators of augmentation share: the edit, and steps to it."""

import functools
import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.spec import Rule, Spec, Truth, complies


class SpecPair(NamedTuple):
  """Two specs on one conversation: it complies no worse with `lenient`."""

  lenient: Spec
  strict: Spec


class Edit(NamedTuple):
  """What an operator made.

  Attributes:
    op: its name.
    row: the conversation; another one than before after `refuse_sub` alone.
    spec: the edited spec.
    label: by `spec.complies`: 1 complies, 0 violates, -1 unknown: no label row.
    pairs: what the edit implies on the order of specs.
    ordered: False if the new spec permits something worse than what it
      forbids, so that responses must not be compared under it.
  """

  op: str
  row: Annotated
  spec: Spec
  label: Literal[1, 0, -1]
  pairs: tuple[SpecPair, ...] = ()
  ordered: bool = True


def judge(row: Annotated, spec: Spec) -> Literal[1, 0, -1]:
  """The label of a conversation under a spec, as `complies` has it.

  Rules that share no key are judged apart, which can be remembered: `complies`
  takes rules times rules times keys.
  """
  if spec.text:
    return -1
  groups: list[tuple[frozenset[str], list[Rule]]] = []
  for rule in spec.rules:
    key: Any = rule  # hashable, being frozen
    names, members = _names(key), [rule]
    apart = []
    for other in groups:
      if names.isdisjoint(other[0]):
        apart.append(other)
      else:
        names, members = names | other[0], other[1] + members
    groups = [*apart, (names, members)]
  index = _index(frozenset(row.violated.items()))
  labels = []
  for names, members in groups:
    key = tuple(members)
    truth = {t for n in names for t in index.get(n, ())}
    labels.append(_judge(key, frozenset(truth), row.refusal))
  return min(labels, key=(0, -1, 1).index, default=1)


@functools.lru_cache(maxsize=1 << 12)
def _index(
  violated: frozenset[tuple[str, Truth]],
) -> dict[str, list[tuple[str, Truth]]]:
  """The annotation by key and by prefix of the key."""
  index: dict[str, list[tuple[str, Truth]]] = {}
  for key, value in violated:
    for name in {key, key.rsplit(".", 1)[0]}:
      index.setdefault(name, []).append((key, value))
  return index


def breaks(row: Annotated, rule: Rule) -> Truth:
  """1 if the response breaks this rule, 0 if not, None if unknown."""
  key: Any = rule  # hashable, being frozen
  return _breaks(key, frozenset(row.violated.items()), row.refusal)


@functools.lru_cache(maxsize=1 << 16)
def _breaks(
  rule: Any, violated: frozenset[tuple[str, Truth]], refusal: Truth
) -> Truth:
  index = _index(violated)
  truth = {t for n in _names(rule) for t in index.get(n, ())}
  label = complies(Spec(rules=(rule,)), dict(truth), refusal=refusal)
  return {1: 0, 0: 1, -1: None}[label]


@functools.lru_cache(maxsize=1 << 16)
def _judge(
  rules: tuple[Rule, ...],
  violated: frozenset[tuple[str, Truth]],
  refusal: Truth,
) -> Literal[1, 0, -1]:
  return complies(Spec(rules=rules), dict(violated), refusal=refusal)


@functools.lru_cache(maxsize=1 << 12)
def _names(rule: Rule) -> frozenset[str]:
  """Keys, or prefixes of keys, that a rule may be about."""
  domain = domain_of(rule)
  subs = [s.id for s in rule.subcategories]
  names = {rule.id, domain, *subs}
  names |= {f"{domain}.{name}" for name in (rule.id, *subs)}
  return frozenset(names | {name.rsplit(".", 1)[0] for name in names})


def wordings(rule: Rule, taxonomy: Taxonomy) -> list[Rule]:
  """All that the taxonomy has for the id of a rule, its first wording first."""
  first = [r for r in taxonomy.rules if r.id == rule.id]
  return [*first, *taxonomy.wordings.get(rule.id, ())]


def word(rule: Rule, taxonomy: Taxonomy, rng: random.Random) -> Rule:
  """A rule in one of its wordings; now and then with a level."""
  rule = rng.choice(wordings(rule, taxonomy))
  severities = sorted({s.severity for s in rule.subcategories})
  if len(severities) > 1 and rng.random() < 0.35:
    rule = rule.model_copy(update={"level": rng.choice(severities[1:])})
  return rule


def keyed(op: str, seed: int, row: Annotated) -> random.Random:
  """The randomness of one operator on one conversation."""
  return random.Random(f"{seed}:{row.id}:{op}")


def domain_of(rule: Rule) -> str:
  """What a rule is about: the prefix of its keys in annotations."""
  return rule.domain or rule.id


def elsewhere(spec: Spec, rules: Iterable[Rule]) -> list[Rule]:
  """Those of `rules` that are about nothing the spec rules on."""
  taken = {n for r in spec.rules for n in (r.id, domain_of(r))}
  return [r for r in rules if taken.isdisjoint((r.id, domain_of(r)))]


def is_alone(spec: Spec, rule: Rule) -> bool:
  """Whether no second rule is about the same: no exception, no repetition."""
  return sum(domain_of(r) == domain_of(rule) for r in spec.rules) == 1


def with_rules(spec: Spec, rules: Sequence[Rule]) -> Spec:
  """The spec with other rules."""
  return spec.model_copy(update={"rules": tuple(rules)})


def replaced(spec: Spec, old: Rule, *new: Rule) -> Spec:
  """`old` replaced by other rules in its place."""
  rules = [n for r in spec.rules for n in (new if r is old else (r,))]
  return with_rules(spec, rules)


def inserted(spec: Spec, rules: Iterable[Rule], rng: random.Random) -> Spec:
  """The spec with further rules, each at a random place."""
  out = list(spec.rules)
  for rule in rules:
    out.insert(rng.randint(0, len(out)), rule)
  return with_rules(spec, out)


def promised(
  op: str, row: Annotated, old: Spec, new: Spec, effect: Literal[0, 1] | None
) -> Edit | None:
  """The edit, unless its label is not the one promised (None: as before)."""
  before, label = judge(row, old), judge(row, new)
  if label != (before if effect is None else effect):
    return None
  return None if new.render() == old.render() else edited(op, row, old, new)


def edited(op: str, row: Annotated, old: Spec, new: Spec) -> Edit:
  """The edit whatever its label; a flip orders the two specs."""
  before, label = judge(row, old), judge(row, new)
  pairs = ()
  if {before, label} == {0, 1}:
    pairs = (SpecPair(new, old) if label else SpecPair(old, new),)
  return Edit(op, row, new, label, pairs)
