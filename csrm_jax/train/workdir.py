"""The files of a run: its recipe, rows and log, here or in a bucket."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csrm_jax import peers, storage
from csrm_jax.config import Config, default
from csrm_jax.data import prepare as preparation
from csrm_jax.data import template
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.model import reward
from csrm_jax.model.reward import RewardModel
from csrm_jax.storage import AnyPath
from csrm_jax.train import start

# Keys that may change between the parts of one run without changing what it
# computes; any other difference would silently mix two recipes.
_FREE_KEYS = (
  "log_every",
  "checkpoint_every",
  "keep_checkpoints",
  "resume",
  "skips_allowed",
  "mesh",
  "data.path",
  "data.prepared",
)
_AGAIN = "bring it back, or name a new --workdir"
LOG = "metrics.jsonl"
# What a run has done that trains nothing, see `align/constitutional.py`.
REVISIONS = "revisions.jsonl"
EVENTS = "tensorboard"


class Log(NamedTuple):
  """Metrics of a run.

  Attributes:
    add: appends a line to metrics.jsonl and TensorBoard; has a "step".
    keep: makes sure that what was added outlives this machine.
  """

  add: Callable[[dict[str, float | int]], None]
  keep: Callable[[], None]


def check_recipe(config: Config, workdir: AnyPath) -> None:
  """Refuses to resume a workdir that another recipe made.

  Raises:
    ValueError: names the first key that differs, with both values.
  """
  path = workdir / "config.json"
  if not path.is_file() or not _begun(workdir):
    return
  if not config.resume:
    raise ValueError(
      f"{workdir}: holds a run already and config.resume is False; name a new "
      "--workdir, or delete this one"
    )
  # A key that came after the run began had what is its default now.
  before = _flat(default().to_dict())
  before |= _flat(storage.read_json(path, remedy=_AGAIN))
  after = _flat(config.to_dict())
  for key in sorted(before.keys() | after.keys()):
    free = any(key == k or key.startswith(k + ".") for k in _FREE_KEYS)
    if not free and before.get(key) != after.get(key):
      raise ValueError(
        f"{workdir}: made with {key} = {before.get(key)!r}, now "
        f"{after.get(key)!r}; set it back to go on, or name a new --workdir"
      )


def write_recipe(
  config: Config,
  workdir: AnyPath,
  model: RewardModel,
  tokenizer: Tokenizer,
  *,
  data_fingerprint: str,
) -> None:
  """config.json, model.json and the tokenizer; what `judge.load` reads."""
  before = _described(workdir) if _begun(workdir) else {}
  described = reward.describe(model) | _fingerprints(tokenizer)
  described["data_fingerprint"] = data_fingerprint
  described["temperature"] = before.get("temperature", 1.0)
  # The adapter's folder may be gone once a run has begun.
  if started_from := before.get("started_from") or start.provenance(config):
    described["started_from"] = started_from
  tokenizer.save(workdir)
  storage.write_json(workdir / "config.json", config.to_dict())
  storage.write_json(workdir / "model.json", described)


def ensure_rows(config: Config, workdir: AnyPath, tokenizer: Tokenizer) -> str:
  """The folder of prepared rows of this run, written first if need be.

  A run that has begun goes on with the rows it began with. If something that
  they are made from changed, they are made again beside, and must be equal.

  Raises:
    ValueError: they are not, or the prompt template or tokenizer changed; has
      both fingerprints. Nothing was replaced.
  """
  _check_template(workdir, tokenizer)
  if config.data.prepared:
    folder = storage.path(config.data.prepared, flag="--config.data.prepared")
    local = config.copy_and_resolve_references()
    local.data.prepared = str(storage.fetch(folder))
    found = preparation.ensure(local, storage.here(workdir), tokenizer)
    _check_rows(workdir, preparation.read_meta(found)["fingerprint"])
    return str(folder)
  remote = workdir / "data"
  work = storage.here(workdir)
  if storage.is_remote(workdir) and (remote / "meta.json").exists():
    storage.fetch(workdir, "data")
  folder = work / "data"
  key = preparation.preparation_key(config, tokenizer)
  stale = not (folder / "meta.json").is_file()
  stale = stale or preparation.read_meta(folder)["key"] != key
  if stale:
    aside = work / "preparing"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
      made = preparation.ensure(config, aside, tokenizer)
      _check_rows(workdir, preparation.read_meta(made)["fingerprint"])
      shutil.rmtree(folder, ignore_errors=True)
      made.rename(folder)
    finally:
      shutil.rmtree(aside, ignore_errors=True)
    if storage.is_remote(workdir):
      storage.remove(remote)
      storage.put(folder, remote, last="meta.json")
  else:
    _check_rows(workdir, preparation.read_meta(folder)["fingerprint"])
  return str(remote)


def local_rows(place: str) -> Path:
  """The rows of `ensure_rows` on this machine; process 0 has them already."""
  folder = storage.path(place)
  local = storage.here(folder)
  if peers.is_first() and (local / "meta.json").is_file():
    return local
  return storage.fetch(folder)


def _check_template(workdir: AnyPath, tokenizer: Tokenizer) -> None:
  """Refuses to go on under another prompt template or tokenizer."""
  before = _described(workdir) if _begun(workdir) else {}
  for name, now in _fingerprints(tokenizer).items():
    if before and before.get(name) != now:
      raise ValueError(
        f"{workdir}: {name} was {before.get(name)}, now {now}; go on with the "
        "code and tokenizer that began it, or name a new --workdir"
      )


def _check_rows(workdir: AnyPath, fingerprint: str) -> None:
  """Refuses rows other than those that a run began with."""
  if not _begun(workdir):
    return
  before = _described(workdir).get("data_fingerprint")
  if before is not None and before != fingerprint:
    raise ValueError(
      f"{workdir}: began with rows of data_fingerprint {before}, its data and "
      f"specs now give {fingerprint}; bring back what changed, or name a new "
      "--workdir"
    )


def _begun(workdir: AnyPath) -> bool:
  return (workdir / "checkpoints").is_dir() or (workdir / REVISIONS).is_file()


def _described(workdir: AnyPath) -> dict[str, Any]:
  path = workdir / "model.json"
  return storage.read_json(path, remedy=_AGAIN) if path.is_file() else {}


def _fingerprints(tokenizer: Tokenizer) -> dict[str, str]:
  return {
    "template_fingerprint": template.fingerprint(tokenizer),
    "tokenizer_fingerprint": tokenizer.fingerprint(),
  }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


# -- Log -------------------------------------------------------------------


@contextmanager
def open_log(workdir: AnyPath) -> Iterator[Log]:
  """The log of process 0; the others' goes nowhere.

  A bucket cannot be appended to: there the log is kept here, and copied up by
  `keep` and at the end.
  """
  if not peers.is_first():
    yield Log(lambda line: None, lambda: None)
    return
  from tensorboardX import SummaryWriter  # imports torch where it finds it

  folder = storage.here(workdir)
  board = SummaryWriter(str(folder / EVENTS))

  def keep() -> None:
    if storage.is_remote(workdir):
      board.flush()
      storage.put(folder, workdir, LOG, EVENTS)

  # Unbuffered: nothing is left to fail once more when the file is closed.
  with (folder / LOG).open("ab", buffering=0) as out:

    def add(line: dict[str, float | int]) -> None:
      with storage.naming(folder / LOG):
        out.write((json.dumps(line) + "\n").encode())
      for name, value in line.items():
        board.add_scalar(name, value, int(line["step"]))

    try:
      yield Log(add, keep)
    finally:
      board.close()
      keep()


def trim_log(workdir: AnyPath, step: int) -> float:
  """Drops lines of steps after the checkpoint; returns the seconds spent.

  A run killed between two checkpoints repeats the steps since the first, and
  may leave a line half written. Unreadable lines are dropped and counted.
  """
  path = storage.fetch(workdir, LOG, EVENTS) / LOG
  path.parent.mkdir(parents=True, exist_ok=True)
  if not path.is_file():
    return 0.0
  kept, broken = [], 0
  for text in filter(None, path.read_bytes().split(b"\n")):
    try:
      line = json.loads(text)
      if line["step"] <= step and line["seconds"] >= 0:
        kept.append(line)
    except (ValueError, TypeError, KeyError):
      broken += 1
  if broken:
    print(f"{path}: dropped {broken} unreadable lines")
  storage.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
  return kept[-1]["seconds"] if kept else 0.0


def logged(workdir: AnyPath) -> dict[str, Any]:
  """Mean loss of the last ten steps that were taken, and seconds spent."""
  path = storage.here(workdir) / LOG
  if not path.is_file():
    path = storage.fetch(workdir, LOG) / LOG
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  if not lines:
    return {}
  last = [line["loss"] for line in lines if np.isfinite(line["loss"])][-10:]
  loss = {"loss": float(np.mean(last))} if last else {}
  return loss | {"seconds": lines[-1]["seconds"]}
