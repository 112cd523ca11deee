"""Collectives in the text of a compiled program, counted with its loops."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")


class Collective(NamedTuple):
  """One instruction.

  Attributes:
    kind: one of KINDS.
    shape: of its largest array, per chip.
    dtype: of that array, as HLO writes it.
    bytes: of that array.
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

  Args:
    text: of `compiled.as_text()`.
  """
  bodies = _computations(text)
  times = _times(text, bodies)
  found = []
  for name, body in bodies.items():
    for made in _OP.finditer(body):
      result, kind, _, rest = made.groups()
      arrays = list(_arrays(result + rest.split("replica_groups")[0]))
      if not arrays:
        continue
      dtype, shape = max(arrays, key=_size)
      line = made.group(0)
      op = re.search(r'op_name="([^"]*)"', line)
      found.append(
        Collective(
          kind=kind,
          shape=shape,
          dtype=dtype,
          bytes=_size((dtype, shape)),
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
      trips: int | None = 1
      if " while(" in line:
        known = _TRIPS.search(line)
        trips = int(known[1]) if known else None
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


def _arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
  for dtype, sizes in _ARRAY.findall(text):
    yield dtype, tuple(int(n) for n in sizes.split(",") if n)


def _size(array: tuple[str, tuple[int, ...]]) -> int:
  return _BYTES[array[0]] * math.prod(array[1])


def _group(line: str) -> int:
  listed = _LISTED.search(line)
  if listed:
    return len(listed[1].split(","))
  iota = _IOTA.search(line)
  return int(iota[2]) if iota else 0
