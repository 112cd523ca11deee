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
from csrm_jax.data.sets import (
  beavertails,
  cosa,
  diasafety,
  guard_response_labels,
  hh_harmless,
  openai_moderation,
  pku_pairs,
  polyguard,
  preference_general,
  pyrit_scored,
  rbr_gold,
  rm_bench,
  saferlhf_responses,
  teen_safety_policies,
  xstest,
)

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


_NC, _BY, _APACHE = "CC BY-NC 4.0", "CC BY 4.0", "Apache-2.0"

SETS: Mapping[str, Set] = {
  "beavertails": Set(beavertails.FILES, beavertails.rows, _NC, False),
  "pku_pairs": Set(pku_pairs.FILES, pku_pairs.rows, _NC, False),
  "polyguard": Set(polyguard.FILES, polyguard.rows, _BY, True),
  "saferlhf_responses": Set(
    saferlhf_responses.FILES, saferlhf_responses.rows, _NC, False
  ),
  "teen_safety_policies": Set(
    teen_safety_policies.FILES, teen_safety_policies.rows, _APACHE, True
  ),
  "diasafety": Set(diasafety.FILES, diasafety.rows, _APACHE, True),
  "guard_response_labels": Set(
    guard_response_labels.FILES,
    guard_response_labels.rows,
    "MIT; ODC-BY",
    True,
  ),
  "xstest_completions": Set(xstest.FILES, xstest.rows, _BY, True),
  "pyrit_scored": Set(pyrit_scored.FILES, pyrit_scored.rows, "MIT", True),
  "rbr_gold": Set(rbr_gold.FILES, rbr_gold.rows, "MIT", True),
  "hh_harmless": Set(hh_harmless.FILES, hh_harmless.rows, "MIT", True),
  "preference_general": Set(
    preference_general.FILES,
    preference_general.rows,
    "Apache-2.0; MIT",
    True,
  ),
  "rm_bench": Set(rm_bench.FILES, rm_bench.rows, "ODC-BY", True),
  "cosa": Set(cosa.FILES, cosa.rows, "MIT; prompts CC BY-NC 4.0", False),
  "openai_moderation": Set(
    openai_moderation.FILES, openai_moderation.rows, "MIT", True
  ),
}


def code_of(name: str) -> list[Path]:
  """Source files that the rows of a set depend on: its own, and shared ones."""
  own = {inspect.getfile(found.make): key for key, found in SETS.items()}
  mine = inspect.getfile(SETS[name].make)
  here = Path(__file__).parent
  files = {str(p) for p in here.glob("*.py") if p.name != "__init__.py"}
  return sorted(map(Path, files - own.keys() | {mine}))
