"""Contract rows made from named sets; docs/data.md describes every set."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from csrm_jax.config import Config
from csrm_jax.data import augment_sources, synthetic
from csrm_jax.data.augment import augment
from csrm_jax.data.balance import UNEDITED, balance
from csrm_jax.data.contract import (
  Bad,
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
NAMES = (*SETS, *AUGMENTED, "synthetic", "jsonl")
DISTRACTORS = 12  # most rules that an operator adds for company
SYNTHETIC_FAMILIES = 2000  # groups made where no limit is given
# Bumped when equal files would give other rows.
_VERSION = 1


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
  counts = {} if counts is None else counts
  parse(operators)  # a wrong name is told before hours of work
  for name, own_limit in split(source).items():
    number = own_limit or limit
    rows = _load_one(
      name,
      path=path,
      seed=seed,
      limit=number,
      max_rules=max_rules,
      kinds=kinds,
      refusals=refusals,
      operators=operators,
      on_bad_row=on_bad_row,
      bad=bad,
      counts=counts,
    )
    for row in _some(_named(rows, name), number, name, counts):
      _count(counts, f"{name}_made")
      yield row


def _named(rows: Iterable[Row], name: str) -> Iterator[Row]:
  for row in rows:
    row.setdefault("source", name)
    row.setdefault("family", family_of(row))
    yield row


def _some(
  rows: Iterable[Row], limit: int, name: str, counts: dict[str, int]
) -> Iterator[Row]:
  """Rows of `limit` families drawn by the hashes of their names; 0: all."""
  if not limit:
    yield from rows
    return
  # A file may hold one domain after the other: the first are no sample.
  found = list(rows)
  families = sorted({row["family"] for row in found}, key=hash_family)
  kept = set(families[:limit])
  for row in found:
    if row["family"] in kept:
      yield row
    else:
      _count(counts, f"{name}_beyond_limit")


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
  if base == "synthetic":
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
  name: str,
  *,
  path: str | Path | None,
  seed: int,
  limit: int,
  max_rules: int,
  kinds: str,
  refusals: float,
  operators: str,
  on_bad_row: str,
  bad: Bad | None,
  counts: dict[str, int],
) -> Iterator[Row]:
  if name == "synthetic":
    return synthetic.rows(
      split="train",
      families=limit or SYNTHETIC_FAMILIES,
      seed=seed,
      max_rules=max_rules,
      kinds=kinds,
      refusals=refusals,
    )
  if name == "jsonl":
    if not path or not Path(path).is_file():
      raise ValueError(
        f"--config.data.path={path}: source 'jsonl' needs the path of a "
        ".jsonl or .jsonl.gz file of contract rows; no such file"
      )
    return read_rows(path, on_bad_row=on_bad_row, quarantine=bad, counts=counts)
  if name in AUGMENTED:
    return _augmented(name, path, seed, limit, parse(operators), counts)
  return SETS[name].make(path, seed=seed, counts=counts)


def _augmented(
  name: str,
  path: str | Path | None,
  seed: int,
  limit: int,
  ops: tuple[str, ...],
  counts: dict[str, int],
) -> Iterator[Row]:
  """Annotated conversations through the operators and the balance."""
  if name == "synthetic_augmented":
    conversations = augment_sources.synthetic_annotated(
      split="train", prompts=limit or SYNTHETIC_FAMILIES, seed=seed
    )
    taxonomy, never = augment_sources.synthetic_taxonomy("train"), ()
  else:
    conversations = augment_sources.beavertails_annotated(path)
    taxonomy = augment_sources.beavertails_taxonomy()
    never = augment_sources.BEAVERTAILS_NEVER
  made: dict[str, int] = {}
  rows, thinned = balance(
    augment(
      conversations,
      [taxonomy],
      seed=seed,
      counts=made,
      ops=ops,
      never=never,
      distractors=DISTRACTORS,
    ),
    # Without some operators there are fewer edits to hold against first specs.
    unedited=UNEDITED if len(ops) == len(OPERATORS) else (UNEDITED[0], 1.0),
  )
  for key, count in (made | thinned).items():
    _count(counts, f"{name}_{key}", count)
  for row in rows:
    yield row | {"source": name}


def _inputs(name: str, path: str | Path | None) -> list[Path]:
  here = Path(__file__).parent
  if name == "synthetic":
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
