"""The public sets that can be read, by name.

Conversations and annotations come from the user's folder; only specs are
written here. Every choice hashes (seed, row), so that a row's specs depend on
the file as a whole at most (how often which rule is broken), never on its
order.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from csrm_jax.data.contract import Row, find
from csrm_jax.data.sets import (
  answering,
  beavertails,
  contrasts,
  cosa,
  diasafety,
  guard_response_labels,
  hf_aegis2,
  hf_cosapien,
  hf_dynabench,
  hf_or_bench,
  hf_pku_saferlhf,
  hf_rewardbench2,
  hf_wildguardmix,
  hh_harmless,
  openai_moderation,
  pku_pairs,
  polyguard,
  preference_general,
  pyrit_scored,
  rbr_gold,
  rm_bench,
  saferlhf_responses,
  tables,
  teen_safety_policies,
  xstest,
)

Make = Callable[..., Iterator[Row]]  # (path, *, seed, counts)


class Set(NamedTuple):
  """A public set.

  Attributes:
    files: what is read, below the data folder; a name that ends in "/" is a
      folder of JSON, CSV or parquet files.
    make: rows out of the folder, the seed, and a dict that receives counts.
    licence: of the data.
    commercial: whether the licence permits commercial use.
    base: another set whose rows this one is made from.
  """

  files: tuple[str, ...]
  make: Make
  licence: str
  commercial: bool
  base: str = ""


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
  "harmbench_responses": Set(
    guard_response_labels.HARMBENCH_FILES,
    guard_response_labels.harmbench_rows,
    "MIT",
    True,
  ),
  "xstest_completions": Set(xstest.FILES, xstest.rows, _BY, True),
  "pyrit_scored": Set(pyrit_scored.FILES, pyrit_scored.rows, "MIT", True),
  "rbr_gold": Set(rbr_gold.FILES, rbr_gold.rows, "MIT", True),
  "rbr_gold_train": Set(rbr_gold.TRAIN_FILES, rbr_gold.train_rows, "MIT", True),
  "hh_harmless": Set(hh_harmless.FILES, hh_harmless.rows, "MIT", True),
  "preference_general": Set(
    preference_general.FILES,
    preference_general.rows,
    "Apache-2.0; MIT",
    True,
  ),
  "answering": Set(
    answering.FILES,
    answering.rows,
    "Apache-2.0; MIT",
    True,
    base="preference_general",
  ),
  "contrasts": Set(
    contrasts.FILES,
    contrasts.rows,
    "Apache-2.0; MIT",
    True,
    base="preference_general",
  ),
  "rm_bench": Set(rm_bench.FILES, rm_bench.rows, "ODC-BY", True),
  "cosa": Set(cosa.FILES, cosa.rows, "MIT; prompts CC BY-NC 4.0", False),
  "openai_moderation": Set(
    openai_moderation.FILES, openai_moderation.rows, "MIT", True
  ),
  # As published on the Hugging Face Hub, in a folder named like the data set.
  "hf_beavertails": Set(beavertails.HF_FILES, beavertails.hf_rows, _NC, False),
  "hf_pku_saferlhf": Set(
    hf_pku_saferlhf.FILES, hf_pku_saferlhf.rows, _NC, False
  ),
  "hf_wildguardmix": Set(
    hf_wildguardmix.FILES, hf_wildguardmix.rows, "ODC-BY", True
  ),
  "hf_aegis2": Set(hf_aegis2.FILES, hf_aegis2.rows, _BY, True),
  "hf_dynabench": Set(
    hf_dynabench.FILES, hf_dynabench.rows, "see its card", False
  ),
  "hf_cosapien": Set(
    hf_cosapien.FILES, hf_cosapien.rows, "CDLA-Permissive-2.0", True
  ),
  "hf_xstest": Set(xstest.HF_FILES, xstest.hf_rows, _BY, True),
  "hf_or_bench": Set(hf_or_bench.FILES, hf_or_bench.rows, _BY, True),
  "hf_rewardbench2": Set(
    hf_rewardbench2.FILES, hf_rewardbench2.rows, "ODC-BY", True
  ),
}


def inputs(name: str, path: str | Path | None) -> list[Path]:
  """The files below `path` that a set is read from.

  Raises:
    ValueError: one is missing; says which and where.
  """
  found: list[Path] = []
  for file in SETS[name].files:
    if file.endswith("/"):
      found += tables.files(path, name, file[:-1])
    else:
      found.append(find(path, name, file))
  return found


def _file(make: Make) -> str:
  # By module: a decorated function would name its decorator's file.
  return str(sys.modules[make.__module__].__file__)


def code_of(name: str) -> list[Path]:
  """Source files that rows of a set depend on: its own, its base's, shared."""
  own = {_file(found.make): key for key, found in SETS.items()}
  names = filter(None, (name, SETS[name].base))
  mine = {_file(SETS[n].make) for n in names}
  here = Path(__file__).parent
  files = {str(p) for p in here.glob("*.py") if p.name != "__init__.py"}
  return sorted(map(Path, files - own.keys() | mine))
