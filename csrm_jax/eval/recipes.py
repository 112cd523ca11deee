"""What a model was trained on, and what its recipe kept from training."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csrm_jax import storage
from csrm_jax.config import default
from csrm_jax.data import sources
from csrm_jax.data.contract import hash_family
from csrm_jax.data.prepare import is_heldout
from csrm_jax.data.sets import inputs
from csrm_jax.data.shuffle import shuffle_specs

Row = dict[str, Any]

# What of a workdir says how it was trained, but for its checkpoints.
_FACTS = (
  "model.json",
  "config.json",
  "metrics.jsonl",
  "report.json",
  "data/meta.json",
  "data/heldout.jsonl",
)


def here(model: str | storage.AnyPath) -> Path:
  """A local path for a model's facts, its weights apart; a local one itself."""
  where = storage.path(model, flag="--model")
  if isinstance(where, Path):
    return where
  workdir = where
  if where.parent.name == "checkpoints":
    workdir = where.parent.parent
  storage.fetch(workdir, *_FACTS)
  return storage.here(where)


def workdir_of(model: str | Path | None) -> Path | None:
  """The workdir that a model path means, itself or one of its checkpoints."""
  if not model:
    return None
  folder = Path(model)
  if folder.parent.name == "checkpoints":
    folder = folder.parent.parent
  return folder if (folder / "model.json").is_file() else None


def recipe(model: str | Path | None) -> Any:
  """The config of a workdir; the defaults for anything else.

  Keys that this version does not know are ignored: they cannot concern it.
  """
  config = default()
  folder = workdir_of(model)
  if folder and (folder / "config.json").is_file():
    text = (folder / "config.json").read_text(encoding="utf-8")
    _overwrite(config, json.loads(text))
  return config


def _overwrite(config: Any, values: Mapping[str, Any]) -> None:
  for key, value in values.items():
    if key not in config:
      continue
    if isinstance(value, dict):
      _overwrite(config[key], value)
    elif value is not None:
      config[key] = value


def training_rows(
  model: str | Path | None, *, data: str | Path | None = None
) -> Iterator[Row]:
  """The contract rows that a workdir's model was trained on.

  Of anything else than a workdir, the default recipe's: synthetic rows.

  Args:
    model: a workdir or one of its checkpoints.
    data: folder of the real sets, if the recipe's is not there any more.

  Raises:
    ValueError: the recipe's data are not where it found them.
  """
  config = recipe(model)
  path = config.data.path
  if data and path and not Path(path).exists():
    path = data
  options = sources.options(config.data)
  options["limit"] = options["limit"] or _families(config.data.source)
  rows = (
    row
    for row in sources.load(
      config.data.source, path=path, seed=config.seed, **options
    )
    if not is_heldout(
      row["family"], seed=config.seed, share=config.data.heldout
    )
  )
  if config.data.shuffle_specs:
    yield from shuffle_specs(rows, seed=config.seed, counts={})
  else:
    yield from rows


def _families(source: str) -> int:
  """The synthetic set has no size of its own: enough to train a baseline."""
  return 1500 if source == "synthetic" else 0


class Split(NamedTuple):
  """What decides whether a family was kept from training.

  Attributes:
    seed: of the preparation.
    share: of the families that it held out.
    trained: names of the sources.
    texts: `hash_family` of every text of the training rows.
  """

  seed: int
  share: float
  trained: frozenset[str]
  texts: frozenset[str]


def split_of(model: str | Path | None, *, data: str | Path) -> Split:
  """What the recipe of a workdir kept from training.

  Of anything else than a workdir: the default recipe on those sets of the
  mixture that `data` holds.

  Raises:
    ValueError: the recipe's data are not where it found them.
  """
  folder = workdir_of(model)
  return _split_of(str(folder) if folder else None, str(data))


@functools.lru_cache(maxsize=2)
def _split_of(model: str | None, data: str) -> Split:
  config = recipe(model)
  names = sources.split_names(config.data.source)
  if model is None:
    names = [n for n in sources.MIXTURE if _is_there(n, data)]
    rows = sources.load(",".join(names), path=data, seed=config.seed)
    training = (
      row
      for row in (rows if names else ())
      if not is_heldout(
        row["family"], seed=config.seed, share=config.data.heldout
      )
    )
  else:
    training = training_rows(model, data=data)
  return Split(
    config.seed, config.data.heldout, frozenset(names), texts_of(training)
  )


def _is_there(name: str, data: str) -> bool:
  try:
    return bool(inputs(name, data))
  except ValueError:
    return False


def texts_of(rows: Iterable[Mapping]) -> frozenset[str]:
  """`hash_family` of what user and assistant say in contract rows."""
  found: set[str] = set()
  for row in rows:
    for messages in _conversations(row):
      found.update(m["content"] for m in messages if m["role"] != "system")
  return frozenset(map(hash_family, found))


def _conversations(row: Mapping) -> list[Sequence[Mapping[str, str]]]:
  if "ladder" in row:
    return [rung["messages"] for rung in row["ladder"]]
  if "prompt" in row:
    return [row["prompt"], row["chosen"], row["rejected"]]
  return [row["messages"]]
