"""Searches mesh, remat policy and micro-batches for what fits, and fast."""

import math
from collections.abc import Iterator
from typing import Any

from csrm_jax.config import Config
from csrm_jax.pods import report
from csrm_jax.pods.chips import Topology

_LONGER = 1.02  # a bound this much longer is no reason for another choice


def changed(config: Config, **keys: Any) -> Config:
  """A copy of a recipe with dotted keys replaced (`__` for `.`)."""
  config = config.copy_and_resolve_references()
  for key, value in keys.items():
    *parents, name = key.split("__")
    part = config
    for parent in parents:
      part = part[parent]
    part[name] = value
  return config


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
  """Recipes to compile, those expected to be fast first.

  Tensor parallelism up to 8, remat from what keeps most, micro-batches by
  powers of two as long as every data shard has a row in each.
  """
  per_slice = topology.chips // topology.slices
  for microbatches in (1, 2, 4, 8, 16):
    for remat in ("none", "dots", "layer"):
      for tensor in (1, 2, 4, 8):
        if per_slice % tensor:
          continue
        fsdp = per_slice // tensor
        shards = fsdp * topology.slices
        if config.batch_rows % (shards * microbatches):
          continue
        yield changed(
          config,
          microbatches=microbatches,
          model__remat=remat,
          mesh__replica=topology.slices,
          mesh__fsdp=fsdp,
          mesh__tensor=tensor,
        )


def advise(
  config: Config, topology: Topology, *, most: int = 12
) -> list[dict[str, Any]]:
  """Reports of the recipes tried, the best that fits first.

  A recipe is skipped where its state alone fills the chip. Search ends after
  `most` compilations, or once a setting of micro-batches has one that fits:
  more micro-batches only gather the weights more often.

  Raises:
    ValueError: no mesh of this machine suits the batch.
  """
  tried: list[dict[str, Any]] = []
  fits_at = math.inf
  for one in candidates(config, topology):
    if len(tried) >= most or one.microbatches > fits_at:
      break
    found = report.measure(one, topology)
    tried.append(found)
    if found["fits"]:
      fits_at = min(fits_at, one.microbatches)
  if not tried:
    raise ValueError(
      f"batch_rows = {config.batch_rows} fills no mesh of {topology}: use a"
      f" multiple of {topology.chips}, or of a half, quarter or eighth of it"
    )
  return sorted(tried, key=_rank)


def nearest(
  config: Config, topology: Topology
) -> tuple[str, dict[str, Any]] | None:
  """The smallest change that makes a recipe fit, with its report.

  In this order: recompute layers, more micro-batches, parameters over more
  chips of the same machine, twice the chips.
  """
  for words, one, machine in _repairs(config, topology):
    try:
      found = report.measure(one, machine)
    except ValueError:  # a mesh that this batch does not fill
      continue
    if found["fits"]:
      return words, found
  return None


def _repairs(
  config: Config, topology: Topology
) -> Iterator[tuple[str, Config, Topology]]:
  if config.model.remat != "layer":
    config = changed(config, model__remat="layer")
    yield "--config.model.remat=layer", config, topology
  for times in (2, 4, 8):
    n = config.microbatches * times
    yield (
      f"--config.model.remat=layer --config.microbatches={n}",
      changed(config, microbatches=n),
      topology,
    )
  larger = topology
  for _ in range(4):
    shape = list(larger.shape)
    axis = shape.index(min(shape))
    shape[axis] *= 2
    larger = larger._replace(shape=tuple(shape))
    yield (
      f"--topology={larger.kind}:{'x'.join(map(str, shape))}"
      " --config.mesh.fsdp=-1 --config.model.remat=layer",
      changed(config, mesh__fsdp=-1),
      larger,
    )


def _rank(found: dict[str, Any]) -> tuple[bool, float, float]:
  if not found["fits"]:
    return True, math.inf, found.get("needed") or math.inf
  bound = found["seconds"]["bound"]
  # Bounds within a few percent are equal; less memory then wins.
  rounded = float(round(math.log(bound) / math.log(_LONGER)))
  return False, rounded, found["memory"]["total"]


def table(tried: list[dict[str, Any]]) -> str:
  """One line a recipe, the best first."""
  lines = ["| mesh | remat | micro-batches | GiB a chip | bound, s | fits |"]
  lines.append("|---|---|---|---|---|---|")
  for one in tried:
    mesh = " x ".join(str(n) for n in one["mesh"].values())
    memory, took = one.get("memory"), one.get("seconds")
    needed = memory["total"] if memory else one.get("needed")
    size = "?" if needed is None else f"{needed:.2f}"
    bound = f"{took['bound']:.3f}" if took else ""
    fits = "yes" if one["fits"] else "no"
    lines.append(
      f"| {mesh} | {one['remat']} | {one['microbatches']} | {size} | {bound} |"
      f" {fits} |"
    )
  return "\n".join(lines)
