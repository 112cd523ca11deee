"""The mesh and the one table that says where every array lives."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

AXES = ("replica", "fsdp", "tensor")

# First match of (path, spec of the trailing dimensions) wins; leading
# dimensions, such as the layer axis of a stack, are not sharded. Kernels are
# [in, out]: column-parallel into the heads and the FFN, row-parallel out, so
# one reduction per block.
_TABLE: tuple[tuple[str, P], ...] = (
  (r"embed/embedding$", P("tensor", "fsdp")),
  (r"lm_head/kernel$", P("tensor", "fsdp")),
  (r"attention/(query|key|value)/kernel$", P("fsdp", "tensor")),
  (r"attention/(query|key|value)/bias$", P("tensor")),
  (r"attention/out/kernel$", P("tensor", "fsdp")),
  (r"mlp/(gate|up)/kernel$", P("fsdp", "tensor")),
  (r"mlp/down/kernel$", P("tensor", "fsdp")),
  (r"attention/(query|key|value)/lora_a$", P("fsdp", None)),
  (r"attention/(query|key|value)/lora_b$", P(None, "tensor")),
  (r"attention/out/lora_a$", P("tensor", None)),
  (r"attention/out/lora_b$", P(None, "fsdp")),
  (r"mlp/(gate|up)/lora_a$", P("fsdp", None)),
  (r"mlp/(gate|up)/lora_b$", P(None, "tensor")),
  (r"mlp/down/lora_a$", P("tensor", None)),
  (r"mlp/down/lora_b$", P(None, "fsdp")),
  (r"(scale|head/kernel|head/bias)$", P()),
  (r"^multiplier/", P()),
)

_ROWS = P(("replica", "fsdp"))  # of every batch and its activations

AnyMesh = Mesh | AbstractMesh  # of devices, or of sizes alone


def make_mesh(
  *,
  replica: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Mesh over all devices; one size may be -1 (what remains).

  Of several slices, which only the data-centre network joins, each holds whole
  replicas: parameters and activations never cross that network, gradients do.

  Args:
    replica: copies of the parameters.
    fsdp: parts of each parameter that are gathered for use.
    tensor: parts of each product.
    devices: None: those of this process group.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices, or the
      replicas do not divide evenly among slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [replica, fsdp, tensor]
  if sizes.count(-1) == 1:
    rest = -int(np.prod(sizes))
    sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
  if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
    raise ValueError(
      f"mesh replica={replica} fsdp={fsdp} tensor={tensor} does not cover "
      f"{len(devices)} devices; their product must, with -1 for what remains"
    )
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if sizes[0] % slices:
    raise ValueError(
      f"mesh.replica = {sizes[0]} on {slices} slices: use a multiple of "
      f"{slices}, so that each slice holds whole replicas"
    )
  return Mesh(
    _lay_out(devices, sizes, slices),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def _lay_out(devices: list[Any], sizes: list[int], slices: int) -> np.ndarray:
  """Devices by mesh position: neighbours in the mesh are so in the machine."""
  inner = [sizes[0] // slices, *sizes[1:]]
  try:
    if slices > 1:
      return mesh_utils.create_hybrid_device_mesh(
        inner, [slices, 1, 1], devices
      )
    return mesh_utils.create_device_mesh(inner, devices)
  except (NotImplementedError, ValueError, AssertionError):
    # Shapes that its tables lack: in the order of the devices, slice by slice.
    ordered = sorted(
      devices, key=lambda d: (getattr(d, "slice_index", 0), d.id)
    )
    return np.array(ordered).reshape(sizes)


def spec_of(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> P:
  """Partition of the parameter at `path` (`upper/mlp/up/kernel`).

  Optimiser moments have their parameter's path as suffix, so the same table
  serves them. A dimension that the mesh axis does not divide is replicated.
  """
  if not shape:
    return P()
  spec = next((s for pattern, s in _TABLE if re.search(pattern, path)), None)
  if spec is None:
    raise ValueError(f"parameter {path!r}: no line of the sharding table fits")
  names = (None,) * (len(shape) - len(spec)) + tuple(spec)
  fitting = (
    name if name and size % mesh.shape[name] == 0 else None
    for name, size in zip(names, shape, strict=True)
  )
  return P(*fitting)


def path_name(path: tuple[Any, ...]) -> str:
  """`a/b/c` of a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: AnyMesh) -> Any:
  """A NamedSharding for each array (or shape) of parameters or a TrainState.

  Scalars (counters) are replicated.

  Raises:
    ValueError: the table has no line for the path of an array.
  """

  def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    shape = tuple(leaf.shape)
    if len(shape) == 0:
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, spec_of(path_name(path), shape, mesh))

  return jax.tree_util.tree_map_with_path(of, tree)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
  """Rows are spread over replica and fsdp; a row stays whole."""
  return NamedSharding(mesh, _ROWS)


def keep_rows(x: Array) -> Array:
  """Holds activations [rows, ...] to the layout of their batch.

  Otherwise the compiler may take over that of a kernel (width over fsdp) and
  gather whole arrays to get from one to the other. Where no mesh is in context
  (scoring), `x` as it is.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _ROWS)


def gather_width(table: Array) -> Array:
  """An embedding table [v, d] whose rows are whole on each device.

  Looked up as it is stored, width over fsdp, its rows would arrive in a layout
  from which XLA reaches that of a batch only by gathering everything.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return table
  return jax.lax.with_sharding_constraint(table, P("tensor", None))


def check_rows(batch_rows: int, microbatches: int, mesh: AnyMesh) -> None:
  """Raises ValueError unless every micro-batch fills every data shard."""
  shards = mesh.shape["replica"] * mesh.shape["fsdp"]
  if microbatches < 1 or batch_rows % (shards * microbatches):
    raise ValueError(
      f"batch_rows = {batch_rows} must be a multiple of microbatches x "
      f"replica x fsdp = {microbatches} x {shards}"
    )
