"""Checkpoints (Orbax), their fingerprint, and restoring into any sharding."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from csrm_jax.sharding import path_name
from csrm_jax.types import Params, TrainState

_ITEMS = ("params", "rest")


def open_manager(
  workdir: str | Path, *, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
  """The manager of `workdir/checkpoints`; saves asynchronously.

  A step becomes visible by one rename after everything is written, so a run
  killed while saving finds its previous checkpoint whole.
  """
  folder = Path(workdir).absolute() / "checkpoints"
  if read_only and not folder.is_dir():
    raise ValueError(
      f"{workdir}: no checkpoints/ here; train into it with launch/train.py "
      "--workdir=DIR, or name another folder"
    )
  options = ocp.CheckpointManagerOptions(
    max_to_keep=None if read_only else keep,
    create=not read_only,
    read_only=read_only,
    cleanup_tmp_directories=not read_only,
  )
  handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


@contextmanager
def _quietly() -> Iterator[None]:
  """Keeps Orbax from warning that what is opened to read is read-only."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
  """Starts saving `state` as `step`; a step that exists is left alone."""
  if step in manager.all_steps():
    return
  rest = state._replace(params={})
  manager.save(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      rest=ocp.args.StandardSave(_as_dict(rest)),
    ),
    force=True,
  )


def restore(
  manager: ocp.CheckpointManager, step: int, abstract: TrainState
) -> TrainState:
  """State of `step` in the shapes and shardings of `abstract`.

  Raises:
    ValueError: the checkpoint holds other parameters than `abstract` asks for.
  """
  rest = abstract._replace(params={})
  try:
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        rest=ocp.args.StandardRestore(_as_dict(rest)),
      ),
    )
  except (ValueError, KeyError, FileNotFoundError) as error:
    raise ValueError(
      f"{manager.directory}/{step}: cannot be restored into this model and "
      f"optimizer: {error}; use the config that made it, or a new workdir"
    ) from error
  fields = restored["rest"]
  return TrainState(**{**fields, "params": restored["params"]})


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {k: v for k, v in state._asdict().items() if k != "params"}


def restore_params(
  workdir: str | Path, *, step: int | None = None, shardings: Any = None
) -> Params:
  """Parameters alone, from the newest checkpoint unless `step` names one.

  Args:
    workdir: folder that holds `checkpoints/`.
    step: of the checkpoint.
    shardings: tree like the parameters'; default: everything on one device.

  Raises:
    ValueError: no checkpoint there.
  """
  with _quietly(), open_manager(workdir, read_only=True) as manager:
    step = manager.latest_step() if step is None else step
    if step is None:
      raise ValueError(f"{workdir}/checkpoints: empty; train first")
    meta = manager.item_metadata(step)["params"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if shardings is None:
      shardings = jax.tree.map(lambda _: device, meta)
    abstract = jax.tree.map(
      lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s),
      meta,
      shardings,
    )
    restored = manager.restore(
      step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    )
  return restored["params"]


def params_sha256(params: Params) -> str:
  """Hash of the leaves by sorted path: path, dtype, shape, bytes."""
  digest = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for name, leaf in sorted((path_name(p), leaf) for p, leaf in leaves):
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()
