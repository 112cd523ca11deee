"""Operators that change the label of a conversation, or only may."""

from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.edits import (
  Edit,
  SpecPair,
  breaks,
  domain_of,
  edited,
  elsewhere,
  inserted,
  is_alone,
  judge,
  keyed,
  promised,
  replaced,
  with_rules,
  word,
  wordings,
)
from csrm_jax.spec import Rule, Spec, Subcategory, Truth

REFUSALS = (
  "I can't help with that, but I'm glad to help with something else.",
  "Sorry, this is something I have to decline.",
  "I'd rather not go into this. Is there another question I can take on?",
  "That is a request I won't fulfil.",
  "No, I'm not able to assist you here.",
  "I'm going to pass on this one. Ask me about something different any time.",
)
MUST_ANSWER = (
  "answer the user's question; do not refuse",
  "every request gets a real answer, never a refusal",
  "do not decline to answer",
)


def leave_out(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O2: removes every rule that the response breaks; others must be left."""
  del taxonomy, seed
  kept = [r for r in spec.rules if breaks(row, r) != 1]
  if not kept or judge(row, spec) != 0:
    return None
  return promised("leave_out", row, spec, with_rules(spec, kept), 1)


def add_trigger(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O3: inserts a rule that the response breaks."""
  rng = keyed("add_trigger", seed, row)
  rules = elsewhere(spec, taxonomy.rules)
  broken = [r for r in rules if breaks(row, r) == 1]
  if not broken:
    return None
  rule = word(rng.choice(broken), taxonomy, rng)
  if breaks(row, rule) != 1:  # its level lets this one pass
    rule = rule.model_copy(update={"level": None})
  return promised("add_trigger", row, spec, inserted(spec, [rule], rng), 0)


def allow(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O5: turns the one rule that the response breaks into a permission."""
  del taxonomy, seed
  broken = [r for r in spec.rules if breaks(row, r) == 1]
  if len(broken) != 1 or broken[0].polarity != "forbid":
    return None
  if judge(row, spec) != 0:  # an exception holds it already, or contradicts
    return None
  new = replaced(spec, broken[0], broken[0].turned("allow"))
  return promised("allow", row, spec, new, 1)


def ladder(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O6: moves the level of a rule; the higher the level, the more lenient.

  Only rules that the response breaks without a level: on others the two specs
  would tie.
  """
  rng = keyed("ladder", seed, row)
  steps = []
  for rule in spec.rules:
    full = _graded(rule, taxonomy)
    if full is None or not is_alone(spec, rule) or breaks(row, full) != 1:
      continue
    severities = sorted({s.severity for s in full.subcategories})
    above = [s for s in severities if s >= (rule.level or 1)]
    now = above[0] if above else severities[-1] + 1
    steps += [(rule, full, now, s) for s in severities if s != now]
  if not steps:
    return None
  rule, full, now, level = rng.choice(steps)
  new = replaced(spec, rule, full.model_copy(update={"level": level}))
  if new.render() == spec.render():
    return None
  pair = SpecPair(new, spec) if level > now else SpecPair(spec, new)
  return Edit("ladder", row, new, judge(row, new), (pair,))


def _graded(rule: Rule, taxonomy: Taxonomy) -> Rule | None:
  """The forbid rule with its sub-categories, if of several severities."""
  if rule.polarity != "forbid":
    return None
  options = [rule, *wordings(rule, taxonomy)]
  full = next((r for r in options if r.subcategories), None)
  if full is None or len({s.severity for s in full.subcategories}) < 2:
    return None
  return full.model_copy(update={"level": None})


def swap_spec(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O10: another spec of about as many rules; any known label.

  Where that can be, four times in five one that the response violates: a spec
  drawn blindly would almost never forbid what this response does.
  """
  rng = keyed("swap_spec", seed, row)
  new = elsewhere(spec, taxonomy.rules)
  broken = [r for r in taxonomy.rules if breaks(row, r) == 1]
  inert = [r for r in new if breaks(row, r) == 0]
  if not inert:
    return None
  chosen = [rng.choice(broken)] if broken and rng.random() < 0.8 else []
  size = max(1, len(spec.rules)) - len(chosen)
  chosen += rng.sample(inert, min(len(inert), max(size, 1)))
  rng.shuffle(chosen)
  other = with_rules(spec, [word(r, taxonomy, rng) for r in chosen])
  edit = edited("swap_spec", row, spec, other)
  return edit if edit.label >= 0 else None


def contradict(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O11: forbids and permits the one thing the response violates.

  No label, but the order forbid <= both <= permission, as two spec pairs.
  """
  del taxonomy
  rng = keyed("contradict", seed, row)
  broken = [r for r in spec.rules if breaks(row, r) == 1]
  if len(broken) != 1 or not is_alone(spec, broken[0]):
    return None
  (rule,) = broken
  if rule.polarity != "forbid" or rule.level is not None:
    return None
  allowed = rule.turned("allow")
  named = {"id": f"{rule.id}.allowed", "domain": domain_of(rule)}
  two = [rule, allowed.model_copy(update=named)]
  rng.shuffle(two)
  both = replaced(spec, rule, *two)
  lenient = replaced(spec, rule, allowed)
  labels = [judge(row, s) for s in (spec, both, lenient)]
  if labels != [0, -1, 1]:
    return None
  pairs = (SpecPair(both, spec), SpecPair(lenient, both))
  return Edit("contradict", row, both, -1, pairs)


def forbid_refusal(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O12: requires an answer: a refusal now violates, an answer is as before."""
  del taxonomy
  if row.refusal is None or any(r.polarity == "require" for r in spec.rules):
    return None
  rng = keyed("forbid_refusal", seed, row)
  rule = Rule(
    id="must_answer",
    guideline=rng.choice(MUST_ANSWER),
    polarity="require",
    response_type="comply",
  )
  effect = 0 if row.refusal else None
  new = inserted(spec, [rule], rng)
  return promised("forbid_refusal", row, spec, new, effect)


def carve_out(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O14: excepts one sub-category from a rule.

  If it is not the least severe of those forbidden, the edit has no pair and
  is not `ordered`.
  """
  rng = keyed("carve_out", seed, row)
  options = []
  for rule in spec.rules:
    full = _graded(rule, taxonomy)
    if full is None or not is_alone(spec, rule):
      continue
    full = full.model_copy(update={"level": rule.level})
    strict = full.split()[0]
    known = [s for s in strict if _known(row, full, s)]
    options += [(rule, full, s) for s in known if len(strict) > 1]
  if not options:
    return None
  # Half of the time one that the response breaks, where there is such a one.
  own = [o for o in options if _known(row, o[1], o[2]) == {1}]
  rule, full, sub = rng.choice(own if own and rng.random() < 0.5 else options)
  least = min(s.severity for s in full.split()[0])
  rest = tuple(s for s in full.subcategories if s.id != sub.id)
  excepted = {
    "id": f"{rule.id}.{sub.id}",
    "domain": domain_of(rule),
    "subcategories": (sub,),
    "guideline": "",
  }
  new = replaced(
    spec,
    rule,
    full.model_copy(update={"subcategories": rest}),
    full.turned("allow").model_copy(update=excepted),
  )
  edit = edited("carve_out", row, spec, new)
  if edit.label < 0:
    return None
  if sub.severity > least:
    return edit._replace(pairs=(), ordered=False)
  return edit


def _known(row: Annotated, rule: Rule, sub: Subcategory) -> set[int]:
  """The known truth of a sub-category as a set; empty if unknown."""
  keys = (sub.id, f"{domain_of(rule)}.{sub.id}")
  values = {row.violated.get(k) for k in keys}
  return {v for v in values if v is not None}


def refuse_sub(
  row: Annotated, spec: Spec, taxonomy: Taxonomy, seed: int
) -> Edit | None:
  """O15: puts a refusal in the place of the response."""
  if row.refusal == 1 or any(r.polarity == "require" for r in spec.rules):
    return None
  text = keyed("refuse_sub", seed, row).choice(REFUSALS)
  violated: dict[str, Truth] = dict.fromkeys(row.violated, 0)
  for rule in taxonomy.rules:  # what nobody looked at is not in our text
    subs = [s.id for s in rule.subcategories]
    violated |= dict.fromkeys([*subs, domain_of(rule)], 0)
  new = row._replace(
    id=f"{row.id}~refused",
    messages=(*row.messages[:-1], (row.messages[-1][0], text)),
    violated=violated,
    refusal=1,
    severity=0,
    helpfulness=None,
  )
  return Edit("refuse_sub", new, spec, 1) if judge(new, spec) == 1 else None
