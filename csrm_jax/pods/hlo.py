"""Collectives in the text of a compiled program, counted with its loops."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "f64": 8,
  "s64": 8,
  "u64": 8,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(
  rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$", flags=re.MULTILINE
)
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations|called_computations)"
  r"=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
# Lines of a loop that the compiler for TPUs leaves without a known length.
_WHILE = re.compile(r" while\(%?([\w.\-]+)\)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_LESS = re.compile(
  r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT"
)
_ADD = re.compile(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)")
_SCALAR = re.compile(r" constant\((\d+)\)")
_ELEMENT = re.compile(r" get-tuple-element\(.*\), index=(\d+)")
_SAME = re.compile(r" (?:copy|bitcast)\(%?([\w.\-]+)\)")
_TUPLE = re.compile(r" tuple\((.*?)\)(?:,|$)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SCATTERED = "all-reduce-scatter"
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")


class Collective(NamedTuple):
  """One instruction.

  Attributes:
    kind: one of KINDS.
    shape: of the largest array that it makes, per chip.
    dtype: of that array, as HLO writes it.
    bytes: of all arrays that it makes; a reduce-scatter's: that it takes.
    group: chips that take part together; 0 if the text does not say.
    times: how often a step runs it; None inside a loop of unknown length.
    op: where it comes from, as JAX named it; "" if unknown.
  """

  kind: str
  shape: tuple[int, ...]
  dtype: str
  bytes: int
  group: int
  times: int | None
  op: str

  @property
  def moved(self) -> float:
    """Bytes that a chip sends a time, by ring algorithms."""
    others = (self.group - 1) / self.group if self.group else 1.0
    return self.bytes * others * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
  """Every collective of an HLO module's text.

  What runs beside other work stands in the text several times, as its start,
  its end and in what it hides behind, with one channel: it counts once.

  Args:
    text: of `compiled.as_text()`.
  """
  bodies = _computations(text)
  times = _times(text, bodies)
  found = []
  seen: set[Any] = set()
  for name, body in bodies.items():
    for made in _OP.finditer(body):
      result, kind, start, rest = made.groups()
      line = made.group(0)
      if name.startswith(_SCATTERED):
        kind = "reduce-scatter"  # as XLA for TPUs fuses one
      taken = list(_arrays(rest.split("replica_groups")[0]))
      given = list(_arrays(result))
      if start:  # gives back what it takes, too, and the state of the wait
        given = sorted(filter(lambda a: a[1], given), key=_size)
        given = given[(len(given) + 1) // 2 :] or given
      arrays = max(given, taken, key=lambda a: sum(map(_size, a)))
      if not arrays:
        continue
      channel = _CHANNEL.search(line)
      same = (kind, channel[1] if channel else made.span(), *sorted(arrays))
      if same in seen:
        continue
      seen.add(same)
      dtype, shape = max(arrays, key=_size)
      op = re.search(r'op_name="([^"]*)"', line)
      found.append(
        Collective(
          kind=kind,
          shape=shape,
          dtype=dtype,
          bytes=sum(map(_size, arrays)),
          group=_group(line),
          times=times.get(name, 1),
          op=op[1] if op else "",
        )
      )
  return found


def totals(found: list[Collective]) -> dict[str, dict[str, float | None]]:
  """By kind: instructions, and GiB a chip sends in a step.

  The bytes are None where a loop's length is unknown: then a number would be
  too small by an unknown factor.
  """
  by_kind: dict[str, dict[str, float | None]] = {}
  for kind in KINDS:
    some = [c for c in found if c.kind == kind]
    if not some:
      continue
    known = all(c.times is not None for c in some)
    sent = sum((c.moved * (c.times or 0) for c in some), 0.0) / 2**30
    by_kind[kind] = {
      "instructions": float(len(some)),
      "gib": sent if known else None,
    }
  return by_kind


def _computations(text: str) -> dict[str, str]:
  """Body of each computation by name."""
  bodies: dict[str, list[str]] = {}
  current = None
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = head[2]
      bodies[current] = []
    elif line.startswith("}"):
      current = None
    elif current is not None:
      bodies[current].append(line)
  return {name: "\n".join(lines) for name, lines in bodies.items()}


def _times(text: str, bodies: dict[str, str]) -> dict[str, int | None]:
  """How often each computation runs, None where a loop does not say."""
  callers: dict[str, list[tuple[str, int | None]]] = collections.defaultdict(
    list
  )
  for name, body in bodies.items():
    for line in body.splitlines():
      trips = _trips(line, body, bodies) if " while(" in line else 1
      for called in _CALLED.finditer(line):
        for one in (called[1] or called[2]).split(","):
          one = one.strip().lstrip("%")
          if one in bodies:
            callers[one].append((name, trips))
  entry = re.search(r"^ENTRY %?([\w.\-]+)", text, flags=re.MULTILINE)
  done: dict[str, int | None] = {entry[1]: 1} if entry else {}

  def of(name: str) -> int | None:
    if name not in done:
      done[name] = 0  # HLO has no recursion
      parts = [
        None if trips is None or (above := of(caller)) is None
        else trips * above
        for caller, trips in callers[name]
      ]  # fmt: skip
      done[name] = None if None in parts else sum(p or 0 for p in parts)
    return done[name]

  return {name: of(name) for name in bodies}


def _trips(line: str, body: str, bodies: Mapping[str, str]) -> int | None:
  """How often a `while` runs: as told, or as its counter shows.

  A counter starts at a constant, gains one a turn and is compared with a
  constant; None if the text is of any other form.

  Args:
    line: the instruction.
    body: the computation that it stands in.
    bodies: all computations by name.
  """
  known = _TRIPS.search(line)
  if known:
    return int(known[1])
  names = [found and found[1] for found in (
    _WHILE.search(line), _CONDITION.search(line), _BODY.search(line)
  )]  # fmt: skip
  state, test, turn = (name or "" for name in names)
  less = _LESS.search(bodies.get(test, ""))
  if not less:
    return None
  at = _ELEMENT.search(_defined(less[1], bodies[test]))
  stop = _SCALAR.search(_defined(less[2], bodies[test]))
  if not (at and stop):
    return None
  index = int(at[1])
  start = _SCALAR.search(_element(_defined(state, body), index, body))
  inside = bodies.get(turn, "")
  root = re.search(r"^\s*ROOT .*$", inside, flags=re.MULTILINE)
  gain = _ADD.search(_element(root[0] if root else "", index, inside))
  if not (start and gain):
    return None
  counter = _ELEMENT.search(_defined(gain[1], inside))
  one = _SCALAR.search(_defined(gain[2], inside))
  if not (counter and one and int(counter[1]) == index and int(one[1]) == 1):
    return None
  return int(stop[1]) - int(start[1])


def _defined(name: str, body: str) -> str:
  """The line that defines a value, behind its copies; "" if there is none."""
  for _ in range(8):
    pattern = rf"^\s*(?:ROOT )?%?{re.escape(name)} = .*$"
    found = re.search(pattern, body, flags=re.MULTILINE)
    if not found:
      return ""
    same = _SAME.search(found[0])
    if not same:
      return found[0]
    name = same[1]
  return ""


def _element(line: str, index: int, body: str) -> str:
  """The line that defines an element of the tuple made on `line`."""
  made = _TUPLE.search(re.sub(r"/\*.*?\*/", "", line))
  names = made[1].split(",") if made else []
  if index >= len(names):
    return ""
  return _defined(names[index].strip().lstrip("%"), body)


def _arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
  for dtype, sizes in _ARRAY.findall(text):
    yield dtype, tuple(int(n) for n in sizes.split(",") if n)


def _size(array: tuple[str, tuple[int, ...]]) -> int:
  return _BYTES[array[0]] * math.prod(array[1])


def _group(line: str) -> int:
  listed = _LISTED.search(line)
  if listed:
    return len(listed[1].split(","))
  named = _NAMED.search(line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", named[2]))
  iota = _IOTA.search(line)
  return int(iota[2]) if iota else 0
