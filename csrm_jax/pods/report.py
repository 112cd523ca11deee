"""What a compiled recipe needs, as data and as text."""

import functools
import json
from pathlib import Path
from typing import Any

from csrm_jax.config import Config
from csrm_jax.model.reward import RewardModel
from csrm_jax.pods import ahead, alignment, hlo, roofline
from csrm_jax.pods.chips import Topology

_ASSUMED = (
  "A lower bound: peak bfloat16 rate, full bandwidth of HBM and links, the"
  " slowest of the three hides the others; rows counted as full."
)


def measure(
  config: Config,
  topology: Topology,
  program: str = "train",
  *,
  hlo_file: str | None = None,
) -> dict[str, Any]:
  """Compiles a recipe and says what it needs; JSON-ready.

  Args:
    config: the recipe.
    topology: the machine.
    program: of `ahead.PROGRAMS` or `alignment.PROGRAMS`.
    hlo_file: receives the optimised program's text.

  Returns:
    `fits`, `state_gib` (parameters and moments of a chip, by their placing) and
    `even_gib` (all of them over fsdp x tensor). Where it fits: `memory` (GiB a
    chip by kind), `arguments_gib` (state and batch as the compiler has them),
    `collectives` (by kind: instructions, GiB sent a chip and step, or null),
    `stacked_gathers` (gathers of kernels of all layers at once), and for a
    training step or a PPO update `flops` and `seconds` (each resource alone,
    and their maximum).

  Raises:
    ValueError: recipe, mesh and machine do not go together.
  """
  devices = ahead.describe(topology)
  if program in alignment.PROGRAMS:
    aligned = alignment.program(config, devices)
    models = [m for m in aligned.networks if m is not None]
    mesh, changed = aligned.mesh, aligned.state
    state = (aligned.parameters, aligned.carried)
    counted = alignment.flops(config, aligned)
    compiled = functools.partial(
      alignment.compile_program, config, aligned, program
    )
    rows, length = aligned.episodes.tokens.shape
    sizes = {
      "batch_rows": rows,
      "row_length": length,
      "epochs": config.align.epochs,
      "minibatches": config.align.minibatches,
      "constraints": len(aligned.bound),
      "lora_rank": models[0].lora_rank,
    }
  else:
    made = ahead.program(config, devices)
    models, mesh = [made.model], made.mesh
    state = changed = (made.state.params, made.state.opt_state)
    counted = roofline.flops(config, made.model)
    compiled = functools.partial(ahead.compile_program, config, made, program)
    sizes = {
      "batch_rows": config.batch_rows,
      "row_length": config.data.row_length,
      "microbatches": config.microbatches,
    }
  found: dict[str, Any] = {
    "topology": str(topology),
    "chips": topology.chips,
    "mesh": dict(mesh.shape),
    "program": program,
    "remat": models[0].remat,
    "dtype": models[0].dtype,
    "attention": models[0].attention,
    **sizes,
    "hbm_gib": topology.chip.hbm,
    "state_gib": ahead.bytes_a_chip(state) / ahead.GIB,
    "even_gib": ahead.even_share(state, mesh) / ahead.GIB,
  }
  try:
    done = compiled()
  except ahead.DoesNotFit as error:
    return found | {"fits": False, "why": str(error), "needed": error.needed}
  if hlo_file:
    Path(hlo_file).write_text(done.text, encoding="utf-8")
  memory = done.memory._asdict() | {"total": done.memory.total}
  found |= {
    "fits": done.memory.total <= topology.chip.hbm,
    "memory": memory,
    "arguments_gib": done.arguments,
    "collectives": hlo.totals(done.collectives),
    "stacked_gathers": len(
      ahead.stacked_gathers(done.collectives, models[0].architecture.layers)
    ),
  }
  if program in ("train", "ppo"):
    found |= _time(found, topology, counted, models, changed, done)
  return found


def _time(
  found: dict[str, Any],
  topology: Topology,
  counted: roofline.Flops,
  models: list[RewardModel],
  state: Any,
  done: ahead.Compiled,
) -> dict[str, Any]:
  """Seconds of a step; every minibatch goes through weights and moments.

  `state` is what it changes, shapes and places.
  """
  turns = found.get("epochs", 1) * found.get("minibatches", 1)
  size = 2 if found["dtype"] == "bfloat16" else 4
  weights = size * sum(
    m.architecture.layers * roofline.kernel_parameters(m) for m in models
  )
  took = roofline.times(
    counted,
    topology,
    state_bytes=turns * ahead.bytes_a_chip(state),
    weight_bytes=turns * weights / found["mesh"]["tensor"],
    collectives=done.collectives,
    replicas=found["mesh"]["replica"],
  )
  peak = topology.chips * topology.chip.flops
  tokens = found["batch_rows"] * found["row_length"] * found.get("epochs", 1)
  return {
    "flops": counted._asdict(),
    "seconds": took._asdict() | {"bound": took.bound},
    "mfu_at_bound": counted.model / (peak * took.bound),
    "tokens_per_second_at_bound": tokens / took.bound,
    "assumptions": _ASSUMED,
  }


def text(found: dict[str, Any]) -> str:
  """The report as a person reads it."""
  mesh = " ".join(f"{k}={v}" for k, v in found["mesh"].items())
  lines = [
    f"{found['program']} on {found['topology']}: {found['chips']} chips,"
    f" {mesh}",
    f"  {found['batch_rows']} rows of {found['row_length']} tokens in"
    f" {_parts(found)}, remat {found['remat']}, {found['dtype']}, attention"
    f" {found['attention']}",
  ]
  if "memory" not in found:
    return "\n".join([*lines, f"  DOES NOT FIT: {found['why']}"])
  lines.append("  memory of a chip, GiB:")
  lines += [f"    {k:12s} {v:8.3f}" for k, v in found["memory"].items()]
  verdict = "fits" if found["fits"] else "DOES NOT FIT"
  lines.append(f"    of {found['hbm_gib']:g}: {verdict}")
  lines.append("  collectives of a chip and step:")
  for kind, total in found["collectives"].items():
    sent = total["gib"]
    sent = "length of a loop unknown" if sent is None else f"{sent:.3f} GiB"
    lines.append(
      f"    {kind:20s} {total['instructions']:4.0f} in the text, {sent}"
    )
  if "seconds" in found:
    counted, took = found["flops"], found["seconds"]
    lines += [
      f"  FLOPs: model {counted['model']:.3e}, hardware"
      f" {counted['hardware']:.3e}",
      "  seconds: "
      + ", ".join(
        f"{k} {'unknown' if v is None else f'{v:.3f}'}" for k, v in took.items()
      ),
      f"  at that bound {100 * found['mfu_at_bound']:.0f} % MFU,"
      f" {found['tokens_per_second_at_bound']:.3g} tokens/s",
      f"  {found['assumptions']}",
    ]
  return "\n".join(lines)


def _parts(found: dict[str, Any]) -> str:
  if "minibatches" not in found:
    return f"{found['microbatches']} micro-batches"
  return (
    f"{found['minibatches']} minibatches, {found['epochs']} epochs,"
    f" {found['constraints']} constraints"
  )


def write(path: str, found: Any) -> None:
  """JSON with a newline at its end."""
  with open(path, "w", encoding="utf-8") as file:
    json.dump(found, file, indent=1)
    file.write("\n")
