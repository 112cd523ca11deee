"""The stages of `data.stages`: which families are trained on first."""

from collections.abc import Iterable
from typing import NamedTuple

from csrm_jax.data.contract import Key
from csrm_jax.data.pieces import Piece


class Candidate(NamedTuple):
  """A family that a stage may take; `key` and `source` of its first row."""

  key: Key
  family: str
  source: str
  tokens: int


class Stage(NamedTuple):
  """A stage of `data.stages`: which sources, and room for how many families."""

  sources: frozenset[str]
  room: int


def parse_stages(text: str) -> list[Stage]:
  """Stages out of "source,source:families;source:families".

  Raises:
    ValueError: a stage without sources, or without a positive number.
  """
  stages = []
  for part in filter(None, (p.strip() for p in text.split(";"))):
    names, _, number = part.rpartition(":")
    sources = frozenset(filter(None, (n.strip() for n in names.split(","))))
    if not sources or not number.strip().isdecimal() or int(number) < 1:
      raise ValueError(
        f"--config.data.stages={text}: {part!r} is no stage; write "
        "source,source:families, for example synthetic/presence:36"
      )
    stages.append(Stage(sources, int(number)))
  return stages


def candidate(name: str, pieces: Iterable[Piece]) -> Candidate:
  """What the stages must know of a family."""
  pieces = list(pieces)
  first = min(pieces, key=lambda p: p.key)
  return Candidate(first.key, name, first.source, sum(p.tokens for p in pieces))


def earliest(
  candidates: Iterable[Candidate], stages: list[Stage]
) -> list[Candidate]:
  """Those that a stage can reach: of each source as many as there is room.

  Parts may be reduced first: earliest(a + b) = earliest(earliest(a) + b).
  """
  room = sum(stage.room for stage in stages)
  wanted = frozenset().union(*(stage.sources for stage in stages))
  found: dict[str, list[Candidate]] = {}
  for one in candidates:
    if one.source in wanted:
      mine = found.setdefault(one.source, [])
      mine.append(one)
      if len(mine) > 2 * room:
        mine.sort()
        del mine[room:]
  return sorted(one for mine in found.values() for one in sorted(mine)[:room])


def staged(
  candidates: Iterable[Candidate], stages: list[Stage]
) -> dict[str, tuple[int, int]]:
  """(stage, tokens) of the families that stages take, in order of their keys.

  A family goes to the first stage with room for its source.
  """
  left = [stage.room for stage in stages]
  found: dict[str, tuple[int, int]] = {}
  for one in earliest(candidates, stages):
    for i, stage in enumerate(stages):
      if left[i] and one.source in stage.sources:
        left[i] -= 1
        found[one.family] = (i, one.tokens)
        break
  return found
