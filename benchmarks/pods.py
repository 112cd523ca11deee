"""Weak scaling of the pod recipes, by compiling them ahead of time.

python benchmarks/pods.py --output=benchmarks/pods [--recipes=csrm_llama3_8b]
    [--chips=8,64] [--table]

Rows a chip stay as in the recipe; parameters lie over at most 64 x tensor
chips, and the mesh is repeated beyond. One JSON file for each recipe and number
of chips; those that exist are kept. With --table nothing is compiled.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import machine

from csrm_jax.config import from_file

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu")
MOST_SHARDS = 64  # data shards that share one copy of the parameters


class Place(NamedTuple):
  """A machine: a slice's topology, and how many slices."""

  topology: str
  slices: int = 1


_V5P = {
  8: Place("v5p:2x2x2"),
  64: Place("v5p:4x4x4"),
  256: Place("v5p:4x8x8"),
  1024: Place("v5p:8x8x16"),
}
_V5E = {
  8: Place("v5e:2x4"),
  64: Place("v5e:8x8"),
  256: Place("v5e:16x16"),
  1024: Place("v5e:16x16", 4),
}
RECIPES = {
  "csrm_qwen3_4b": _V5E,
  "csrm_llama3_8b": _V5P,
  "csrm_llama3_70b": _V5P,
  "ppo_lag_llama3_8b": {64: _V5P[64]},
}


def arguments(recipe: str, chips: int) -> list[str]:
  """Of launch/compile.py, for a recipe scaled to a number of chips."""
  path = f"configs/{recipe}.py"
  config = from_file(ROOT / path)
  own = config.mesh.fsdp * config.mesh.tensor * max(config.mesh.replica, 1)
  place = RECIPES[recipe][chips]
  shards = chips // config.mesh.tensor
  fsdp = min(shards // place.slices, MOST_SHARDS)
  rows = f"--config.batch_rows={config.batch_rows * chips // own}"
  if config.align.specs:
    prompts = config.align.prompts_per_step * chips // own
    rows = f"--program=ppo --config.align.prompts_per_step={prompts}"
  return [
    f"--config={path}",
    f"--topology={place.topology}",
    f"--slices={place.slices}",
    *rows.split(),
    f"--config.mesh.replica={shards // fsdp}",
    f"--config.mesh.fsdp={fsdp}",
  ]


def measure(recipe: str, chips: int, output: Path) -> dict[str, Any]:
  """Compiles, in a process of its own, and writes what was found.

  Raises:
    RuntimeError: the compiler fails for another reason than memory.
  """
  file = output / f"{recipe}-{chips}.json"
  args = arguments(recipe, chips)
  command = ["launch/compile.py", *args, f"--output={file}"]
  done = subprocess.run(
    [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
  )
  if done.returncode not in (0, 3):
    raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
  found = json.loads(file.read_text())
  found["recipe"] = recipe
  found["command"] = "python " + " ".join(command[:-1])
  found["machine"] = machine.describe(PACKAGES)
  file.write_text(json.dumps(found, indent=1) + "\n")
  return found


def table(found: list[dict[str, Any]]) -> str:
  """One line for each recipe and number of chips."""
  head = (
    "recipe | machine | chips | mesh | rows | state | temporaries | all "
    "| of | fits | sent by a chip | bound, s"
  )
  lines = [f"| {head} |", "|" + "---|" * 12]
  for one in sorted(found, key=lambda f: (f["recipe"], f["chips"])):
    mesh = " x ".join(str(n) for n in one["mesh"].values())
    memory = one.get("memory", {})
    needed = memory.get("total", one.get("needed"))
    sent = [c["gib"] for c in one.get("collectives", {}).values()]
    cells = [
      one["recipe"],
      one["topology"],
      one["chips"],
      mesh,
      one["batch_rows"],
      f"{one['state_gib']:.2f}",
      f"{memory['temporaries']:.2f}" if memory else "—",
      "—" if needed is None else f"{needed:.2f}",
      f"{one['hbm_gib']:g}",
      "yes" if one["fits"] else "no",
      "—" if not sent or None in sent else f"{sum(sent):.1f}",
      f"{one['seconds']['bound']:.2f}" if "seconds" in one else "—",
    ]
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--output", type=Path, required=True)
  parser.add_argument("--recipes", default=",".join(RECIPES))
  parser.add_argument("--chips", default="8,64,256,1024")
  parser.add_argument("--table", action="store_true")
  args = parser.parse_args()
  args.output.mkdir(parents=True, exist_ok=True)
  for recipe in [] if args.table else args.recipes.split(","):
    for chips in map(int, args.chips.split(",")):
      done = (args.output / f"{recipe}-{chips}.json").exists()
      if done or chips not in RECIPES[recipe]:
        continue
      found = measure(recipe, chips, args.output.absolute())
      print(recipe, chips, "fits" if found["fits"] else found.get("why"))
  files = sorted(args.output.glob("*.json"))
  print(table([json.loads(f.read_text()) for f in files]))


if __name__ == "__main__":
  main()
