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
      spec = _read_markdown(text, str(path))
    else:
      spec = cls(text=text)
    return (
      spec if spec.spec_id else spec.model_copy(update={"spec_id": path.stem})
    )

  @classmethod
  def parse(
    cls, source: "str | Mapping[str, Any] | list | Spec", origin: str = "spec"
  ) -> "Spec":
    """A spec out of an object with rules, a list of rules, or text.

    Text that is YAML or JSON with a `rules` key, or a Markdown list in which
    every item states its polarity, becomes rules; any other text is kept and
    renders verbatim. `Spec(text=...)` never looks for structure.

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
      if re.search(r"^\s*[{\"]?\"?rules\"?\s*:", source, re.MULTILINE):
        return cls.parse(_load_yaml(source, origin), origin)
      return _read_markdown(source, origin)
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
      return self.model_copy(update={"text": "\n".join(lines[i] for i in kept)})
    return self.model_copy(update={"rules": tuple(self.rules[i] for i in kept)})

  def render(self) -> str:
    """The policy text that the model reads: one rule a line."""
    return "\n".join(self.lines())

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
  first = error.errors()[0]
  where, value, names = origin, source, []
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


# -- Markdown -------------------------------------------------------------

_SAYS = {
  "forbid": r"disallowed|forbidden|prohibited|not allowed|never allowed",
  "allow": r"allowed|permitted",
  "require": r"required|mandatory",
}
_LEADS = {
  "forbid": r"do not|don't|must not|never|no|avoid",
  "allow": r"you may|may",
  "require": r"always|must",
}
_SEVERITY = re.compile(r"\s*\(severity:?\s*(\d+)\)\s*$", re.IGNORECASE)
# An item with a second clause may turn its meaning round: kept as text.
_TURN = re.compile(
  r"[.;!?]\s|\b(but|instead|however|rather|unless|always|only|except)\b",
  re.IGNORECASE,
)


class _Item(NamedTuple):
  indent: int
  text: str


def _polarity(text: str) -> tuple[Polarity | None, str]:
  """(polarity, the rest) of `Disallowed: x`, `Never x`; (None, text) else."""
  text = text.replace("**", "").strip()
  for polarity, words in _SAYS.items():
    match = re.match(rf"({words})\s*:\s*", text, re.IGNORECASE)
    if match:
      return polarity, text[match.end() :]  # type: ignore[return-value]
  for polarity, words in _LEADS.items():
    match = re.match(rf"({words})\s+(?=\S)", text, re.IGNORECASE)
    if match and not _TURN.search(text[match.end() :].rstrip(".")):
      return polarity, text[match.end() :]  # type: ignore[return-value]
  return None, text


def _slug(text: str) -> str:
  words = re.sub(r"\W+", "_", text.lower()).strip("_").split("_")
  return "_".join(words[:6]) or "rule"


def _unique(name: str, taken: set[str]) -> str:
  candidate, n = name, 2
  while candidate in taken:
    candidate, n = f"{name}_{n}", n + 1
  taken.add(candidate)
  return candidate


def _read_markdown(text: str, origin: str) -> Spec:
  """Rules of a Markdown list or of headings with lists; else the text.

  Every item must state its polarity (a label such as `Allowed:`, a heading or
  a line of that name above it, or a lead such as `Never`): a wrong guess would
  turn a rule round, so a text with an unmarked item is kept verbatim.
  """
  blocks = _blocks(text)
  if blocks is None:
    return Spec(text=text)
  rules, taken = [], set()
  for title, guideline, leaves in blocks:
    if any(polarity is None for polarity, _ in leaves):
      return Spec(text=text)
    for polarities in (("forbid", "allow"), ("require",)):
      part = [(p, t) for p, t in leaves if p in polarities]
      if part:
        name = _unique(_slug(title or part[0][1]), taken)
        rules.append(_rule(name, title, guideline, part, origin))
  if not rules:
    return Spec(text=text)
  return Spec.parse({"rules": rules}, origin)


def _blocks(
  text: str,
) -> list[tuple[str, str, list[tuple[Polarity | None, str]]]] | None:
  """(title, guideline, [(polarity, text)]) a rule; None without structure."""
  blocks: list = []
  title, section = "", None  # heading over the lines; polarity over the items
  stack: list[_Item] = []
  for line in text.split("\n"):
    if not line.strip():
      continue
    heading = re.match(r"(#+)\s+(.*?)\s*#*$", line)
    item = re.match(r"(\s*)(?:[-*+]|\d+[.)])\s+(.*\S)", line)
    if heading:
      polarity, rest = _polarity(heading[2].rstrip(":") + ":")
      section = polarity if polarity and not rest else None
      title = "" if section or len(heading[1]) == 1 else heading[2]
      stack = []
      if title:
        blocks.append((title, [], []))
    elif item:
      indent, body = len(item[1]), item[2]
      while stack and stack[-1].indent >= indent:
        stack.pop()
      if title or stack:
        polarity, body = _polarity(body)
        polarity = polarity or section
        blocks[-1][2].append((polarity, body))
      else:
        blocks.append(("", [], [(_polarity(body)[0] or section, body)]))
        stack.append(_Item(indent, body))
    elif title or stack:
      label, rest = _polarity(line)
      if label and not rest:
        section = label
      elif label and title:
        blocks[-1][2].extend(
          (label, part) for part in re.split(r";\s*", rest.rstrip(" ."))
        )
      elif blocks[-1][2]:
        polarity, body = blocks[-1][2][-1]
        blocks[-1][2][-1] = (polarity, f"{body} {line.strip()}")
      else:
        blocks[-1][1].append(line.strip())
    else:
      return None  # prose outside any rule
  return [_settle(*block) for block in blocks]


def _settle(
  title: str, prose: list[str], leaves: list
) -> tuple[str, str, list[tuple[Polarity | None, str]]]:
  """Sorts out which text of a block is title, guideline and leaf."""
  guideline = " ".join(prose)
  if not title and len(leaves) > 1:  # an item over nested items
    title, leaves = leaves[0][1].rstrip(":"), leaves[1:]
  elif not title:
    polarity, body = leaves[0]
    stated, rest = _polarity(body)
    leaves = [(stated or polarity, rest)]
  elif not leaves:
    leaves, guideline = [_polarity(guideline)], ""
  return title, guideline, leaves


def _rule(
  name: str,
  title: str,
  guideline: str,
  leaves: list[tuple[Polarity, str]],
  origin: str,
) -> dict[str, Any]:
  polarities = {polarity for polarity, _ in leaves}
  mixed = len(polarities) > 1
  if not mixed and len(leaves) == 1 and not _SEVERITY.search(leaves[0][1]):
    return {
      "id": name,
      "title": title,
      "guideline": " ".join(filter(None, (guideline, leaves[0][1]))),
      "polarity": leaves[0][0],
    }
  subcategories, taken = [], set()
  for polarity, body in leaves:
    match = _SEVERITY.search(body)
    severity = 2 if mixed and polarity == "forbid" else 1
    body = _SEVERITY.sub("", body)
    subcategories.append(
      {
        "id": _unique(_slug(body), taken),
        "title": body,
        "severity": int(match[1]) if match else severity,
      }
    )
  rule: dict[str, Any] = {
    "id": name,
    "title": title,
    "guideline": guideline,
    "polarity": "forbid" if mixed else leaves[0][0],
    "subcategories": subcategories,
  }
  if mixed:
    pairs = list(zip(leaves, subcategories, strict=True))
    level = min(s["severity"] for (p, _), s in pairs if p == "forbid")
    worst = max(s["severity"] for (p, _), s in pairs if p == "allow")
    if worst >= level:
      raise ValueError(
        f"{origin}: rule {title!r}: field 'severity': {worst} is allowed but "
        f"{level} is disallowed; what is disallowed must be more severe"
      )
    rule["level"] = level
  return rule
