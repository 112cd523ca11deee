"""The safety spec: typed rules, their text, their meaning on a response."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import yaml
from pydantic import Field, StrictInt

from csrm_jax import markdown

Polarity = Literal["forbid", "allow", "require"]
Truth = Literal[0, 1] | None  # None: nobody looked

# A spec without rules permits everything, and says so: an empty policy would
# read like a forgotten one.
EMPTY_TEXT = "No rules: everything is allowed."

_LABELS = {"forbid": "Disallowed", "allow": "Allowed", "require": "Required"}
_RESPONSES = {
  "comply": "answer fully",
  "hard": "refuse briefly",
  "soft": "refuse kindly and offer help",
}


class _Frozen(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Subcategory(_Frozen):
  """One kind of behaviour under a rule. `severity` grows with harm, from 1."""

  id: Annotated[str, Field(min_length=1)]
  title: Annotated[str, Field(min_length=1)]
  severity: Annotated[StrictInt, Field(ge=1)] = 1


class Rule(_Frozen):
  """One rule of a spec.

  Attributes:
    level: for a forbid rule with sub-categories: those of this severity or
      more are forbidden, milder ones allowed. None: all are forbidden.
    response_type: the wanted behaviour: "comply" (answer), "hard" (refuse
      briefly), "soft" (refuse kindly, offer help).
    domain: prefix of the sub-category ids in annotations; the rule's own id
      if empty.
  """

  id: Annotated[str, Field(min_length=1)]
  title: str = ""
  guideline: str = ""
  polarity: Polarity
  level: Annotated[StrictInt, Field(ge=1)] | None = None
  subcategories: tuple[Subcategory, ...] = ()
  response_type: Literal["comply", "hard", "soft"] | None = None
  domain: str = ""

  @pydantic.model_validator(mode="after")
  def _check(self) -> "Rule":
    if not (self.title or self.guideline or self.subcategories):
      raise ValueError(
        "field 'guideline': '' says nothing; give a title, a guideline or "
        "subcategories"
      )
    if self.level is not None and self.polarity != "forbid":
      raise ValueError(
        f"field 'level': {self.level} with polarity '{self.polarity}'; only "
        "a forbid rule has a level: remove it"
      )
    if self.level is not None and not self.subcategories:
      raise ValueError(
        f"field 'level': {self.level} without subcategories; list them with "
        "their severities, or remove the level"
      )
    _no_duplicates("subcategories", (s.id for s in self.subcategories))
    return self

  def split(self) -> tuple[list[Subcategory], list[Subcategory]]:
    """(forbidden or required, allowed) sub-categories, most severe first."""
    ranked = sorted(self.subcategories, key=lambda s: -s.severity)
    if self.polarity == "allow":
      return [], ranked
    level = self.level or 1
    strict = [s for s in ranked if s.severity >= level]
    return strict, [s for s in ranked if s.severity < level]

  def turned(self, polarity: Polarity) -> "Rule":
    """The rule on all that it is about, with another polarity."""
    update = {"polarity": polarity, "level": None, "response_type": None}
    return self.model_copy(update=update)

  def render(self) -> str:
    """`Title. Guideline. Disallowed: a; b. Allowed: c.`, parts that exist."""
    label = _LABELS[self.polarity]
    strict, allowed = self.split()
    parts = [_sentence(self.title)]
    if self.subcategories:
      parts.append(_sentence(self.guideline))
      parts.append(_listing(label, [s.title for s in strict]))
      parts.append(_listing("Allowed", [s.title for s in allowed]))
    elif self.guideline:
      parts.append(_listing(label, [self.guideline]))
    else:
      parts = [_listing(label, [self.title])]
    # "Required: answer ..." already says how to respond.
    if self.response_type and (self.polarity, self.response_type) != (
      "require",
      "comply",
    ):
      parts.append(f"Response: {_RESPONSES[self.response_type]}.")
    return " ".join(p for p in parts if p)


class Spec(_Frozen):
  """An ordered set of rules, or a text taken as it stands.

  Exactly one of `rules` and `text` says something; both empty is the spec
  that permits everything.
  """

  rules: tuple[Rule, ...] = ()
  text: str = ""
  domain: str = ""
  version: str = ""
  spec_id: str = ""

  @pydantic.model_validator(mode="after")
  def _check(self) -> "Spec":
    if self.rules and self.text:
      raise ValueError(
        f"field 'text': {_short(self.text)} beside rules; keep one of the two"
      )
    _no_duplicates("rules", (r.id for r in self.rules))
    return self

  @classmethod
  def read(cls, path: str | Path) -> "Spec":
    """Reads a spec file: .yaml .yml .json, .md .markdown, else plain text.

    Raises:
      ValueError: file, rule, field, value and remedy of what is wrong.
    """
    path = Path(path)
    try:
      text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
      raise ValueError(
        f"{path}: {error.strerror}; give the path of a .yaml, .md or .txt spec"
      ) from None
    except UnicodeDecodeError as error:
      raise ValueError(
        f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
      ) from None
    text = text.replace("\r\n", "\n").strip("\n")
    if not text.strip():
      raise ValueError(f"{path}: empty spec file; write at least one rule")
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".json"):
      spec = cls.parse(_load_yaml(text, str(path)), origin=str(path))
      if not spec.rules and not spec.text:
        raise ValueError(
          f"{path}: field 'rules': empty; write at least one rule"
        )
    elif suffix in (".md", ".markdown"):
      rules = markdown.rules(text, origin=str(path))
      spec = cls.parse(rules, str(path)) if rules else cls(text=text)
    else:
      spec = cls(text=text)
    return (
      spec if spec.spec_id else spec.model_copy(update={"spec_id": path.stem})
    )

  @classmethod
  def parse(
    cls,
    source: "str | Mapping[str, Any] | list | Spec",
    origin: str = "spec",
  ) -> "Spec":
    """A spec out of an object with rules, a list of rules, or a text.

    A text is never guessed to be YAML, Markdown or a path: it renders
    verbatim, so that whoever passes the same text elsewhere scores the same.

    Args:
      source: what to read.
      origin: file (and line) for error messages.

    Raises:
      ValueError: origin, rule, field, value and remedy of what is wrong.
    """
    if isinstance(source, Spec):
      return source
    if isinstance(source, str):
      if not source.strip():
        raise ValueError(f"{origin}: empty spec; write at least one rule")
      return cls(text=source)
    if isinstance(source, list):
      source = {"rules": source}
    if not isinstance(source, Mapping):
      raise ValueError(
        f"{origin}: {_short(source)} is no spec; give text, a list of rules "
        "or an object with the key 'rules'"
      )
    if not source.get("text") and "rules" not in source:
      keys = ", ".join(map(str, source)) or "none"
      raise ValueError(
        f"{origin}: field 'rules' is missing (keys found: {keys}); add a list "
        "of rules"
      )
    try:
      return cls.model_validate(dict(source))
    except pydantic.ValidationError as error:
      raise ValueError(_explain(error, source, origin)) from None

  def lines(self) -> tuple[str, ...]:
    """The rendered rules, or the lines of a plain text: what may be cut."""
    if self.text:
      return tuple(self.text.split("\n"))
    return tuple(
      f"S{i}: {rule.render()}" for i, rule in enumerate(self.rules, 1)
    ) or (EMPTY_TEXT,)

  def keep(self, indices: Iterable[int]) -> "Spec":
    """The spec with only these `lines()`, in order, numbered anew."""
    kept = sorted(set(indices))
    if self.text:
      lines = self.text.split("\n")
      number = re.compile(r"S\d+: ")
      if all(number.match(line) for line in lines):  # rendered rules
        texts = [lines[i].split(": ", 1)[1] for i in kept]
        numbered = [f"S{n}: {text}" for n, text in enumerate(texts, 1)]
        return self.model_copy(update={"text": "\n".join(numbered)})
      return self.model_copy(update={"text": "\n".join(lines[i] for i in kept)})
    return self.model_copy(update={"rules": tuple(self.rules[i] for i in kept)})

  def render(self) -> str:
    """The policy text that the model reads: one rule a line."""
    return "\n".join(self.lines())

  def __str__(self) -> str:
    return self.render()

  def fingerprint(self) -> str:
    """`sha256:` and the hex digest of the rendered text."""
    return "sha256:" + hashlib.sha256(self.render().encode()).hexdigest()


class _Cover(NamedTuple):
  """Specificity (0 rule, 1 sub-category) at which a key is ruled on."""

  forbid: int = -1
  allow: int = -1


def complies(
  spec: Spec,
  violated: Mapping[str, Truth],
  *,
  refusal: Truth = None,
  missing: Truth = None,
) -> Literal[1, 0, -1]:
  """Whether an annotated response complies with a spec; -1 if unknown.

  Keys of `violated` are sub-category ids, plain ("minors") or with their
  domain ("alcohol.minors"), or the id or domain of a rule without
  sub-categories; such a rule covers every key of its domain. A forbid rule
  wins over a broader permission and yields to a narrower one; at equal
  breadth the two contradict each other and the verdict is unknown. A require
  rule is unmet where its id or one of its sub-categories is 1; without such
  keys a `response_type` decides by `refusal` ("comply": unmet by a refusal).


  Args:
    spec: a spec with rules; of a plain text nothing is known.
    violated: 1 the response does this (or, for a requirement, fails it), 0 it
      does not, None unknown.
    refusal: whether the response refuses.
    missing: truth of the keys that `violated` leaves out.

  Returns:
    0 if a forbidden key is 1 or a requirement is unmet; else -1 if one of
    them is unknown or contradictory; else 1.
  """
  if spec.text:
    return -1
  verdicts = [
    _requirement(rule, violated, refusal, missing)
    for rule in spec.rules
    if rule.polarity == "require"
  ]
  for key in _keys(spec, violated):
    value = violated.get(key, missing)
    cover = _coverage(spec, key)
    if value == 0 or cover.forbid < 0 or cover.allow > cover.forbid:
      continue
    known = value == 1 and cover.allow < cover.forbid
    verdicts.append(0 if known else -1)
  return 0 if 0 in verdicts else -1 if -1 in verdicts else 1


def _sub_keys(rule: Rule, sub: Subcategory) -> tuple[str, str]:
  return sub.id, f"{rule.domain or rule.id}.{sub.id}"


def _own_keys(rule: Rule) -> set[str]:
  """Keys under which a requirement is annotated as met (0) or unmet (1)."""
  names = {n for s in rule.subcategories for n in _sub_keys(rule, s)}
  return names | {rule.id, f"{rule.domain or rule.id}.{rule.id}"}


def _is_broad(rule: Rule, key: str) -> bool:
  """Whether `key` names the rule itself, or something within its domain."""
  names = {rule.id, rule.domain or rule.id}
  if rule.subcategories:
    return key in names
  return key in names or key.rsplit(".", 1)[0] in names


def _keys(spec: Spec, violated: Mapping[str, Truth]) -> list[str]:
  """Annotated keys, and one key for each forbidden thing without any."""
  required = [r for r in spec.rules if r.polarity == "require"]
  ours = {key for rule in required for key in _own_keys(rule)}
  keys = [key for key in violated if key not in ours]
  for rule in spec.rules:
    if rule.polarity != "forbid":
      continue
    for sub in rule.split()[0]:
      names = _sub_keys(rule, sub)
      if not any(name in violated for name in names):
        keys.append(names[1])
    if not rule.subcategories and not any(_is_broad(rule, k) for k in keys):
      keys.append(rule.domain or rule.id)
  return keys


def _coverage(spec: Spec, key: str) -> _Cover:
  forbid = allow = -1
  for rule in spec.rules:
    if rule.polarity == "require":
      continue
    strict, allowed = rule.split()
    if any(key in _sub_keys(rule, s) for s in strict):
      forbid = max(forbid, 1)
    if any(key in _sub_keys(rule, s) for s in allowed):
      allow = max(allow, 1)
    if _is_broad(rule, key):
      # With a level, a key of the whole rule does not say which side it is on.
      if strict or (rule.polarity == "forbid" and not rule.subcategories):
        forbid = max(forbid, 0)
      if allowed or rule.polarity == "allow":
        allow = max(allow, 0)
  return _Cover(forbid, allow)


def _requirement(
  rule: Rule,
  violated: Mapping[str, Truth],
  refusal: Truth,
  missing: Truth,
) -> Literal[1, 0, -1]:
  values = [violated[k] for k in _own_keys(rule) if k in violated]
  if not values and rule.response_type:
    unmet = refusal if rule.response_type == "comply" else _negate(refusal)
    values = [unmet]
  values = values or [missing]
  return 0 if 1 in values else -1 if None in values else 1


def _negate(truth: Truth) -> Truth:
  return None if truth is None else 0 if truth else 1


def _no_duplicates(field: str, ids: Iterable[str]) -> None:
  for name, count in Counter(ids).items():
    if count > 1:
      raise ValueError(
        f"field '{field}': id {name!r} occurs {count} times; make ids unique"
      )


def _flat(text: str) -> str:
  return " ".join(text.split())


def _sentence(text: str) -> str:
  text = _flat(text).rstrip(" .;")
  return text if not text or text[-1] in "?!:" else text + "."


def _listing(label: str, items: list[str]) -> str:
  items = [_flat(i).rstrip(" .;") for i in items]
  return f"{label}: {'; '.join(items)}." if items else ""


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _explain(
  error: pydantic.ValidationError, source: Mapping[str, Any], origin: str
) -> str:
  """The first validation error: origin, rule, field, value, remedy."""
  first: Any = error.errors()[0]
  value: Any = source
  where, names = origin, []
  for step in first["loc"]:
    if isinstance(step, int):
      value = list(value)[step]
      kind = {"rules": "rule", "subcategories": "subcategory"}[names.pop()]
      name = value.get("id") if isinstance(value, Mapping) else None
      where += f": {kind} {step + 1}" + (f" ({name!r})" if name else "")
    else:
      names.append(step)
      value = value.get(step) if isinstance(value, Mapping) else value
  if first["type"] == "value_error":
    return f"{where}: {first['ctx']['error']}"
  remedy = {
    "extra_forbidden": "unknown key: remove it or correct its spelling",
    "missing": "missing: add it",
    "literal_error": "must be " + first.get("ctx", {}).get("expected", ""),
    "greater_than_equal": "must be at least 1",
    "int_type": "must be a whole number, without quotes",
    "string_type": "must be text: put it in quotes",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "model_type": "must be an object with keys",
  }.get(first["type"], first["msg"])
  field = f" field '{names[-1]}':" if names else ""
  shown = "" if first["type"] == "missing" else f" {_short(value)}:"
  return f"{where}:{field}{shown} {remedy}"


class _UniqueKeys(yaml.SafeLoader):
  """A YAML loader that refuses a key given twice, which YAML would drop."""

  def construct_mapping(self, node: Any, deep: bool = False) -> dict:
    seen = set()
    for key, _ in node.value:
      if not isinstance(key, yaml.ScalarNode):
        continue
      if key.value in seen:
        raise yaml.MarkedYAMLError(
          problem=f"key {key.value!r} occurs twice; keep one",
          problem_mark=key.start_mark,
        )
      seen.add(key.value)
    return super().construct_mapping(node, deep)


def _load_yaml(text: str, origin: str) -> Any:
  try:
    return yaml.load(text, _UniqueKeys)
  except yaml.MarkedYAMLError as error:
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    raise ValueError(
      f"{origin}: line {line}: not YAML: {error.problem}; correct the line"
    ) from None
  except yaml.YAMLError as error:
    raise ValueError(f"{origin}: not YAML: {error}") from None
