"""A configurable-safety world: rules, conversations and true labels.

Each file `world/<id>.yaml` is one domain, with graded responses. A response is
written for exactly one grade (or for none), so the sub-categories it violates
are known, and `spec.complies` gives the true label under *any* spec.

  id: alcohol            # the file's name
  split: train           # train | unseen
  titles: [...]          # >= 2 wordings of the rule's title
  vocabulary: [...]      # >= 12 content words of this domain alone
  grades:                # severity 1 (mildest) to 4 or 5, in this order
  - severity: 1
    describe: [...]      # >= 2 short phrasings for the rule text, no slots
    responses: [...]     # >= 8 templates that break exactly this grade
  prompts: [...]         # >= 10 user turns, natural before every response
  neutral: [...]         # >= 6 answers that break no grade
  refusals: [...]        # >= 5
  history: [[user, assistant], ...]     # >= 5 harmless earlier exchanges
  slots: {drink: [...]}  # >= 5 fillers of each {drink} in the texts above

Rows come in groups: a few specs that contradict each other on the group's
conversations, each conversation labelled under each spec. A text complies
under about half of the specs it meets and a spec holds for about half of its
conversations, so neither predicts the label alone.
"""

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from csrm_jax.spec import Rule, Spec, Subcategory, Truth, complies

WORLD = Path(__file__).parent / "world"

# Swaps teach polarity, presence teaches which rule applies; both need only the
# title, so they carry most of the weight. Levels and carve-outs need finer
# matching, and refusals a rule about form instead of content.
KINDS = {
  "swap": 0.35,
  "presence": 0.2,
  "level": 0.2,
  "carve": 0.1,
  "refusal": 0.15,
}
# Specs in a training group: two fill a 1024-token row once; four add reworded
# and reordered versions, so that wording and order carry no information.
SPEC_COUNTS = {2: 0.55, 3: 0.2, 4: 0.25}
HISTORY = 0.25  # share of conversations with one or two earlier exchanges
CONSTANT = 0.5  # share of groups with a pair of spec-independent labels
LADDER = 0.15  # share of swap groups with a ladder: three grades, one prompt
HELD_BACK = 4  # every fourth template and prompt is kept for `synthetic_seen`
# Domains whose responses could fall under each other's rules: they never meet
# in a group, so that a label is right for a reader, not only by construction.
AKIN = (
  {"refund_promises", "delivery_dates", "discounts_haggling"},
  {"refund_promises", "competitor_names"},
  {"legal_advice", "refund_promises"},
  {"legal_advice", "landlord_disputes"},
  {"violence_in_fiction", "knives_and_tools"},
  {"profanity", "insults_mockery"},
  {"celebrity_gossip", "insults_mockery"},
  {"religion_preaching", "insults_mockery"},
  {"religion_preaching", "ghost_superstition"},
  {"horror_scares", "violence_in_fiction", "ghost_superstition", "spoilers"},
  {"gambling", "investment_tips"},
  {"medical_dosage", "weight_loss_diets"},
  {"alcohol", "fast_driving"},
  {"personal_data", "visa_immigration"},
)
SLOT = re.compile(r"\{(\w+)\}")

Row = dict[str, Any]


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Grade(_Strict):
  """One severity of a domain: wordings for rules, templates that break it."""

  severity: int = pydantic.Field(ge=1, le=5)
  describe: tuple[str, ...] = pydantic.Field(min_length=2)
  responses: tuple[str, ...] = pydantic.Field(min_length=8)


class Domain(_Strict):
  """One world file; see the module's docstring for the keys."""

  id: str
  split: str = pydantic.Field(pattern="^(train|unseen)$")
  titles: tuple[str, ...] = pydantic.Field(min_length=2)
  vocabulary: tuple[str, ...] = pydantic.Field(min_length=12)
  grades: tuple[Grade, ...] = pydantic.Field(min_length=4, max_length=5)
  prompts: tuple[str, ...] = pydantic.Field(min_length=10)
  neutral: tuple[str, ...] = pydantic.Field(min_length=6)
  refusals: tuple[str, ...] = pydantic.Field(min_length=5)
  history: tuple[tuple[str, str], ...] = pydantic.Field(min_length=5)
  slots: dict[str, tuple[str, ...]] = {}

  def templates(self) -> dict[str, tuple[str, ...]]:
    """Every text with slots, by the key it stands under."""
    texts = {f"grades.{g.severity}.responses": g.responses for g in self.grades}
    texts |= {k: getattr(self, k) for k in ("prompts", "neutral", "refusals")}
    texts["history"] = tuple(t for turn in self.history for t in turn)
    return texts

  def rule_texts(self) -> tuple[str, ...]:
    """Titles and descriptions."""
    return self.titles + tuple(d for g in self.grades for d in g.describe)


def load(path: Path) -> Domain:
  """Reads and checks one domain file.

  Raises:
    ValueError: names the file, the key, what is wrong and the remedy.
  """
  try:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    domain = Domain.model_validate(raw)
  except yaml.YAMLError as error:
    raise ValueError(f"{path}: not YAML ({error}); quote the text") from None
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "(top)"
    raise ValueError(
      f"{path}: {key}: {first['msg']}; correct it after the schema in"
      " csrm_jax/data/synthetic.py"
    ) from None
  for key, fault in _faults(domain, path.stem):
    raise ValueError(f"{path}: {key}: {fault}")
  return domain


def _faults(domain: Domain, stem: str) -> Iterator[tuple[str, str]]:
  if domain.id != stem:
    yield "id", f"{domain.id!r} must equal the file's name {stem!r}"
  grades = [g.severity for g in domain.grades]
  if grades != list(range(1, len(grades) + 1)):
    yield "grades", f"severities {grades} must count up from 1; reorder them"
  for name, fillers in domain.slots.items():
    if len(fillers) < 5:
      yield (
        f"slots.{name}",
        f"{len(fillers)} fillers; add some, up to 5 or more",
      )
  for text in domain.rule_texts():
    if SLOT.search(text):
      yield "grades.describe", f"slot in rule text {text!r}; write it out"
  seen: dict[str, str] = {}
  for key, texts in domain.templates().items():
    for text in texts:
      for name in SLOT.findall(text):
        if name not in domain.slots:
          yield key, f"unknown slot {{{name}}} in {text!r}; add it to slots"
      if key != "history" and text in seen:
        yield key, f"{text!r} stands under {seen[text]} too; remove one"
      seen[text] = key


@functools.cache
def world() -> Mapping[str, Domain]:
  """All domains by id, checked.

  Raises:
    ValueError: names the file, the key, what is wrong and the remedy.
  """
  return {p.stem: load(p) for p in sorted(WORLD.glob("*.yaml"))}


class Pool(NamedTuple):
  """The domains and the part of their templates a generator may draw from.

  Attributes:
    domains: sorted by id.
    part: "trained" or "held_back" templates and prompts, or "all".
    used: templates drawn before, which are drawn again only after the rest.
  """

  domains: tuple[Domain, ...]
  part: str
  used: set[str]

  def draw(self, rng: random.Random, texts: Sequence[str]) -> str:
    """One of `texts`, out of this pool's part."""
    if self.part == "trained":
      texts = [t for i, t in enumerate(texts) if (i + 1) % HELD_BACK]
    elif self.part == "held_back":
      texts = [t for i, t in enumerate(texts) if not (i + 1) % HELD_BACK]
    text = rng.choice([t for t in texts if t not in self.used] or texts)
    self.used.add(text)
    return text

  def choose(self, rng: random.Random) -> list[Domain]:
    """Up to 6 domains in random order, no two of them akin."""
    chosen: list[Domain] = []
    for domain in rng.sample(self.domains, len(self.domains)):
      if not any({domain.id, c.id} <= akin for c in chosen for akin in AKIN):
        chosen.append(domain)
    return chosen[:6]


def pool(split: str) -> Pool:
  """Domains of a split; "seen" are the training domains' held-back texts.

  Raises:
    ValueError: if the split is unknown or has too few domains.
  """
  parts = {"train": "trained", "seen": "held_back", "unseen": "all"}
  if split not in parts:
    raise ValueError(f"split={split!r}: must be one of {', '.join(parts)}")
  which = "unseen" if split == "unseen" else "train"
  domains = tuple(d for d in world().values() if d.split == which)
  if len(domains) < 4:
    raise ValueError(
      f"split={split!r}: {len(domains)} domains in {WORLD}; at least 4 needed"
    )
  return Pool(domains, parts[split], set())


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


def _weighted(rng: random.Random, weights: Mapping[Any, float]) -> Any:
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


def _severity(rng: random.Random, domain: Domain) -> int:
  return rng.randint(1, len(domain.grades))


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
      answer: int | str = _severity(rng, domain)
      if against == "decline" and rng.random() < 0.4:
        answer = "neutral"
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
  rng: random.Random, pool: Pool, *, max_rules: int, edits: Sequence[str | None]
) -> Group:
  """One group.

  Args:
    rng: source of randomness.
    pool: what may be drawn.
    max_rules: of a spec, at least 2.
    edits: label-preserving edits to add, as `a`, `b`, `a`, ... versions; None
      draws one.
  """
  kind = _weighted(rng, KINDS)
  pool = pool._replace(used=set())
  one, two, *others = pool.choose(rng)
  draft = DRAFTS[kind](rng, pool, one, two)
  sides = {"a": draft.a, "b": draft.b}
  conversations = list(draft.conversations)
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


def rows(
  *, split: str, families: int, seed: int, max_rules: int = 3
) -> Iterator[Row]:
  """Rows of the data contract, group by group.

  Args:
    split: "train" (templates held back for the suites left out), "seen" (only
      those), or "unseen".
    families: number of groups.
    seed: same seed, same rows.
    max_rules: rules in a spec, 2 or more.

  Raises:
    ValueError: if the split or `max_rules` is out of range.
  """
  if max_rules < 2:
    raise ValueError(f"max_rules={max_rules}: must be 2 or more")
  source = pool(split)
  for index in range(families):
    rng = random.Random(f"rows/{split}/{seed}/{index}")
    edits = [None] * (_weighted(rng, SPEC_COUNTS) - 2)
    made = group(rng, source, max_rules=max_rules, edits=edits)
    yield from _emit(made, f"synthetic-{split}-{seed}-{index}")


def _emit(made: Group, family: str) -> Iterator[Row]:
  """Label rows, then the pairs and the ladder that their labels imply."""
  texts = [v.spec.render() for v in made.versions]
  labels = [
    [truth(v.spec, c) for v in made.versions] for c in made.conversations
  ]
  common = {"family": family, "source": f"synthetic/{made.kind}"}
  for i, conversation in enumerate(made.conversations):
    turns = conversation.turns()
    for j, text in enumerate(texts):
      yield {
        "id": f"{family}/{i}/{j}",
        "messages": turns,
        "label": labels[i][j],
        "severity": conversation.severity,
        "spec": text,
        **common,
      }
    for j, lenient in enumerate(texts):
      for k, strict in enumerate(texts):
        if labels[i][j] > labels[i][k]:
          yield {
            "id": f"{family}/{i}/{j}>{k}",
            "messages": turns,
            "chosen_spec": lenient,
            "rejected_spec": strict,
            **common,
          }
  for i, win in enumerate(made.conversations):
    for j, lose in enumerate(made.conversations):
      if win.messages[:-1] != lose.messages[:-1]:
        continue
      for k, text in enumerate(texts):
        if labels[i][k] > labels[j][k]:
          yield {
            "id": f"{family}/{i}>{j}/{k}",
            "prompt": win.turns()[:-1],
            "chosen": win.turns()[-1:],
            "rejected": lose.turns()[-1:],
            "kind": "resp",
            "spec": text,
            **common,
          }
  yield from _ladders(made, family, common)


def _ladders(made: Group, family: str, common: Row) -> Iterator[Row]:
  """Three or more grades after one prompt, under a rule that forbids all."""
  by_prompt: dict[Any, list[Conversation]] = {}
  for conversation in made.conversations:
    if conversation.severity:
      key = (conversation.domain, conversation.messages[:-1])
      by_prompt.setdefault(key, []).append(conversation)
  for i, rungs in enumerate(by_prompt.values()):
    rungs = sorted({c.severity: c for c in rungs}.values(), key=lambda c: -c[1])
    if len(rungs) < 3:
      continue
    for j, version in enumerate(made.versions):
      if all(truth(version.spec, c) == 0 for c in rungs):
        text = version.spec.render()
        yield {
          "id": f"{family}/ladder{i}/{j}",
          "ladder": [{"messages": c.turns(), "spec": text} for c in rungs],
          **common,
        }


def suite(name: str, *, size: int = 400, seed: int = 0) -> list[Row]:
  """Label rows for evaluation, each conversation under several specs.

  The first row of a conversation is its base. The others name it in "base"
  and say in "edit" how their spec differs: the label of a flip differs from
  the base's, that of any other edit does not.

  Args:
    name: "synthetic_seen" (training domains, texts held back from training) or
      "synthetic_unseen" (domains that training never meets).
    size: rows, reached or missed by less than one conversation.
    seed: same seed, same rows.

  Raises:
    ValueError: if the name is unknown.
  """
  splits = {"synthetic_seen": "seen", "synthetic_unseen": "unseen"}
  if name not in splits:
    raise ValueError(f"suite {name!r}: must be one of {', '.join(splits)}")
  source = pool(splits[name])
  out: list[Row] = []
  index = 0
  while len(out) < size:
    rng = random.Random(f"suite/{name}/{seed}/{index}")
    family = f"{name}-{seed}-{index}"
    index += 1
    edits = [None] * rng.choice((1, 2))
    made = group(rng, source, max_rules=3, edits=edits)
    texts = [v.spec.render() for v in made.versions]
    for i, conversation in enumerate(made.conversations):
      if len(out) + len(texts) > size and out:
        return out
      out += _judged(made, i, conversation, texts, family)
  return out


def _judged(
  made: Group,
  i: int,
  conversation: Conversation,
  texts: Sequence[str],
  family: str,
) -> list[Row]:
  base_id = f"{family}/{i}/0"
  out: list[Row] = []
  for j, (version, text) in enumerate(zip(made.versions, texts, strict=True)):
    row: Row = {
      "id": f"{family}/{i}/{j}",
      "messages": conversation.turns(),
      "label": truth(version.spec, conversation),
      "severity": conversation.severity,
      "spec": text,
      "family": family,
      "source": f"{family.rsplit('-', 2)[0]}/{made.kind}",
      "edit": "base",
    }
    if j:
      row["base"] = base_id
      row["edit"] = made.kind if version.side == "b" else version.edit
    out.append(row)
  return out
