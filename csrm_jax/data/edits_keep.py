"""Operators that leave the label of a conversation as it is."""

from collections.abc import Sequence

from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.edits import (
  Edit,
  breaks,
  domain_of,
  elsewhere,
  inserted,
  judge,
  keyed,
  promised,
  with_rules,
  word,
  wordings,
)
from csrm_jax.spec import Rule, Spec

MOST_RULES = 80  # that `distract` adds


def drop_inert(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O1: removes some of the rules that the response does not break."""
  del taxonomy
  rng = keyed("drop_inert", seed, row)
  inert = [i for i, r in enumerate(spec.rules) if breaks(row, r) == 0]
  most = min(len(inert), len(spec.rules) - 1)
  if most < 1:
    return None
  gone = set(rng.sample(inert, rng.randint(1, most)))
  new = spec.keep(i for i in range(len(spec.rules)) if i not in gone)
  return promised("drop_inert", row, spec, new, None)


def add_inert(
  row: Annotated,
  spec: Spec,
  taxonomy: Taxonomy,
  seed: int,
  *,
  alone: float = 0.1,
) -> Edit | None:
  """O4: inserts a rule, or a permission, that the response does not break.

  With probability `alone` that rule becomes the whole spec.
  """
  rng = keyed("add_inert", seed, row)
  inert = [r for r in elsewhere(spec, taxonomy.rules) if breaks(row, r) == 0]
  if not inert:
    return None
  rule = word(rng.choice(inert), taxonomy, rng)
  if rng.random() < 0.4:  # or every permission would belong to a label of 1
    rule = rule.turned("allow")
  if rng.random() < alone and judge(row, spec) >= 0:
    return promised("add_inert", row, spec, with_rules(spec, [rule]), 1)
  return promised("add_inert", row, spec, inserted(spec, [rule], rng), None)


def permute(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O7: shuffles the rules, which numbers them anew."""
  del taxonomy
  rules = list(spec.rules)
  keyed("permute", seed, row).shuffle(rules)
  if rules == list(spec.rules):
    rules = rules[1:] + rules[:1]
  return promised("permute", row, spec, with_rules(spec, rules), None)


def paraphrase(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O8: gives a random half of the rules another wording of equal meaning."""
  rng = keyed("paraphrase", seed, row)
  options = {
    i: found
    for i, rule in enumerate(spec.rules)
    if (found := _rewordings(rule, taxonomy))
  }
  if not options:
    return None
  chosen = [i for i in options if rng.random() < 0.5]
  rules = list(spec.rules)
  for i in chosen or [rng.choice(list(options))]:
    rules[i] = rng.choice(options[i])
  return promised("paraphrase", row, spec, with_rules(spec, rules), None)


def _rewordings(rule: Rule, taxonomy: Taxonomy) -> list[Rule]:
  """The rule in the taxonomy's other wordings that rule on the same things."""
  if rule.polarity == "require":
    return []
  kept = ("polarity", "level", "response_type")
  same = {name: getattr(rule, name) for name in kept}
  options = wordings(rule, taxonomy)
  whole = max(map(_severities, options), key=len, default={})
  ours = _severities(rule)
  found = []
  for other in options:
    theirs = _severities(other)
    # All sub-categories, or their common name: the same without a level.
    alike = rule.level is None and ours in ({}, whole) and theirs in ({}, whole)
    if (ours == theirs or alike) and domain_of(rule) == domain_of(other):
      new = other.model_copy(update=same)
      if new.render() != rule.render():
        found.append(new)
  return found


def _severities(rule: Rule) -> dict[str, int]:
  return {s.id: s.severity for s in rule.subcategories}


def borrow(
  row: Annotated,
  spec: Spec,
  taxonomy: Taxonomy,
  seed: int,
  *,
  donors: Sequence[Rule] = (),
) -> Edit | None:
  """O9: inserts a rule that other conversations break, and this one does not.

  Without it, a rule that was added would predict a violation.

  Args:
    row: the conversation.
    spec: to edit.
    taxonomy: of the conversation.
    seed: of the choice.
    donors: rules to draw from, each as often as it is broken; all if empty.
  """
  rng = keyed("borrow", seed, row)
  donors = donors or taxonomy.rules
  for _ in range(20 if donors else 0):
    found = elsewhere(spec, [rng.choice(donors)])
    if found and breaks(row, found[0]) == 0:
      rule = word(found[0], taxonomy, rng)
      return promised("borrow", row, spec, inserted(spec, [rule], rng), None)
  return None


def distract(
  row: Annotated,
  spec: Spec,
  taxonomy: Taxonomy,
  seed: int,
  *,
  most: int = MOST_RULES,
) -> Edit | None:
  """O13: pads with up to `most` rules and permissions on other matters.

  Their number is log-uniform. A taxonomy of fewer rules gives several wordings
  of one and rules on single sub-categories, at most all that it has.
  """
  rng = keyed("distract", seed, row)
  pool = []
  for rule in elsewhere(spec, taxonomy.rules):
    if breaks(row, rule) == 0:
      pool += _fragments(rule, taxonomy, permit=rng.random() < 0.3)
  count = min(len(pool), int(most ** rng.random()) + 1, most)
  if count < 1:
    return None
  new = inserted(spec, rng.sample(pool, count), rng)
  return promised("distract", row, spec, new, None)


def _fragments(rule: Rule, taxonomy: Taxonomy, *, permit: bool) -> list[Rule]:
  """Rules, or permissions, on a rule's matter, each with an id of its own."""
  found = wordings(rule, taxonomy)
  found += [
    rule.model_copy(update={"subcategories": (s,)})
    for s in rule.subcategories
    if len(rule.subcategories) > 1
  ]
  named = [
    r.model_copy(update={"id": f"{rule.id}.{i}", "domain": domain_of(rule)})
    for i, r in enumerate(found)
  ]
  return [r.turned("allow") for r in named] if permit else named
