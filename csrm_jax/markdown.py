"""Reads rules out of Markdown lists and headings."""

import re
from typing import Any, NamedTuple

Leaf = tuple[str | None, str]  # (forbid | allow | require | unmarked, text)

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


def _polarity(text: str) -> Leaf:
  """(polarity, the rest) of `Disallowed: x`, `Never x`; (None, text) else."""
  text = text.replace("**", "").strip()
  for polarity, words in _SAYS.items():
    match = re.match(rf"({words})\s*:\s*", text, re.IGNORECASE)
    if match:
      return polarity, text[match.end() :]
  for polarity, words in _LEADS.items():
    match = re.match(rf"({words})\s+(?=\S)", text, re.IGNORECASE)
    if match and not _TURN.search(text[match.end() :].rstrip(".")):
      return polarity, text[match.end() :]
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


def rules(text: str, *, origin: str = "text") -> list[dict[str, Any]]:
  """Rules of a Markdown list, or of headings with lists.

  Every item must state its polarity (a label such as `Allowed:`, a heading or
  a line of that name above it, or a lead such as `Never`): a wrong guess would
  turn a rule round, so a text with an unmarked item has no rules here.

  Args:
    text: the file.
    origin: its name, for errors.

  Returns:
    Objects that `Spec.parse` reads; [] if the text is to be kept verbatim.

  Raises:
    ValueError: severities in the text contradict its labels.
  """
  found, taken = [], set()
  for title, guideline, leaves in _blocks(text):
    for polarities in (("forbid", "allow"), ("require",)):
      part = [(p, t) for p, t in leaves if p in polarities]
      if part:
        name = _unique(_slug(title or part[0][1]), taken)
        found.append(_rule(name, title, guideline, part, origin))
    if any(polarity is None for polarity, _ in leaves):
      return []
  return found


def _blocks(
  text: str,
) -> list[tuple[str, str, list[Leaf]]]:
  """(title, guideline, leaves) a rule; [] without structure."""
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
      return []  # prose outside any rule
  return [_settle(*block) for block in blocks]


def _settle(
  title: str, prose: list[str], leaves: list
) -> tuple[str, str, list[Leaf]]:
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
  leaves: list[Leaf],
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
