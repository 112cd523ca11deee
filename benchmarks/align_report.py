"""Curves and front of alignment runs, side by side.

python benchmarks/align_report.py --output=benchmarks/align/smollm2 \
  clinic=runs/clinic study=runs/study plain=runs/plain
"""

import argparse
import json

from csrm_jax import errors
from csrm_jax.align.report import report


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
  parser.add_argument("--output", required=True, help="folder")
  flags = parser.parse_args()
  with errors.told():
    named = [run.partition("=") for run in flags.runs]
    for name, _, path in named:
      if not name or not path:
        raise ValueError(f"{name!r}: write NAME=WORKDIR, for example a=runs/a")
    found = report({name: path for name, _, path in named}, flags.output)
  print(json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
