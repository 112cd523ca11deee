"""What a compiled recipe needs, as data and as text."""

import json
from pathlib import Path
from typing import Any

from csrm_jax.config import Config
from csrm_jax.pods import ahead, hlo, roofline
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
    program: "train" or "score".
    hlo_file: receives the optimised program's text.

  Returns:
    `fits`, `state_gib` (parameters and moments of a chip, by their placing) and
    `even_gib` (all of them over fsdp x tensor). Where it fits: `memory` (GiB a
    chip by kind), `arguments_gib` (state and batch as the compiler has them),
    `collectives` (by kind: instructions, GiB sent a chip and step, or null),
    `stacked_gathers` (gathers of kernels of all layers at once), and for the
    training step `flops` and `seconds` (each resource alone, and their
    maximum).

  Raises:
    ValueError: recipe, mesh and machine do not go together.
  """
  made = ahead.program(config, ahead.describe(topology))
  state = (made.state.params, made.state.opt_state)
  found: dict[str, Any] = {
    "topology": str(topology),
    "chips": topology.chips,
    "mesh": dict(made.mesh.shape),
    "program": program,
    "remat": made.model.remat,
    "dtype": made.model.dtype,
    "attention": made.model.attention,
    "batch_rows": config.batch_rows,
    "row_length": config.data.row_length,
    "microbatches": config.microbatches,
    "hbm_gib": topology.chip.hbm,
    "state_gib": ahead.bytes_a_chip(state) / ahead.GIB,
    "even_gib": ahead.even_share(state, made.mesh) / ahead.GIB,
  }
  try:
    done = ahead.compile_program(config, made, program)
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
      ahead.stacked_gathers(done.collectives, made.model.architecture.layers)
    ),
  }
  if program == "train":
    found |= _time(config, topology, made, done)
  return found


def _time(
  config: Config,
  topology: Topology,
  made: ahead.Program,
  done: ahead.Compiled,
) -> dict[str, Any]:
  counted = roofline.flops(config, made.model)
  layers = made.model.architecture.layers
  size = 2 if made.model.dtype == "bfloat16" else 4
  weights = layers * roofline.kernel_parameters(made.model) * size
  took = roofline.times(
    counted,
    topology,
    state_bytes=ahead.bytes_a_chip((made.state.params, made.state.opt_state)),
    weight_bytes=weights / made.mesh.shape["tensor"],
    collectives=done.collectives,
    replicas=made.mesh.shape["replica"],
  )
  peak = topology.chips * topology.chip.flops
  return {
    "flops": counted._asdict(),
    "seconds": took._asdict() | {"bound": took.bound},
    "mfu_at_bound": counted.model / (peak * took.bound),
    "tokens_per_second_at_bound": config.batch_rows
    * config.data.row_length
    / took.bound,
    "assumptions": _ASSUMED,
  }


def text(found: dict[str, Any]) -> str:
  """The report as a person reads it."""
  mesh = " ".join(f"{k}={v}" for k, v in found["mesh"].items())
  lines = [
    f"{found['program']} on {found['topology']}: {found['chips']} chips,"
    f" {mesh}",
    f"  {found['batch_rows']} rows of {found['row_length']} tokens in"
    f" {found['microbatches']} micro-batches, remat {found['remat']},"
    f" {found['dtype']}, attention {found['attention']}",
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


def write(path: str, found: Any) -> None:
  """JSON with a newline at its end."""
  with open(path, "w", encoding="utf-8") as file:
    json.dump(found, file, indent=1)
    file.write("\n")
