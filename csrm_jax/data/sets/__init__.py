"""The public sets that can be read, by name.

Conversations and annotations come from the user's folder; only specs are
written here. Every choice hashes (seed, row), so that a row's specs depend on
the file as a whole at most (how often which rule is broken), never on its
order.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from csrm_jax.data.contract import Row
from csrm_jax.data.sets import beavertails, pku_pairs, polyguard

Make = Callable[..., Iterator[Row]]  # (path, *, seed, counts)


class Set(NamedTuple):
  """A public set.

  Attributes:
    files: what is read, below the data folder.
    make: rows out of the folder, the seed, and a dict that receives counts.
    licence: of the data.
    commercial: whether the licence permits commercial use.
  """

  files: tuple[str, ...]
  make: Make
  licence: str
  commercial: bool


SETS: Mapping[str, Set] = {
  "beavertails": Set(
    beavertails.FILES, beavertails.rows, "CC BY-NC 4.0", False
  ),
  "pku_pairs": Set(pku_pairs.FILES, pku_pairs.rows, "CC BY-NC 4.0", False),
  "polyguard": Set(polyguard.FILES, polyguard.rows, "CC BY 4.0", True),
}


def code_of(name: str) -> list[Path]:
  """Source files that the rows of a set depend on: its own, and shared ones."""
  own = {inspect.getfile(found.make): key for key, found in SETS.items()}
  mine = inspect.getfile(SETS[name].make)
  here = Path(__file__).parent
  files = {str(p) for p in here.glob("*.py") if p.name != "__init__.py"}
  return sorted(map(Path, files - own.keys() | {mine}))
