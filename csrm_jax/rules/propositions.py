"""Propositions on a completion, and the ranked classes they decide.

A book in the schema of ours:

  propositions:          # yes-or-no statements about the last response
    regret:
      question: Does the assistant say that it is sorry?
      rule: saying sorry           # what a rule forbids that a judge reads
  derived:               # expressions over propositions, and derived ones above
    polite: not blames and not insults
  classes:               # of each response type, best first; a step with two
    hard:                # classes holds them as equals
    - ideal: declines and polite
    - poor: not (declines and polite)
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool, Float, Int

from csrm_jax.data.sets.rbr_gold import HARMS
from csrm_jax.rules import expressions
from csrm_jax.rules.expressions import Expression, conjunction

OURS = Path(__file__).parent / "book.yaml"
# Assignments that `_check_classes` goes through: 2 ** 20 take a second.
MOST_DECIDING = 20


@dataclasses.dataclass(frozen=True)
class Proposition:
  """A statement about a completion that holds or does not.

  Attributes:
    name: an identifier.
    question: to a person or a language model, answered by yes or no.
    rule: what a rule forbids that is broken where the statement holds.
  """

  name: str
  question: str
  rule: str


@dataclasses.dataclass(frozen=True)
class Book:
  """Propositions, what derives from them, and the classes of each type.

  Attributes:
    propositions: in the order of every array's columns.
    derived: by name; each over propositions and those before it.
    classes: (name, expression) of every class of a response type, best first.
    ranks: of those classes, 0 is best; equals share one.
    origin: file it was read from.
  """

  propositions: tuple[Proposition, ...]
  derived: Mapping[str, Expression]
  classes: Mapping[str, tuple[tuple[str, Expression], ...]]
  ranks: Mapping[str, tuple[int, ...]]
  origin: str

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """Names of the propositions, in order."""
    return tuple(p.name for p in self.propositions)

  @property
  def types(self) -> tuple[str, ...]:
    """The response types."""
    return tuple(self.classes)

  def class_names(self, response_type: str) -> tuple[str, ...]:
    """Classes of a type, best first.

    Raises:
      ValueError: no such type; names those there are.
    """
    if response_type not in self.classes:
      raise ValueError(
        f"{self.origin}: no response type {response_type!r}; use one of"
        f" {', '.join(self.types)}"
      )
    return tuple(name for name, _ in self.classes[response_type])

  def deciding(self, response_type: str) -> tuple[str, ...]:
    """The propositions that the classes of a type depend on, in order."""
    wanted: set[str] = set()
    left = [e for _, e in self.classes[response_type]]
    while left:
      for name in left.pop().names():
        if name in self.derived:
          left.append(self.derived[name])
        wanted.add(name)
    return tuple(name for name in self.names if name in wanted)

  def fingerprint(self) -> str:
    """`sha256:` of all that decides features; questions and rules are not."""
    parts = [
      list(self.names),
      {name: str(e) for name, e in self.derived.items()},
      {
        kind: [[name, str(e), rank] for (name, e), rank in zip(
          classes, self.ranks[kind], strict=True
        )]
        for kind, classes in self.classes.items()
      },
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return "sha256:" + digest.hexdigest()


# ------------------------------------------------------------------- reading


def read(path: str | Path = OURS) -> Book:
  """Reads a book: our schema, or the released `proposition_prompts.yaml`.

  Raises:
    ValueError: file, field, value and remedy of what is wrong; also classes
      of which not exactly one holds whatever the propositions are.
  """
  path = Path(path)
  try:
    raw = yaml.safe_load(path.read_text("utf-8"))
  except OSError as error:
    raise ValueError(
      f"{path}: {error.strerror}; give the path of a book of propositions"
    ) from None
  except yaml.YAMLError as error:
    raise ValueError(f"{path}: not YAML: {error}; correct it") from None
  if isinstance(raw, Mapping) and "simple_propositions" in raw:
    return parse(_released(raw, str(path)), str(path))
  return parse(raw, str(path))


def parse(raw: Any, origin: str = "book") -> Book:
  """A book out of an object in our schema; see `read`."""
  fields = {"propositions", "derived", "classes"}
  if not isinstance(raw, Mapping):
    raise ValueError(f"{origin}: no object; write the keys {sorted(fields)}")
  for key in raw:
    if key not in fields:
      raise ValueError(f"{origin}: field '{key}': unknown key; remove it")
  known: list[str] = []
  propositions = []
  for name, said in _mapping(raw, "propositions", origin).items():
    _new(name, known, f"{origin}: field 'propositions'")
    where = f"{origin}: field 'propositions.{name}'"
    if not isinstance(said, Mapping) or set(said) != {"question", "rule"}:
      raise ValueError(f"{where}: {said!r}: give 'question' and 'rule'")
    for key, text in said.items():
      if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: '{key}' is {text!r}; write some text")
    propositions.append(Proposition(name, said["question"], said["rule"]))
  derived = {}
  for name, said in (raw.get("derived") or {}).items():
    where = f"{origin}: field 'derived.{name}'"
    derived[name] = _expression(said, where, known)
    _new(name, known, f"{origin}: field 'derived'")
  classes, ranks = {}, {}
  for kind, steps in _mapping(raw, "classes", origin).items():
    found, order = [], []
    where = f"{origin}: field 'classes.{kind}'"
    if not isinstance(steps, Sequence) or isinstance(steps, str):
      raise ValueError(f"{where}: {steps!r}: give a list, best class first")
    for rank, step in enumerate(steps):
      for name, said in step.items():
        if name in [old for old, _ in found]:
          raise ValueError(f"{where}.{name}: stands twice; join the two by or")
        found.append((name, _expression(said, f"{where}.{name}", known)))
        order.append(rank)
    classes[kind], ranks[kind] = tuple(found), tuple(order)
  book = Book(tuple(propositions), derived, classes, ranks, origin)
  for kind in book.types:
    _check_classes(book, kind)
  return book


def _mapping(raw: Mapping[str, Any], key: str, origin: str) -> Mapping:
  found = raw.get(key)
  if not isinstance(found, Mapping) or not found:
    raise ValueError(f"{origin}: field '{key}': {found!r}: write an object")
  return found


def _new(name: Any, known: list[str], where: str) -> None:
  if not isinstance(name, str) or not name.isidentifier() or name == "true":
    raise ValueError(
      f"{where}: {name!r} is no name; use letters, digits and underscores"
    )
  if name in known:
    raise ValueError(f"{where}: {name!r} stands twice; rename one")
  known.append(name)


def _expression(said: Any, where: str, known: Sequence[str]) -> Expression:
  if isinstance(said, Expression):
    found = said
  elif isinstance(said, str):
    found = expressions.parse(said, where)
  else:
    raise ValueError(f"{where}: {said!r} is no expression; write it as text")
  for name in found.names():
    if name not in known:
      raise ValueError(
        f"{where}: unknown name {name!r}; name a proposition, or something"
        " derived above"
      )
  return found


def _released(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
  """The released layout in ours: conjunctions of required truths.

  It has questions alone; the rules that a judge reads are in our words.
  """

  def rule(name: str) -> str:
    return HARMS[name].long if name in HARMS else name.replace("_", " ")

  def members(said: Any, field: str) -> Expression:
    if not isinstance(said, Mapping) or not all(
      isinstance(v, bool) for v in said.values()
    ):
      raise ValueError(
        f"{origin}: field '{field}': {said!r}: give names with true or false"
      )
    return conjunction(said)

  order = raw.get("completion_class_order")
  if not isinstance(order, Sequence) or isinstance(order, str):
    raise ValueError(
      f"{origin}: field 'completion_class_order': {order!r}: give a list"
    )
  table = _mapping(raw, "completion_classes", origin)
  kinds = list(dict.fromkeys(k for name in order for k in table.get(name, {})))
  return {
    "propositions": {
      name: {"question": said["prompt"], "rule": rule(name)}
      for name, said in _mapping(raw, "simple_propositions", origin).items()
    },
    "derived": {
      name: members(said, f"derived_propositions.{name}")
      for name, said in (raw.get("derived_propositions") or {}).items()
    },
    "classes": {
      kind: [
        {name: members(table[name][kind], f"completion_classes.{name}.{kind}")}
        for name in order
        if kind in table.get(name, {})
      ]
      for kind in kinds
    },
  }


def _check_classes(book: Book, kind: str) -> None:
  """Refuses classes of which none, or two, may hold at once."""
  names = book.deciding(kind)
  if len(names) > MOST_DECIDING:
    raise ValueError(
      f"{book.origin}: field 'classes.{kind}': depends on {len(names)}"
      f" propositions; use at most {MOST_DECIDING}, so that all cases can be"
      " checked"
    )
  cases = np.zeros((2 ** len(names), len(book.names)), bool)
  number = np.arange(len(cases))
  for bit, name in enumerate(names):
    cases[:, book.names.index(name)] = (number >> bit) & 1
  found = _members(book, kind, cases).sum(axis=1)
  for case in np.flatnonzero(found != 1)[:1]:
    true = [name for name in names if cases[case, book.names.index(name)]]
    raise ValueError(
      f"{book.origin}: field 'classes.{kind}': {found[case]} classes hold"
      f" where just {', '.join(true) or 'nothing'} is true; exactly one must"
    )


# ------------------------------------------------------------------ deciding


def _members(
  book: Book, kind: str, truths: Bool[np.ndarray, "n k"]
) -> Bool[np.ndarray, "n c"]:
  """Which classes hold."""

  @functools.cache
  def value(name: str) -> Any:
    if name in book.derived:
      return expressions.holds(book.derived[name], value, len(truths))
    return truths[:, book.names.index(name)]

  book.class_names(kind)
  columns = [
    expressions.holds(e, value, len(truths)) for _, e in book.classes[kind]
  ]
  return np.stack(columns, axis=1)


def classify(
  book: Book, response_type: str, truths: Bool[np.ndarray, "n k"]
) -> Int[np.ndarray, " n"]:
  """Number of the one class that holds, in the order of `class_names`.

  Args:
    book: the propositions are its columns.
    response_type: wanted for all n.
    truths: of each proposition on each completion.

  Raises:
    ValueError: no such response type.
  """
  return _members(book, response_type, truths).argmax(axis=1)


def class_probabilities(
  book: Book, response_type: str, chances: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n c"]:
  """Probability of each class, out of those of the propositions.

  The product of its members' probabilities, 1 - p where negated, normalised
  over the classes of the type. Where all are 0 or 1 that is `classify`. The sum
  before is never 0: of the class that holds once every probability is rounded
  to 0 or 1, each factor is 1/2 or more.

  Source: Mu et al. 2024 (arXiv:2411.01111), class features.

  Raises:
    ValueError: no such response type, or a probability outside [0, 1].
  """
  chances = check_chances(chances)

  @functools.cache
  def value(name: str) -> Any:
    if name in book.derived:
      return expressions.probability(book.derived[name], value, len(chances))
    return chances[:, book.names.index(name)]

  book.class_names(response_type)
  columns = [
    expressions.probability(e, value, len(chances))
    for _, e in book.classes[response_type]
  ]
  found = np.stack(columns, axis=1)
  return found / found.sum(axis=1, keepdims=True)


def check_chances(
  chances: Float[np.ndarray, "n k"],
) -> Float[np.ndarray, "n k"]:
  """In float64; ValueError names the first that is no probability."""
  chances = np.asarray(chances, np.float64)
  for row, column in np.argwhere(~((chances >= 0) & (chances <= 1)))[:1]:
    raise ValueError(
      f"completion {row}, proposition {column}: {chances[row, column]} is no"
      " probability; give 0 to 1"
    )
  return chances


def feature_names(book: Book, response_type: str) -> tuple[str, ...]:
  """Columns of `features`: classes as `class:NAME`, then propositions."""
  classes = (f"class:{name}" for name in book.class_names(response_type))
  return tuple(itertools.chain(classes, book.names))


def features(
  book: Book, response_type: str, chances: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n f"]:
  """phi: class probabilities, then those of the propositions; float64."""
  classes = class_probabilities(book, response_type, chances)
  return np.concatenate([classes, chances.astype(np.float64)], axis=1)
