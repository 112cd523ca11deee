"""Curves and front of alignment runs, side by side.

python benchmarks/align_report.py --output=benchmarks/align/smollm2 \
  --judges=models/smollm2-135m-csrm,runs/second_judge \
  --specs=specs/align/shop_desk.yaml,specs/align/book_club.yaml \
  desk=runs/desk club=runs/club plain=runs/plain

With --specs, the responses of every run are also judged under each of these
specs by each of the judges: crossed.json.
"""

import argparse
import json
from pathlib import Path

import machine

from csrm_jax import errors, storage
from csrm_jax.align.crossed import crossed
from csrm_jax.align.report import LAST, report
from csrm_jax.judge import SHIPPED, load


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
  parser.add_argument("--output", required=True, help="folder")
  parser.add_argument("--specs", default="", help="files, joined by commas")
  parser.add_argument("--judges", default=str(SHIPPED), help="folders")
  flags = parser.parse_args()
  with errors.told():
    named = [run.partition("=") for run in flags.runs]
    for name, _, path in named:
      if not name or not path:
        raise ValueError(f"{name!r}: write NAME=WORKDIR, for example a=runs/a")
    workdirs = {name: path for name, _, path in named}
    found = report(workdirs, flags.output)
    print(json.dumps(found, indent=1))
    if flags.specs:
      judges = {Path(j).name: load(j) for j in flags.judges.split(",")}
      table = crossed(workdirs, flags.specs.split(","), judges, last=LAST)
      file = Path(flags.output) / "crossed.json"
      measured = machine.describe(["jax", "flax"])
      storage.write_json(
        file, {"rates": table, "last_updates": LAST} | measured
      )
      for line in table:
        print(json.dumps(line))


if __name__ == "__main__":
  main()
