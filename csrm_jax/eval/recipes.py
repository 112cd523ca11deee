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
from csrm_jax.model.adapter import METADATA

Row = dict[str, Any]

# What of a workdir says how it was trained, but for its checkpoints.
_FACTS = (
  "model.json",
  "config.json",
  "metrics.jsonl",
  "report.json",
  "data/meta.json",
  "data/heldout.jsonl",
  METADATA,
)
# What of a config's `data` decides which rows are trained on, and no path.
_ROWS = (
  "source",
  "examples",
  "heldout",
  "max_rules",
  "kinds",
  "refusals",
  "operators",
  "shuffle_specs",
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
  """The config that a model was trained by; the defaults where it is unknown.

  An exported adapter tells `summary` of it. Keys that this version does not
  know are ignored: they cannot concern it.
  """
  configs, _ = _told(model)
  return configs[0] if configs else default()


def is_known(model: str | Path | None) -> bool:
  """Whether a model says by which recipe it was trained."""
  return bool(_told(model)[0])


def summary(config: Mapping[str, Any]) -> dict[str, Any]:
  """What others must know to make the rows again that a config trains on.

  Args:
    config: content of a workdir's config.json.

  Returns:
    "recipe": its seed and data, without paths; nothing for rows of the user's
    own (source "jsonl"), which nobody else could read.
  """
  whole = _config(config)
  if "jsonl" in sources.split(whole.data.source):
    return {}
  data = {name: whole.data[name] for name in _ROWS}
  return {"recipe": {"seed": whole.seed, "data": data}}


def earlier(described: Mapping[str, Any]) -> dict[str, Any]:
  """The recipes of an adapter and all before it, newest first.

  Args:
    described: content of its csrm.json.

  Returns:
    "recipes"; nothing where one of them is unknown.
  """
  before = described.get("started_from", {"recipes": []})
  if "recipe" not in described or "recipes" not in before:
    return {}
  return {"recipes": [described["recipe"], *before["recipes"]]}


def _told(model: str | Path | None) -> tuple[list[Any], bool]:
  """Configs of a model's training, its own first; whether they are all.

  There are none for what is neither a workdir nor an adapter that tells.
  """
  if workdir := workdir_of(model):
    described = _read(workdir / "model.json")
    values = [_read(workdir / "config.json")]
  else:
    described = _read(Path(model) / METADATA) if model else {}
    values = [described["recipe"]] if "recipe" in described else []
  before = described.get("started_from", {"recipes": []})
  if values:
    values += before.get("recipes", [])
  return [_config(v) for v in values], "recipes" in before


def _read(file: Path) -> dict[str, Any]:
  return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _config(values: Mapping[str, Any]) -> Any:
  config = default()
  _overwrite(config, values)
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
  """The contract rows that a model was trained on.

  Those of its own recipe, not of the adapter that it began from. Where the
  recipe is unknown, the default one's: synthetic rows.

  Args:
    model: a workdir, one of its checkpoints, or an exported adapter.
    data: folder of the real sets, if the recipe names none that is there.

  Raises:
    ValueError: the recipe's data are not where it found them.
  """
  return _training_rows(recipe(model), data)


def _training_rows(config: Any, data: str | Path | None) -> Iterator[Row]:
  path = config.data.path
  if data and not (path and Path(path).exists()):
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
    texts: `hash_family` of every text of the training rows, of those too that
      made the adapter which training began from.
    note: what could not be known; empty if all was.
  """

  seed: int
  share: float
  trained: frozenset[str]
  texts: frozenset[str]
  note: str = ""


def split_of(model: str | Path | None, *, data: str | Path) -> Split:
  """What the recipes of a model kept from training.

  Where they are unknown: the default recipe on those sets of the mixture that
  `data` holds. A set of an adapter's recipes that `data` lacks is noted.

  Raises:
    ValueError: a workdir's data are not where its recipe found them.
  """
  return _split_of(str(model) if model else None, str(data))


@functools.lru_cache(maxsize=2)
def _split_of(model: str | None, data: str) -> Split:
  configs, whole = _told(model)
  notes = []
  if not configs:
    configs = [default()]
    configs[0].data.source = ",".join(sources.MIXTURE)
    notes.append("recipe unknown: as for the default one on the mixture")
  elif not whole:
    notes.append("what training began from is unknown")
  # Only a workdir says where its sets are.
  own = workdir_of(model) is not None
  names: set[str] = set()
  texts: frozenset[str] = frozenset()
  for i, config in enumerate(configs):
    limits = sources.split(config.data.source)
    names |= limits.keys()
    if not own or i:
      there = {k: n for k, n in limits.items() if _is_there(k, data)}
      if absent := limits.keys() - there.keys():
        notes.append(f"not in {data}: {', '.join(sorted(absent))}")
      limits = there
    if limits:
      config.data.source = ",".join(
        f"{k}:{n}" if n else k for k, n in limits.items()
      )
      texts |= texts_of(_training_rows(config, data))
  first = configs[0]
  note = "; ".join(dict.fromkeys(notes))
  return Split(first.seed, first.data.heldout, frozenset(names), texts, note)


def _is_there(name: str, data: str) -> bool:
  base = name.removesuffix("_augmented")
  try:
    return base in sources.SYNTHETIC or bool(inputs(base, data))
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
