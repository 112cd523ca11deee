"""One constitutional round of SmolLM2: does revising help, by two judges?

python benchmarks/constitutional.py --workdir=DIR --monitor=runs/demo \
    --output=benchmarks/constitutional [--change=align.constitutional.X=Y ...]

Runs configs/constitutional_smollm2.py in DIR, where it goes on if it was ended,
and writes round.json: compliance of drafts and final answers by the judge that
accepts and by the monitor that does not, refusals, failures, and beside them
command, versions and machine. No text of any answer.
"""

import argparse
import json
from pathlib import Path

import machine

from csrm_jax.align.revised import REPORT

REWARD = "models/smollm2-135m-helpfulness"


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--monitor", required=True, help="the second judge")
  parser.add_argument("--output", required=True)
  parser.add_argument(
    "--change", action="append", default=[], help="KEY=VALUE of the config"
  )
  flags = parser.parse_args()
  machine.launch(
    "align.py",
    f"--config={machine.ROOT / 'configs' / 'constitutional_smollm2.py'}",
    f"--config.align.reward={machine.ROOT / REWARD}",
    f"--config.align.monitor={flags.monitor}",
    *(f"--config.{change}" for change in flags.change),
    f"--workdir={flags.workdir}",
  )
  work, output = Path(flags.workdir), Path(flags.output)
  found = json.loads((work / REPORT).read_text("utf-8"))
  found["monitor"] = Path(flags.monitor).name
  config = json.loads((work / "config.json").read_text("utf-8"))
  found["constitutional"] = config["align"]["constitutional"]
  about = machine.describe(("jax", "flax"), {flags.workdir: "DIR"})
  output.mkdir(parents=True, exist_ok=True)
  path = output / "round.json"
  path.write_text(json.dumps(found | about, indent=1) + "\n", "utf-8")
  for side in ("judge", "monitor"):
    of = found["main"][side]
    change = of["difference"]
    print(
      f"{side}: drafts comply {of['draft']:.3f}, final answers"
      f" {of['final']:.3f} ({change['mean']:+.3f}, {change['low']:+.3f} to"
      f" {change['high']:+.3f})"
    )


if __name__ == "__main__":
  main()
