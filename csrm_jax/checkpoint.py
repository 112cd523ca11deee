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
  workdir: str | Path,
  *,
  keep: int = 2,
  read_only: bool = False,
  alone: bool = False,
) -> ocp.CheckpointManager:
  """The manager of `workdir/checkpoints`; saves asynchronously.

  A step becomes visible by one rename after everything is written, so a run
  killed while saving finds its previous checkpoint whole. With several
  processes each writes the shards it holds, into a folder that all see.

  Args:
    workdir: folder that holds, or gets, `checkpoints/`.
    keep: newest checkpoints that stay.
    read_only: nothing is created or deleted.
    alone: this process uses it without the others; they would all be waited
      for otherwise.

  Raises:
    ValueError: `read_only`, and no checkpoints there.
  """
  folder = Path(workdir).absolute() / "checkpoints"
  if read_only and not folder.is_dir():
    raise ValueError(
      f"{workdir}: no checkpoints/ here; train into it with launch/train.py "
      "--workdir=DIR, or name another folder"
    )
  together = ocp.options.MultiprocessingOptions()
  if alone and jax.process_count() > 1:
    me = jax.process_index()
    together = ocp.options.MultiprocessingOptions(
      primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
    )
  options = ocp.CheckpointManagerOptions(
    max_to_keep=None if read_only else keep,
    create=not read_only,
    read_only=read_only,
    cleanup_tmp_directories=not read_only,
    multiprocessing_options=together,
  )
  handlers = {
    name: ocp.StandardCheckpointHandler(multiprocessing_options=together)
    for name in _ITEMS
  }
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
    shardings: tree like the parameters'; default: everything on one device
      of this process, which then reads without the others.

  Raises:
    ValueError: no checkpoint there.
  """
  with (
    _quietly(),
    open_manager(workdir, read_only=True, alone=shardings is None) as manager,
  ):
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
  """Hash of the leaves by sorted path: path, dtype, shape, bytes.

  The same for the same values wherever they lie. Leaves that are spread over
  several processes are gathered, so all of them must call.
  """
  digest = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for name, leaf in sorted((path_name(p), leaf) for p, leaf in leaves):
    digest.update(f"{name} {leaf.dtype.name} {leaf.shape}\n".encode())
    for array in _in_pieces(leaf):
      array = array.astype(array.dtype.newbyteorder("<"), copy=False)
      digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def _in_pieces(leaf: Any) -> Iterator[np.ndarray]:
  """The values of a leaf; of one spread over processes, layer by layer."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    yield np.asarray(leaf)
    return
  if leaf.is_fully_replicated:
    yield np.asarray(leaf.addressable_data(0))
    return
  held: Any = leaf.sharding  # a NamedSharding, like all in a run
  everywhere = jax.sharding.NamedSharding(
    held.mesh, jax.sharding.PartitionSpec()
  )
  if leaf.ndim < 3:
    whole = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
    yield np.asarray(whole.addressable_data(0))
    return
  take = jax.jit(
    lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False),
    out_shardings=everywhere,
  )
  for i in range(leaf.shape[0]):
    yield np.asarray(take(leaf, i).addressable_data(0))
