"""Cases: judged conversations with known rules, and edits of both."""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from csrm_jax.data import groups
from csrm_jax.data.domains import AKIN, Domain, world
from csrm_jax.data.synthetic import suite_conversations
from csrm_jax.eval.baselines import Row
from csrm_jax.spec import Rule, Spec

Messages = Sequence[Mapping[str, str]]

_POLARITIES = ("forbid", "allow")
# The same meaning in other words of the renderer.
_FRAME = {
  "Disallowed:": "Not permitted:",
  "Allowed:": "Permitted:",
  "Required:": "Always:",
}


class Case(NamedTuple):
  """A conversation under one spec.

  Attributes:
    id: unique.
    family: bootstrap unit.
    messages: turns, the last one the assistant's.
    spec: with rules; a plain text takes no part in edits of rules.
    label: gold probability of compliance.
    base: id of the case with the same conversation whose spec was edited; ""
      if this one is no edit.
    edit: name of the edit; "" or "base" if there is none.
    truth: gold verdict under any spec: 1, 0 or -1 (unknown); None: only
      `label` is known.
    about: synthetic domains that the family speaks of.
    refusal: 1 if the response declines to answer; None: unknown.
  """

  id: str
  family: str
  messages: Messages
  spec: Spec
  label: float
  base: str = ""
  edit: str = ""
  truth: Callable[[Spec], int] | None = None
  about: frozenset[str] = frozenset()
  refusal: int | None = None


def synthetic(name: str, *, size: int = 400, seed: int = 0) -> list[Case]:
  """The rows of `data.synthetic.suite`, with rules and truth under any spec.

  Args:
    name: "synthetic_seen" or "synthetic_unseen".
    size: cases, reached or missed by less than one conversation.
    seed: same seed, same cases.

  Raises:
    ValueError: unknown name.
  """
  out: list[Case] = []
  found = suite_conversations(name, size=size, seed=seed)
  for family, made, i in found:
    out += _of_group(made, i, family)
  return out


def _of_group(made: groups.Group, i: int, family: str) -> list[Case]:
  conversation = made.conversations[i]

  def truth(spec: Spec) -> int:
    try:
      return groups.truth(spec, conversation)
    except ValueError:  # the rules contradict each other on it
      return -1

  spoken = {c.domain for c in made.conversations}
  ruled = {r.domain for v in made.versions for r in v.spec.rules}
  cases = []
  for j, version in enumerate(made.versions):
    cases.append(
      Case(
        id=f"{family}/{i}/{j}",
        family=family,
        messages=conversation.turns(),
        spec=version.spec,
        label=float(truth(version.spec)),
        base=f"{family}/{i}/0" if j else "",
        edit=(made.kind if version.side == "b" else version.edit)
        if j
        else "base",
        truth=truth,
        about=frozenset(spoken | ruled),
        refusal=conversation.refusal,
      )
    )
  return cases


def from_rows(rows: Iterable[Row]) -> list[Case]:
  """Label rows of the data contract; nothing is known beyond their labels.

  Raises:
    ValueError: a row without label, spec or messages, by its id.
  """
  out = []
  for row in rows:
    where = f"row {row.get('id')!r}"
    for field in ("messages", "label", "spec"):
      if row.get(field) is None:
        raise ValueError(
          f"{where}: field {field!r}: missing; give label rows with their specs"
        )
    out.append(
      Case(
        id=str(row["id"]),
        family=str(row.get("family") or row["id"]),
        messages=row["messages"],
        spec=Spec.parse(row["spec"], origin=where),
        label=float(row["label"]),
        base=str(row.get("base") or ""),
        edit=str(row.get("edit") or ""),
      )
    )
  return out


def some(cases: Sequence[Case], count: int) -> list[Case]:
  """Cases of as many families as possible, `count` or just more; 0: all.

  What is drawn is a conversation under a spec with all edits of it: one of each
  family, then a second of each, and so on. Cases keep their order.
  """
  if not count:
    return list(cases)
  drawn: dict[str, dict[str, int]] = {}  # family: {id of the base: cases}
  for case in cases:
    sizes = drawn.setdefault(case.family, {})
    base = case.base or case.id
    sizes[base] = sizes.get(base, 0) + 1
  turns = itertools.zip_longest(*(sizes.items() for sizes in drawn.values()))
  kept: set[str] = set()
  total = 0
  for base, size in filter(None, itertools.chain.from_iterable(turns)):
    if total >= count:
      break
    kept.add(base)
    total += size
  return [case for case in cases if (case.base or case.id) in kept]


# ----------------------------------------------------------- edits of specs


def without(spec: Spec, index: int) -> Spec:
  """The spec less one rule."""
  return spec.keep(i for i in range(len(spec.rules)) if i != index)


def ordered(spec: Spec, order: Sequence[int]) -> Spec:
  """The spec with its rules in this order; rendering numbers them anew."""
  return spec.model_copy(update={"rules": tuple(spec.rules[i] for i in order)})


def allowing(spec: Spec, index: int) -> Spec:
  """One rule turned into an explicit permission of what it forbids."""
  rules = list(spec.rules)
  rules[index] = rules[index].turned("allow")
  return spec.model_copy(update={"rules": tuple(rules)})


def contradicting(spec: Spec, index: int, *, first: bool) -> Spec:
  """One rule beside its own permission, which stands before it or after."""
  rules = list(spec.rules)
  allow = rules[index].turned("allow")
  allow = allow.model_copy(update={"id": rules[index].id + ".allowed"})
  rules.insert(index if first else index + 1, allow)
  return spec.model_copy(update={"rules": tuple(rules)})


def inverted(spec: Spec) -> Spec:
  """Everything forbidden is allowed, everything allowed or required is not."""
  rules = (
    r.turned("allow" if r.polarity == "forbid" else "forbid")
    for r in spec.rules
  )
  return spec.model_copy(update={"rules": tuple(rules)})


def reframed(spec: Spec) -> Spec:
  """The same spec with other words for allowed, disallowed and required."""
  text = spec.render()
  for ours, other in _FRAME.items():
    text = text.replace(ours, other)
  return Spec(text=text)


def reworded(spec: Spec, rng: random.Random) -> Spec | None:
  """Other wordings of every rule of the synthetic world; None if it has none.

  Edits and truth stay as they are: ids, polarities and grades are kept.
  """
  rules = []
  for rule in spec.rules:
    domain = world().get(rule.domain)
    mode = rule.id.removeprefix(f"{rule.domain}.")
    if domain is None or mode == rule.id:
      return None
    grades = tuple(s.severity for s in rule.subcategories)
    clause = groups.Clause(domain, mode, grades, rule.level or 0)
    drawn = [groups.word(rng, clause) for _ in range(8)]
    rules.append(next((r for r in drawn if r != rule), rule))
  if not rules:
    return None
  return spec.model_copy(update={"rules": tuple(rules)})


def distracted(
  case: Case, count: int, rng: random.Random, *, polarity: str = ""
) -> Spec:
  """The spec among `count` rules on matters that the conversation avoids.

  The rules are those of synthetic domains that are neither judged nor akin to
  a judged one, and none of whose words occurs in the conversation. Where only
  the label is known they are permissions, which can make nothing a violation.
  The rules of the case keep their order.

  Args:
    case: whose spec is added to.
    count: rules to add.
    rng: source of randomness.
    polarity: "forbid" or "allow"; "": either, drawn for each domain.

  Raises:
    ValueError: the world has fewer such rules.
  """
  if not count:
    return case.spec
  domains = [d for d in world().values() if _is_elsewhere(d, case)]
  sides = {
    d.id: "allow" if case.truth is None else polarity or rng.choice(_POLARITIES)
    for d in domains
  }
  fitting = [(d.id, text) for d in domains for text in _matters(d)]
  if len(fitting) < count:
    raise ValueError(
      f"case {case.id!r}: {len(fitting)} irrelevant rules, {count} asked for;"
      " ask for fewer"
    )
  rules: list[Rule] = list(case.spec.rules)
  for n, (domain, text) in enumerate(rng.sample(fitting, count)):
    new = Rule.model_validate(
      {
        "id": f"distractor.{n}",
        "guideline": text,
        "polarity": sides[domain],
        "domain": f"{domain}.idle",
      }
    )
    rules.insert(rng.randint(0, len(rules)), new)
  return case.spec.model_copy(update={"rules": tuple(rules)})


def _is_elsewhere(domain: Domain, case: Case) -> bool:
  if domain.id in case.about or any(
    domain.id in akin and akin & case.about for akin in AKIN
  ):
    return False
  text = " ".join(m["content"] for m in case.messages).lower()
  return not any(word.lower() in text for word in domain.vocabulary)


def _matters(domain: Domain) -> list[str]:
  """What a rule of the domain can be about: its titles and grades."""
  texts = [t[0].lower() + t[1:] for t in domain.titles]
  return texts + [d for grade in domain.grades for d in grade.describe]


# --------------------------------------------------- edits of conversations


def said(
  messages: Messages, role: str, *, before: str = "", after: str = ""
) -> list[dict[str, str]] | None:
  """Text added to the last message of a role; None if it has none."""
  out = [dict(m) for m in messages]
  for message in reversed(out):
    if message["role"] == role:
      message["content"] = before + message["content"] + after
      return out
  return None
