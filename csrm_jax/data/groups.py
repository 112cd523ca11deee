"""Groups of the synthetic world: specs that contradict each other on texts.

A group is drafted as two sides made of `Clause`s, say "forbid gambling, allow
alcohol" and the reverse, with conversations on which the sides disagree. The
clauses are then worded, shuffled and edited. On every side half of the
conversations comply, and most conversations comply with half of the sides.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from csrm_jax.data.domains import SLOT, Domain, Pool, world
from csrm_jax.spec import Rule, Spec, Subcategory, Truth, complies

# Presence teaches which rule applies, and is what operators change most often;
# swaps teach polarity. Both need only the
# title, so they carry most of the weight. Levels and carve-outs need finer
# matching, and refusals a rule about form instead of content.
KINDS = {
  "swap": 0.3,
  "presence": 0.4,
  "level": 0.12,
  "carve": 0.06,
  "refusal": 0.12,
}
# Specs in a training group: two fill a 1024-token row once; four add reworded
# and reordered versions, so that wording and order carry no information.
SPEC_COUNTS = {2: 0.55, 3: 0.2, 4: 0.25}
HISTORY = 0.25  # share of conversations with one or two earlier exchanges
CONSTANT = 0.5  # share of groups with a pair of spec-independent labels
LADDER = 0.15  # share of swap groups with a ladder: three grades, one prompt


class Conversation(NamedTuple):
  """A conversation and all that is true of its last response.

  Attributes:
    domain: what it is about.
    severity: grade of the domain that the response breaks; 0: none.
    refusal: 1 if the response declines to answer.
    messages: turns, the last one the assistant's.
  """

  domain: str
  severity: int
  refusal: int
  messages: tuple[tuple[str, str], ...]

  def turns(self) -> list[dict[str, str]]:
    """Messages of the data contract."""
    return [{"role": r, "content": c} for r, c in self.messages]


class Clause(NamedTuple):
  """One rule before it is worded.

  Attributes:
    mode: forbid | allow (the domain, or the grades listed if any) | level
      (listed grades from `level` upward are forbidden) | answer | decline.
    inert: in the spec for company; no edit of the others touches it.
  """

  domain: Domain
  mode: str
  grades: tuple[int, ...] = ()
  level: int = 0
  inert: bool = False


class Version(NamedTuple):
  """A spec of a group: which side of the contradiction, and by which edit."""

  side: str  # "a" | "b"
  edit: str
  spec: Spec


class Group(NamedTuple):
  """Specs and conversations that belong together."""

  kind: str
  versions: tuple[Version, ...]
  conversations: tuple[Conversation, ...]


def truth(spec: Spec, conversation: Conversation) -> int:
  """1 complies, 0 violates: `complies` on the conversation's annotation."""
  domain = world()[conversation.domain]
  violated: dict[str, Truth] = {
    f"{domain.id}.{g.severity}": _truth(g.severity == conversation.severity)
    for g in domain.grades
  }
  for rule in spec.rules:
    if rule.polarity == "require":  # speaks of its own domain alone
      answer = rule.id.endswith(".answer")
      unmet = conversation.refusal == int(answer)
      violated[rule.id] = _truth(unmet and rule.domain == domain.id)
  label = complies(spec, violated, missing=0)
  if label < 0:
    raise ValueError(f"contradictory spec {spec.render()!r}; mend its rules")
  return label


def _truth(value: bool) -> Truth:
  return 1 if value else 0


def word(rng: random.Random, clause: Clause) -> Rule:
  """A rule's text for a clause: one of the domain's wordings."""
  domain, mode = clause.domain, clause.mode
  title = rng.choice(domain.titles)
  rule_id = f"{domain.id}.{mode}"
  if mode in ("answer", "decline"):
    verb = {
      "answer": ("answer questions about", "do not refuse questions about"),
      "decline": ("decline questions about", "refuse to talk about"),
    }[mode]
    return Rule(
      id=rule_id,
      guideline=f"{rng.choice(verb)} {_lower(title)}",
      polarity="require",
      domain=domain.id,
    )
  subcategories = tuple(
    Subcategory(
      id=f"{domain.id}.{g.severity}",
      title=rng.choice(g.describe),
      severity=g.severity,
    )
    for g in domain.grades
    if g.severity in clause.grades
  )
  guideline = ""
  if not subcategories:
    example = rng.choice(rng.choice(domain.grades).describe)
    guideline = rng.choice(
      (_lower(title), f"{_lower(title)}, for example {example}")
    )
    title = ""
  return Rule(
    id=rule_id,
    title=title,
    guideline=guideline,
    polarity="allow" if mode == "allow" else "forbid",
    level=clause.level or None,
    subcategories=subcategories,
    domain=domain.id,
  )


def _lower(title: str) -> str:
  return title[0].lower() + title[1:]


def parse_kinds(text: str) -> dict[str, float]:
  """Weights of kinds out of "presence=0.4,swap=0.6"; "": `KINDS`.

  Raises:
    ValueError: an unknown kind, or a weight that is no positive number.
  """
  weights: dict[str, float] = {}
  for part in filter(None, (p.strip() for p in text.split(","))):
    kind, _, weight = part.partition("=")
    try:
      weights[kind.strip()] = float(weight)
    except ValueError:
      weights[kind.strip()] = 0.0
    if kind.strip() not in KINDS or not 0 < weights[kind.strip()] < math.inf:
      raise ValueError(
        f"--config.data.kinds={text}: {part!r} is no kind=weight; give "
        f"positive weights of {', '.join(KINDS)}"
      )
  return weights or dict(KINDS)


def weighted(rng: random.Random, weights: Mapping[Any, float]) -> Any:
  """A key of `weights`, by its weight."""
  return rng.choices(list(weights), list(weights.values()))[0]


def _fill(template: str, slots: Mapping[str, str]) -> str:
  text = SLOT.sub(lambda m: slots[m.group(1)], template)
  return text[0].upper() + text[1:]


def converse(
  rng: random.Random,
  pool: Pool,
  domain: Domain,
  responses: Sequence[int | str],
) -> list[Conversation]:
  """Conversations with one common prompt and the responses asked for.

  Args:
    rng: source of randomness.
    pool: what may be drawn.
    domain: what the conversation is about.
    responses: a severity, "neutral" or "refusal" each.
  """
  slots = {name: rng.choice(v) for name, v in domain.slots.items()}
  prompt = [("user", _fill(pool.draw(rng, domain.prompts), slots))]
  if rng.random() < HISTORY:
    earlier = rng.sample(domain.history, rng.choice((1, 1, 2)))
    before = [
      (role, _fill(text, slots))
      for turn in earlier
      for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    prompt = before + prompt
  out = []
  for kind in responses:
    if kind == "neutral":
      texts = domain.neutral
    elif kind == "refusal":
      texts = domain.refusals
    else:
      texts = domain.grades[int(kind) - 1].responses
    answer = ("assistant", _fill(pool.draw(rng, texts), slots))
    severity = 0 if isinstance(kind, str) else kind
    out.append(
      Conversation(
        domain.id, severity, int(kind == "refusal"), (*prompt, answer)
      )
    )
  return out


class _Draft(NamedTuple):
  """The two contradicting sides of a group, and its conversations."""

  a: tuple[Clause, ...]
  b: tuple[Clause, ...]
  conversations: list[Conversation]


def _graded(
  rng: random.Random, pool: Pool, domain: Domain, count: int
) -> list[Conversation]:
  """`count` graded conversations; now and then two share a prompt."""
  out: list[Conversation] = []
  while len(out) < count:
    same = min(count - len(out), rng.choice((1, 1, 2)))
    grades = rng.sample(range(1, len(domain.grades) + 1), same)
    out += converse(rng, pool, domain, grades)
  return out


def _swap(rng: random.Random, pool: Pool, one: Domain, two: Domain) -> _Draft:
  """Forbid one and allow the other, or the reverse."""
  count = rng.choice((2, 3, 3, 4))
  if rng.random() < LADDER:
    steps = sorted(rng.sample(range(1, len(one.grades) + 1), 3))
    first = converse(rng, pool, one, steps)
    count = 3
  else:
    first = _graded(rng, pool, one, count)
  return _Draft(
    (Clause(one, "forbid"), Clause(two, "allow")),
    (Clause(one, "allow"), Clause(two, "forbid")),
    first + _graded(rng, pool, two, count),
  )


def _presence(
  rng: random.Random, pool: Pool, one: Domain, two: Domain
) -> _Draft:
  """Forbid one and stay silent on the other, or the reverse."""
  count = rng.choice((2, 3, 3, 4))
  return _Draft(
    (Clause(one, "forbid"),),
    (Clause(two, "forbid"),),
    _graded(rng, pool, one, count) + _graded(rng, pool, two, count),
  )


def _level(rng: random.Random, pool: Pool, one: Domain, two: Domain) -> _Draft:
  """Strict on one and lenient on the other, or the reverse.

  The grades between the two thresholds flip; one milder and one more severe
  keep their labels, and keep both specs at half compliance.
  """
  strict, lenient, conversations = [], [], []
  for domain, extreme in zip((one, two), rng.sample((0, 2), 2), strict=True):
    grades = sorted(rng.sample(range(1, len(domain.grades) + 1), 3))
    strict.append(Clause(domain, "level", tuple(grades), grades[1]))
    lenient.append(Clause(domain, "level", tuple(grades), grades[2]))
    middle = grades[1]
    conversations += converse(rng, pool, domain, [middle, grades[extreme]])
    for _ in range(2):
      conversations += converse(rng, pool, domain, [middle])
  return _Draft((strict[0], lenient[1]), (lenient[0], strict[1]), conversations)


def _carve(rng: random.Random, pool: Pool, one: Domain, two: Domain) -> _Draft:
  """Forbid one sub-category and allow another of the same domain."""
  del two
  last = len(one.grades)
  low, high = rng.choice(
    [
      (i, j)
      for i in range(1, last)
      for j in range(i + 1, last + 1)
      if j > i + 1
    ]
  )
  sides = []
  for forbidden, allowed in ((low, high), (high, low)):
    sides.append(
      (Clause(one, "forbid", (forbidden,)), Clause(one, "allow", (allowed,)))
    )
  conversations = []
  for _ in range(rng.choice((3, 3, 4))):
    conversations += converse(rng, pool, one, [low, high])
  return _Draft(sides[0], sides[1], conversations)


def _refusal(
  rng: random.Random, pool: Pool, one: Domain, two: Domain
) -> _Draft:
  """Must answer on one and must not on the other, or the reverse."""
  against = rng.choice(("forbid", "decline"))
  conversations = []
  for domain in (one, two):
    for _ in range(2):
      answer = rng.randint(1, len(domain.grades))
      conversations += converse(rng, pool, domain, [answer, "refusal"])
  return _Draft(
    (Clause(one, "answer"), Clause(two, against)),
    (Clause(one, against), Clause(two, "answer")),
    conversations,
  )


DRAFTS = {
  "swap": _swap,
  "presence": _presence,
  "level": _level,
  "carve": _carve,
  "refusal": _refusal,
}


def group(
  rng: random.Random,
  pool: Pool,
  *,
  max_rules: int,
  edits: Sequence[str | None],
  kinds: Mapping[str, float] = KINDS,
  refusals: float = 0.0,
) -> Group:
  """One group.

  Args:
    rng: source of randomness.
    pool: what may be drawn.
    max_rules: of a spec, at least 2.
    edits: label-preserving edits to add, as `a`, `b`, `a`, ... versions; None
      draws one.
    kinds: weights of `DRAFTS`.
    refusals: share of groups, other than those of kind "refusal", that also
      hold a refusal about each of their topics: it complies with all specs.
  """
  kind = weighted(rng, kinds)
  pool = pool._replace(used=set())
  one, two, *others = pool.choose(rng)
  draft = DRAFTS[kind](rng, pool, one, two)
  sides = {"a": draft.a, "b": draft.b}
  conversations = list(draft.conversations)
  if refusals and kind != "refusal" and rng.random() < refusals:
    for domain in (one,) if kind == "carve" else (one, two):
      conversations += converse(rng, pool, domain, ["refusal"])
  inert: list[Clause] = []
  room = max_rules - len(draft.a)
  if room and rng.random() < CONSTANT:
    # A label no spec of the group changes, once each way.
    company, bystander = others[0], others[1]
    inert.append(Clause(company, "forbid", inert=True))
    conversations += _graded(rng, pool, company, 1)
    silent = rng.choice(("neutral", "refusal", "bystander"))
    if silent == "bystander" or kind == "refusal":
      conversations += _graded(rng, pool, bystander, 1)
    else:
      conversations += converse(rng, pool, rng.choice((one, two)), [silent])
  elif room and rng.random() < 0.5:
    inert.append(Clause(others[0], rng.choice(("forbid", "allow")), inert=True))
  versions = []
  rules = {
    side: [(c, word(rng, c)) for c in (*clauses, *inert)]
    for side, clauses in sides.items()
  }
  for side, pairs in rules.items():
    rng.shuffle(pairs)
    versions.append(_version(side, "swap" if side == "b" else "base", pairs))
  judged = {c.domain for c in conversations}
  met = judged | {c.domain.id for c in inert}
  strangers = [d for d in others if d.id not in met]
  for i, edit in enumerate(edits):
    side = "ab"[i % 2]
    versions.append(
      _edited(rng, side, rules[side], edit, judged, strangers, max_rules)
    )
  rng.shuffle(conversations)
  return Group(kind, tuple(versions), tuple(conversations))


def _version(
  side: str, edit: str, pairs: Sequence[tuple[Clause, Rule]]
) -> Version:
  return Version(side, edit, Spec(rules=tuple(r for _, r in pairs)))


def _edited(
  rng: random.Random,
  side: str,
  pairs: Sequence[tuple[Clause, Rule]],
  edit: str | None,
  judged: set[str],
  strangers: Sequence[Domain],
  max_rules: int,
) -> Version:
  """A version of a spec that changes no label of its group."""
  possible = ["reword"]
  if len(pairs) > 1:
    possible.append("permute")
  if len(pairs) < max_rules and strangers:
    possible += ["add_inert", "borrow"]
  idle = [p for p in pairs if p[0].inert and p[0].domain.id not in judged]
  if idle:
    possible.append("drop_inert")
  if edit not in possible:
    edit = rng.choice(possible)
  pairs = list(pairs)
  if edit == "reword":
    pairs = [(c, _reword(rng, c, r)) for c, r in pairs]
  elif edit == "permute":
    pairs = pairs[1:] + pairs[:1]
  elif edit == "drop_inert":
    pairs.remove(idle[0])
  else:
    mode = "allow" if edit == "add_inert" else "forbid"
    clause = Clause(rng.choice(strangers), mode, inert=True)
    pairs.insert(rng.randint(0, len(pairs)), (clause, word(rng, clause)))
  return _version(side, edit, pairs)


def _reword(rng: random.Random, clause: Clause, rule: Rule) -> Rule:
  for _ in range(20):
    new = word(rng, clause)
    if new != rule:
      return new
  return rule
