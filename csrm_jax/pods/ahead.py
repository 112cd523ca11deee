"""Compiles the programs of a recipe for a machine that is not here."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from csrm_jax import sharding
from csrm_jax.config import Config
from csrm_jax.data.prepare import row_dtype
from csrm_jax.model import reward
from csrm_jax.model.reward import RewardModel
from csrm_jax.pods import hlo
from csrm_jax.pods.chips import Topology
from csrm_jax.train import loop
from csrm_jax.train import step as steps
from csrm_jax.types import Batch, TrainState

PROGRAMS = ("train", "score")  # those of alignment: pods/alignment.py
GIB = 2**30
_OUT = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_EXCEEDS = re.compile(
  r"([\d.]+)([KMG])i?B?\)? exceeds (?:available HBM )?\(?([\d.]+)([KMG])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class DoesNotFit(Exception):
  """The program needs more memory than a chip has.

  Attributes:
    needed: GiB a chip; None if the compiler did not say.
  """

  def __init__(self, message: str, needed: float | None):
    super().__init__(message)
    self.needed = needed


class Memory(NamedTuple):
  """GiB of a chip, by what fills them; `total` is their sum at the peak."""

  parameters: float
  moments: float
  batch: float
  padding: float  # of arguments, as the compiler lays them out
  temporaries: float
  outputs: float  # beyond the donated state
  code: float
  idle: float = 0.0  # parameters that stay there, of no use to this program

  @property
  def total(self) -> float:
    return sum(self)


class Compiled(NamedTuple):
  """What a compiled program says of itself.

  Attributes:
    memory: of a chip.
    arguments: GiB of a chip that the compiler gives to all arguments.
    collectives: of a step.
    text: optimised HLO.
  """

  memory: Memory
  arguments: float
  collectives: list[hlo.Collective]
  text: str


class Program(NamedTuple):
  """A recipe on a machine, before it is compiled.

  Attributes:
    model: of the recipe.
    mesh: of described devices.
    state: shapes and places of all that training holds.
    batch: shapes and places of one global batch.
  """

  model: RewardModel
  mesh: Mesh
  state: TrainState
  batch: Batch


def describe(topology: Topology) -> list[Any]:
  """The devices of a machine, as the compiler knows them.

  Raises:
    ValueError: the plug-in that compiles for it is missing or refuses it.
  """
  name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
  more = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform=topology.platform, topology_name=name, **more
    )
  except Exception as error:  # each plug-in raises what it likes
    package = "csrm_jax[tpu]" if topology.platform == "tpu" else "jax[cuda13]"
    raise ValueError(
      f"no compiler for {topology} here ({str(error).splitlines()[0]}): install"
      f' "{package}", or name a topology that its version knows'
    ) from error
  return list(found.devices)


def program(config: Config, devices: list[Any]) -> Program:
  """Shapes and places of a recipe's arrays on described devices.

  Raises:
    ValueError: mesh, batch and devices do not go together.
  """
  tpu = devices[0].platform == "tpu"
  config = for_accelerators(config, "pallas" if tpu else "dense")
  model, _ = reward.make(config.model, row_length=config.data.row_length)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  sharding.check_rows(config.batch_rows, config.microbatches, mesh)
  optimizer = loop.make_optimizer(config)
  state = jax.eval_shape(
    lambda key: steps.init_state(model.init(key), model, optimizer),
    jax.random.key(0),
  )
  held = sharding.shardings(state, mesh)
  layout = row_dtype(
    config.data.row_length, config.data.slots, config.data.pairs
  )
  rows = sharding.batch_sharding(mesh)

  def field(name: str) -> Any:
    kind, shape = layout[name].subdtype or (layout[name], ())
    whole = (config.batch_rows, *shape)
    return jax.ShapeDtypeStruct(whole, kind, sharding=rows)

  return Program(
    model=model,
    mesh=mesh,
    state=placed(state, held),
    batch=Batch(*(field(name) for name in Batch._fields)),
  )


def compile_program(config: Config, made: Program, name: str) -> Compiled:
  """Compiles the training step or the scoring pass.

  Args:
    config: the recipe.
    made: of `program`.
    name: of PROGRAMS.

  Raises:
    DoesNotFit: a chip's memory is too small.
  """
  if name == "train":
    step = steps.compile_step(
      made.state,
      made.mesh,
      model=made.model,
      optimizer=loop.make_optimizer(config),
      microbatches=config.microbatches,
      **loop.loss_keywords(config),
    )
    lowered = step.lower(made.state, made.batch)  # type: ignore[attr-defined]
    state = made.state
  elif name == "score":
    everywhere = jax.sharding.NamedSharding(made.mesh, P())

    def score(params: Any, batch: Batch) -> jax.Array:
      with jax.sharding.use_abstract_mesh(made.mesh.abstract_mesh):
        return made.model.apply(params, batch)

    jitted = jax.jit(score, out_shardings=everywhere)
    lowered = jitted.lower(made.state.params, made.batch)
    state = made.state._replace(opt_state=())
  else:
    raise ValueError(f"--program={name!r}: use one of {', '.join(PROGRAMS)}")
  return finish(
    lowered,
    parameters=state.params,
    moments=state.opt_state,
    batch=made.batch,
  )


def finish(
  lowered: Any, *, parameters: Any, moments: Any, batch: Any, idle: Any = ()
) -> Compiled:
  """Compiles what was lowered, and weighs it.

  Args:
    lowered: of `jax.jit(f).lower(...)`.
    parameters: shapes and places of those among its arguments.
    moments: likewise, of all else that the program carries on.
    batch: likewise, of what it reads once.
    idle: of what its chips hold beside its arguments.

  Raises:
    DoesNotFit: a chip's memory is too small.
  """
  try:
    done = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise _misfit(error) from error
  measured: Any = done.memory_analysis()
  known = [bytes_a_chip(tree) for tree in (parameters, moments, batch)]
  text = done.as_text() or ""
  given = measured.argument_size_in_bytes
  memory = Memory(
    *(size / GIB for size in known),
    padding=(given - sum(known)) / GIB,
    temporaries=measured.temp_size_in_bytes / GIB,
    outputs=max(0, measured.output_size_in_bytes - measured.alias_size_in_bytes)
    / GIB,
    code=measured.generated_code_size_in_bytes / GIB,
    idle=bytes_a_chip(idle) / GIB,
  )
  return Compiled(memory, given / GIB, hlo.collectives(text), text)


def bytes_a_chip(tree: Any) -> int:
  """Bytes of a tree of placed shapes that one chip holds, without padding."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def even_share(tree: Any, mesh: Mesh) -> float:
  """Bytes a chip would hold if all of a tree lay over fsdp and tensor."""
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return whole / (mesh.shape["fsdp"] * mesh.shape["tensor"])


def stacked_gathers(
  collectives: list[hlo.Collective], layers: int
) -> list[hlo.Collective]:
  """Gathers of kernels of all layers at once; a scan should have none."""
  return [
    c
    for c in collectives
    if c.kind == "all-gather" and len(c.shape) > 2 and c.shape[0] == layers
  ]


def placed(shapes: Any, places: Any) -> Any:
  """A tree of shapes that know where they lie."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )


def for_accelerators(config: Config, attention: str) -> Config:
  """What "auto" stands for there, where this machine would choose its own."""
  config = config.copy_and_resolve_references()
  if config.model.dtype == "auto":
    config.model.dtype = "bfloat16"
  if config.model.attention == "auto":
    config.model.attention = attention
  return config


def _misfit(error: Exception) -> Exception:
  """`DoesNotFit` if that is what the compiler says, else its own error."""
  text = str(error)
  found = _OUT.search(text) or _EXCEEDS.search(text)
  if found:
    needed = float(found[1]) * _UNITS[found[2]] / GIB
    limit = float(found[3]) * _UNITS[found[4]] / GIB
    return DoesNotFit(f"needs {needed:.2f} GiB a chip, has {limit:.2f}", needed)
  if "RESOURCE_EXHAUSTED" in text:
    return DoesNotFit(text.splitlines()[0], None)
  return error
