"""Contract rows made from named sets; docs/data.md describes every set."""

import hashlib
import itertools
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax.config import Config
from csrm_jax.data import augment_sources, balance, spill, synthetic
from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.augment import augment
from csrm_jax.data.balance import UNEDITED
from csrm_jax.data.contract import (
  Bad,
  Key,
  Row,
  family_of,
  hash_family,
  raw_lines,
  read_rows,
)
from csrm_jax.data.operators import OPERATORS, parse
from csrm_jax.data.sets import SETS, code_of, inputs

MIXTURE = ("beavertails", "pku_pairs", "polyguard")
# Sets whose licences permit commercial use, less those kept for evaluation.
PERMISSIVE = (
  "polyguard",
  "diasafety",
  "rbr_gold_train",
  "harmbench_responses",
  "pyrit_scored",
  "hh_harmless",
  "preference_general",
)
GROUPS = {"mixture": MIXTURE, "permissive": PERMISSIVE}
# Conversations under specs varied by the operators of `operators.py`.
AUGMENTED = ("beavertails_augmented", "synthetic_augmented")
# The generator's sources, and the domains that each draws from.
SYNTHETIC = {"synthetic": "train", "synthetic_wide": "wide"}
NAMES = (*SETS, *AUGMENTED, *SYNTHETIC, "jsonl")
DISTRACTORS = 12  # most rules that an operator adds for company
SYNTHETIC_FAMILIES = 2000  # groups made where no limit is given
# Bumped when equal files would give other rows.
_VERSION = 1


class Reading(NamedTuple):
  """How sources are read; `load` describes the fields."""

  path: str | Path | None
  seed: int
  max_rules: int = 3
  kinds: str = ""
  refusals: float = 0.0
  operators: str = ""
  on_bad_row: str = "stop"


class Part(NamedTuple):
  """What one process reads: a source, or some groups of a synthetic one.

  Attributes:
    number: of the source, in order.
    name: of it.
    limit: families that are kept, drawn by a hash; 0: all.
    first: number of the first group, if synthetic.
    groups: how many, if synthetic.
  """

  number: int
  name: str
  limit: int
  first: int = 0
  groups: int = 0


def load(
  source: str,
  *,
  path: str | Path | None,
  seed: int,
  limit: int = 0,
  max_rules: int = 3,
  kinds: str = "",
  refusals: float = 0.0,
  operators: str = "",
  on_bad_row: str = "stop",
  bad: Bad | None = None,
  counts: dict[str, int] | None = None,
) -> Iterator[Row]:
  """Contract rows of named sets, each with `family` and `source`.

  Args:
    source: of `NAMES`, a key of `GROUPS` (all of its sets), or several joined
      by commas.
    path: folder of the real sets; for "jsonl" the file.
    seed: decides specs and wordings; a row's choices depend on nothing else
      but the row itself.
    limit: families kept from each set that `source` gives no limit of its own,
      drawn by a hash; 0: all.
    max_rules: in a synthetic spec.
    kinds: of synthetic groups, as `groups.parse_kinds` reads them.
    refusals: share of synthetic groups with refusals that comply.
    operators: of augmented sets, as `operators.parse` reads them.
    on_bad_row: "stop" or "quarantine", as in `read_rows`.
    bad: called with (row, reason) for each row put aside.
    counts: receives what was read and dropped, by set and reason.

  Raises:
    ValueError: unknown set, or a file that is missing or broken.
  """
  reading = Reading(
    path, seed, max_rules, kinds, refusals, operators, on_bad_row
  )
  aside = bad and (lambda key, row, reason: bad(row, reason))
  counts = {} if counts is None else counts
  check(reading)
  for part in parts(source, limit):
    for _, row in read(part, reading, bad=aside, counts=counts):
      yield row


def check(reading: Reading) -> None:
  """Raises ValueError for a wrong name, before hours of work."""
  parse(reading.operators)


def parts(source: str, limit: int, *, groups: int = 0) -> list[Part]:
  """What there is to read, in order.

  Args:
    source: see `load`, as the next.
    limit: families of each source without a limit of its own.
    groups: most of a synthetic source in one part; 0: all.
  """
  found = []
  for number, (name, own) in enumerate(split(source).items()):
    part = Part(number, name, own or limit)
    if name not in (*SYNTHETIC, "synthetic_augmented"):
      found.append(part)
      continue
    size = part.limit or SYNTHETIC_FAMILIES
    for first in range(0, size, groups or size):
      some = min(groups or size, size - first)
      found.append(part._replace(first=first, groups=some))
  return found


def read(
  part: Part,
  reading: Reading,
  *,
  bad: Callable[[Key, Any, str], None] | None,
  counts: dict[str, int],
  folder: str | Path | None = None,
) -> Iterator[tuple[Key, Row]]:
  """The rows of a part, each with its key.

  Args:
    part: of `parts`; an augmented source must be whole.
    reading: what else to know.
    bad: called with (key, row, reason) for each row put aside.
    counts: receives what was read and dropped.
    folder: for temporary files; None: the system's.

  Raises:
    ValueError: a file is missing or broken.
  """
  # No part has so many rows a group.
  place = itertools.count(part.first << 24)

  def aside(row: Any, reason: str) -> None:
    assert bad is not None
    bad((part.number, "", next(place)), row, reason)

  rows: Iterable[tuple[Key, Row]]
  if part.name in AUGMENTED:
    rows = _augmented(part, reading, counts, folder)
  else:
    made = _load_one(part, reading, bad and aside, counts)
    rows = (((part.number, "", next(place)), row) for row in made)
  for key, row in _some(_named(rows, part.name), part, counts, folder):
    _count(counts, f"{part.name}_made")
    yield key, row


def _named(
  rows: Iterable[tuple[Key, Row]], name: str
) -> Iterator[tuple[Key, Row]]:
  for key, row in rows:
    row.setdefault("source", name)
    row.setdefault("family", family_of(row))
    yield key, row


def _some(
  rows: Iterable[tuple[Key, Row]],
  part: Part,
  counts: dict[str, int],
  folder: str | Path | None,
) -> Iterator[tuple[Key, Row]]:
  """Rows of `part.limit` families drawn by hashes of their names; 0: all."""
  if not part.limit or part.groups:  # of a synthetic one no more is made
    yield from rows
    return
  # A file may hold one domain after the other: the first are no sample.
  with tempfile.TemporaryDirectory(dir=folder) as work:
    found = spill.Sorter(work)
    kept: list[str] = []
    for key, row in rows:
      blob = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
      found.add((key, row["family"], blob), len(blob))
      kept.append(row["family"])
      if len(kept) > 4 * part.limit + 1000:
        kept = least(kept, part.limit)
    names = set(least(kept, part.limit))
    for key, family, blob in found:
      if family in names:
        yield key, pickle.loads(blob)
      else:
        _count(counts, f"{part.name}_beyond_limit")


def least(families: Iterable[str], limit: int) -> list[str]:
  """The families that a limit keeps; parts of them may be reduced first."""
  return sorted(set(families), key=hash_family)[:limit]


def options(data: Config) -> dict[str, Any]:
  """Arguments of `load` out of the `data` part of a config."""
  names = ("max_rules", "kinds", "refusals", "operators")
  return {"limit": data.examples, **{name: data[name] for name in names}}


def split(source: str) -> dict[str, int]:
  """Names in "a,b:500", `GROUPS` spelt out, in order, with their own limits.

  A name stands once: where it is named again, its first limit holds. 0: none.

  Raises:
    ValueError: a name is unknown, or a limit is no positive number.
  """
  limits: dict[str, int] = {}
  for part in filter(None, (part.strip() for part in source.split(","))):
    name, colon, number = (x.strip() for x in part.partition(":"))
    if name not in GROUPS and name not in NAMES:
      raise ValueError(
        f"--config.data.source={source}: no set is called {name!r}; choose "
        f"from {', '.join((*NAMES, *GROUPS))}"
      )
    if colon and not (number.isdecimal() and int(number)):
      raise ValueError(
        f"--config.data.source={source}: {part!r}: write {name}:N with a "
        "number N of families, 1 or more"
      )
    for one in GROUPS.get(name, (name,)):
      limits.setdefault(one, int(number or 0))
  if not limits:
    raise ValueError(
      f"--config.data.source={source!r} is empty; choose from "
      f"{', '.join((*NAMES, *GROUPS))}"
    )
  return limits


def split_names(source: str) -> list[str]:
  """The names that `split` finds, in order."""
  return list(split(source))


def licence(name: str) -> tuple[str, bool | None]:
  """What the licence of a source is, and whether it is commercial.

  None: "jsonl", whose rows are the user's own affair.
  """
  if name == "jsonl":
    return "your own", None
  base = name.removesuffix("_augmented")
  if base in SYNTHETIC:
    return "Apache-2.0 (csrm_jax)", True
  return SETS[base].licence, SETS[base].commercial


def fingerprint(source: str, *, path: str | Path | None) -> str:
  """Hash of everything the rows of `source` are made from."""
  digest = hashlib.sha256(f"{_VERSION}".encode())
  # The code that renders specs and makes rows counts among the inputs.
  digest.update((Path(__file__).parent.parent / "spec.py").read_bytes())
  for name in split_names(source):
    digest.update(name.encode())
    for file in _inputs(name, path):
      digest.update(hashlib.sha256(file.read_bytes()).digest())
  return "sha256:" + digest.hexdigest()


def _load_one(
  part: Part, reading: Reading, bad: Bad | None, counts: dict[str, int]
) -> Iterator[Row]:
  path = reading.path
  if part.name in SYNTHETIC:
    return synthetic.rows(
      split=SYNTHETIC[part.name],
      families=part.groups,
      first=part.first,
      seed=reading.seed,
      max_rules=reading.max_rules,
      kinds=reading.kinds,
      refusals=reading.refusals,
    )
  if part.name == "jsonl":
    if not path or not Path(path).is_file():
      raise ValueError(
        f"--config.data.path={path}: source 'jsonl' needs the path of a "
        ".jsonl or .jsonl.gz file of contract rows; no such file"
      )
    return read_rows(
      path, on_bad_row=reading.on_bad_row, quarantine=bad, counts=counts
    )
  return SETS[part.name].make(path, seed=reading.seed, counts=counts)


def conversations(part: Part, reading: Reading) -> Iterator[Annotated]:
  """What an augmented source is made from."""
  if part.name == "synthetic_augmented":
    return augment_sources.synthetic_annotated(
      split="train", prompts=part.groups, first=part.first, seed=reading.seed
    )
  return augment_sources.beavertails_annotated(reading.path)


def augmenting(
  name: str, reading: Reading
) -> tuple[Taxonomy, dict[str, Any], dict[str, Any]]:
  """Taxonomy of an augmented source, options of `augment` and of `balance`."""
  ops = parse(reading.operators)
  taxonomy, never = augment_sources.beavertails_taxonomy(), ()
  if name == "synthetic_augmented":
    taxonomy = augment_sources.synthetic_taxonomy("train")
  else:
    never = augment_sources.BEAVERTAILS_NEVER
  options: dict[str, Any] = {
    "seed": reading.seed,
    "ops": ops,
    "never": never,
    "distractors": DISTRACTORS,
  }
  # Without some operators there are fewer edits to hold against first specs.
  whole = len(ops) == len(OPERATORS)
  bounds = {"unedited": UNEDITED if whole else (UNEDITED[0], 1.0)}
  return taxonomy, options, bounds


def _augmented(
  part: Part,
  reading: Reading,
  counts: dict[str, int],
  folder: str | Path | None,
) -> Iterator[tuple[Key, Row]]:
  """Annotated conversations through the operators and the balance.

  In two passes: the first counts, the second thins by the hashes of ids.
  """
  taxonomy, options, bounds = augmenting(part.name, reading)
  made: dict[str, int] = {}
  found: balance.Tally = {}
  with tempfile.TemporaryDirectory(dir=folder) as work:
    prompts = spill.Sorter(work)
    for first, rows in augment(
      conversations(part, reading),
      [taxonomy],
      counts=made,
      folder=folder,
      **options,
    ):
      balance.add(found, balance.tally(rows))
      blob = pickle.dumps(rows, pickle.HIGHEST_PROTOCOL)
      prompts.add((first, blob), len(blob))
    cuts, thinned = balance.decide(found, **bounds)
    made |= {"balance_bases_lost": 0}
    for key, n in (made | thinned).items():
      _count(counts, f"{part.name}_{key}", n)
    for first, blob in prompts:
      rows, lost = balance.thin(pickle.loads(blob), cuts)
      for key, n in lost.items():
        _count(counts, f"{part.name}_{key}", n)
      yield from keyed(part, first, rows)


def keyed(
  part: Part, first: str, rows: Iterable[Row]
) -> Iterator[tuple[Key, Row]]:
  """Rows out of the conversations of a prompt, with their keys."""
  for i, row in enumerate(rows):
    yield (part.number, first, i), row | {"source": part.name}


def _inputs(name: str, path: str | Path | None) -> list[Path]:
  here = Path(__file__).parent
  if name in SYNTHETIC:
    code = ("synthetic.py", "groups.py", "domains.py")
    world = sorted((here / "world").glob("*.yaml"))
    return [*(here / name for name in code), *world]
  if name == "jsonl":
    if not path or not Path(path).is_file():
      raise ValueError(
        f"--config.data.path={path}: source 'jsonl' needs the path of a "
        ".jsonl or .jsonl.gz file of contract rows; no such file"
      )
    return [Path(path), *_spec_files(Path(path))]
  if name in AUGMENTED:
    names = ("annotated", "augment*", "balance", "edits*", "operators")
    code = [p for n in names for p in sorted(here.glob(f"{n}.py"))]
    base = name.removesuffix("_augmented")
    return code + _inputs(base, path)
  return code_of(name) + inputs(name, path)


def _spec_files(path: Path) -> list[Path]:
  """Existing spec files that a rows file points to."""
  names = set()
  for _, raw in raw_lines(path):
    for match in re.finditer(rb'"spec_file"\s*:\s*("(?:[^"\\]|\\.)*")', raw):
      names.add(json.loads(match[1]))
  return [p for n in sorted(names) if (p := path.parent / n).is_file()]


def _count(counts: dict[str, int], key: str, n: int = 1) -> None:
  counts[key] = counts.get(key, 0) + n
