"""Rule-based rewards fitted without people: composed, graded, fitted.

python benchmarks/rbr_fit.py --workdir=DIR --output=benchmarks/rbr/fit

Runs launch/rules.py compose, grade (by a grader trained on what was composed,
of other prompts) and fit in DIR; what lies there already is not made again.
fit.json has pair errors on held-out prompts, by helpfulness alone beside, and
how good the grader is; weights.png and rewards.png are copied.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import machine

REWARD = "models/smollm2-135m-helpfulness"


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--output", required=True)
  parser.add_argument("--dtype", default="mixed")
  flags = parser.parse_args()
  work, output = Path(flags.workdir), Path(flags.output)
  composed, graded = work / "composed.jsonl", work / "graded.jsonl"
  steps = {
    "compose": (composed, [f"--output={composed}"]),
    "grade": (
      graded,
      [
        f"--input={composed}",
        f"--grader=trained:{composed}",
        f"--reward={machine.ROOT / REWARD}",
        f"--dtype={flags.dtype}",
        f"--output={graded}",
      ],
    ),
    "fit": (work / "rules.json", [f"--input={graded}", f"--output={work}"]),
  }
  seconds = {}
  for name, (made, options) in steps.items():
    if made.is_file() and name != "fit":
      continue
    began = time.perf_counter()
    machine.launch("rules.py", name, *options)
    seconds[name] = round(time.perf_counter() - began, 1)
  output.mkdir(parents=True, exist_ok=True)
  for plot in ("weights.png", "rewards.png"):
    shutil.copy(work / plot, output / plot)
  about = machine.describe(
    ("jax", "flax", "optax", "scikit-learn"),
    {flags.workdir: "DIR", flags.output: "FOLDER"},
  )
  told = json.loads((work / "rules.json").read_text("utf-8"))["report"]
  grader = json.loads(graded.with_suffix(".report.json").read_text("utf-8"))
  found = {"fit": told, "grader": grader, "seconds": seconds} | about
  (output / "fit.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
  for kind, of in told.items():
    held = of["heldout"]
    print(
      f"{kind}: pair error on {held['pairs']:.0f} held-out pairs"
      f" {held['pair_error']:.3f}, by helpfulness alone"
      f" {held['pair_error_helpfulness']:.3f}"
    )


if __name__ == "__main__":
  main()
