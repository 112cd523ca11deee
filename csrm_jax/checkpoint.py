"""Checkpoints (Orbax), their fingerprint, and restoring into any sharding."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from csrm_jax import manifest, peers, storage
from csrm_jax.sharding import path_name
from csrm_jax.storage import AnyPath
from csrm_jax.types import Params

_ITEMS = ("params", "rest")
# A NamedTuple with a field `params`, such as `types.TrainState`.
State = Any


def open_manager(
  workdir: str | AnyPath,
  *,
  keep: int = 2,
  read_only: bool = False,
  alone: bool = False,
) -> ocp.CheckpointManager:
  """The manager of `workdir/checkpoints`; saves asynchronously.

  A step becomes visible by one rename (in a bucket: by one file) after
  everything is written, its manifest last, so a run killed while saving finds
  its previous checkpoint whole. With several processes each writes the shards
  it holds, into a folder that all see.

  Args:
    workdir: folder, here or in a bucket, that holds, or gets, `checkpoints/`.
    keep: newest checkpoints that stay.
    read_only: nothing is created or deleted.
    alone: this process uses it without the others; they would all be waited
      for otherwise.

  Raises:
    ValueError: `read_only`, and no checkpoints there.
  """
  folder = _folder(workdir)
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
    async_options=ocp.AsyncOptions(
      post_finalization_callback=lambda: _write_manifest(folder)
    ),
  )
  handlers = {
    name: ocp.StandardCheckpointHandler(multiprocessing_options=together)
    for name in _ITEMS
  }
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _folder(workdir: str | AnyPath) -> AnyPath:
  where = storage.path(workdir)
  return (
    where.absolute() if isinstance(where, Path) else where
  ) / "checkpoints"


def _write_manifest(folder: AnyPath) -> None:
  """Of the step that is whole and about to be made visible.

  Orbax calls it then, in its writing thread and in process 0 alone, without
  saying of which step: there is one at a time.
  """
  storage.refresh(folder)
  for step in folder.iterdir():
    if storage.is_remote(step):
      coming = step.name.isdigit() and not _counts(step)
    else:
      coming = ".orbax-checkpoint-tmp" in step.name
    if coming:
      manifest.write(step)


def _counts(step: AnyPath) -> bool:
  """Whether a step is whole, as Orbax marks it here and in buckets."""
  if not step.name.isdigit():
    return False
  return not storage.is_remote(step) or (step / "commit_success.txt").exists()


@contextmanager
def _quietly() -> Iterator[None]:
  """Keeps Orbax from warning that what is opened to read is read-only."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def save(manager: ocp.CheckpointManager, step: int, state: State) -> None:
  """Starts saving `state` as `step`; a step that exists is left alone.

  Raises:
    ValueError: this or the save before could not be written; has the path.
  """
  rest = state._replace(params={})
  with _written(manager):
    if step in manager.all_steps():
      return
    manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        rest=ocp.args.StandardSave(_as_dict(rest)),
      ),
      force=True,
      custom_metadata={"manifest": manifest.FILE},
    )


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until what was saved is there.

  Raises:
    ValueError: it could not be written; has the path.
  """
  with _written(manager):
    manager.wait_until_finished()


@contextmanager
def opened(
  workdir: str | AnyPath, *, keep: int = 2
) -> Iterator[ocp.CheckpointManager]:
  """`open_manager`, closed at the end.

  A failure to write is often raised twice, at the save and at the close; of
  both, the first is told.

  Raises:
    ValueError: what was saved last could not be written; has the path.
  """
  manager = open_manager(workdir, keep=keep)
  try:
    yield manager
  except BaseException:
    with suppress(Exception):
      manager.close()
    raise
  with _written(manager):
    manager.close()


@contextmanager
def _written(manager: ocp.CheckpointManager) -> Iterator[None]:
  """Tells a failure to write from one of the processes or of the program."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, TimeoutError, TypeError):
    raise
  except Exception as error:  # TensorStore has several for a full disk
    raise ValueError(
      f"{manager.directory}: a checkpoint could not be written: {error}; make "
      "room or mend it, then start again: the run goes on from step "
      f"{_newest(manager)}"
    ) from error


def _newest(manager: ocp.CheckpointManager) -> int:
  """Newest step that is whole; 0 without any."""
  folder = storage.path(manager.directory)
  return max((int(p.name) for p in folder.iterdir() if _counts(p)), default=0)


def restore(
  manager: ocp.CheckpointManager, step: int, abstract: State
) -> State:
  """State of `step` in the shapes and shardings of `abstract`.

  Raises:
    ValueError: a file of the checkpoint is missing, cut off or changed, or it
      holds other parameters than `abstract` asks for.
  """
  folder = storage.path(f"{manager.directory}/{step}")
  if not peers.first("check of files", lambda: manifest.check(folder)):
    note = (
      f"{folder}: saved by an earlier version, without a manifest: unchecked"
    )
    print(note, file=sys.stderr)
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
  return type(abstract)(**{**fields, "params": restored["params"]})


def _as_dict(state: Any) -> dict[str, Any]:
  return {k: v for k, v in state._asdict().items() if k != "params"}


def restore_params(
  workdir: str | AnyPath, *, step: int | None = None, shardings: Any = None
) -> Params:
  """Parameters alone, from the newest checkpoint unless `step` names one.

  Args:
    workdir: folder that holds `checkpoints/`.
    step: of the checkpoint.
    shardings: tree like the parameters'; default: everything on one device
      of this process, which then reads without the others.

  Raises:
    ValueError: no checkpoint there, or a file of it is missing, cut off or
      changed.
  """
  alone = shardings is None
  with (
    _quietly(),
    open_manager(workdir, read_only=True, alone=alone) as manager,
  ):
    step = manager.latest_step() if step is None else step
    if step is None:
      raise ValueError(f"{workdir}/checkpoints: empty; train first")
    folder = _folder(workdir) / str(step)
    if not folder.is_dir():
      raise ValueError(f"{folder}: no such checkpoint; name another step")
    if alone:
      manifest.check(folder, below="params/")
    else:
      peers.first(
        "check of parameters", lambda: manifest.check(folder, below="params/")
      )
    # Orbax wraps the tree in a class of its own, which no dict goes with.
    meta = manager.item_metadata(step)["params"]
    meta = getattr(meta, "tree", meta)
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
