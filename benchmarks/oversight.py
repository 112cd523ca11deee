"""Does help for the shipped judge help? docs/oversight.md, with the machine.

python benchmarks/oversight.py --output=benchmarks/oversight \
    --suite=NAME [--data=FOLDER] [--rows=40] [--debater=smollm2]

Writes SUITE.json: figures alone, no text of any row.
"""

import argparse
import json
import time
from pathlib import Path

import machine

from csrm_jax import errors
from csrm_jax.align.debater import oversee
from csrm_jax.eval import oversight
from csrm_jax.judge import SHIPPED

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--output", type=Path, required=True)
  parser.add_argument("--suite", required=True)
  parser.add_argument("--data", help="folder of the real sets")
  parser.add_argument("--rows", type=int, default=40)
  parser.add_argument("--prompt_length", type=int, default=384)
  parser.add_argument("--response_length", type=int, default=32)
  parser.add_argument("--debater", default="smollm2")
  parser.add_argument("--model", default=str(SHIPPED))
  flags = parser.parse_args()
  began = time.perf_counter()
  with errors.told():
    found = oversee(
      flags.model,
      flags.suite,
      name=flags.debater,
      data=flags.data,
      rows=flags.rows,
      prompt_length=flags.prompt_length,
      response_length=flags.response_length,
    )
  del found["answers"]  # with transcripts, which quote the rows
  found["model"]["name"] = Path(flags.model).name
  found["seconds"] = time.perf_counter() - began
  found |= machine.describe(PACKAGES)
  flags.output.mkdir(parents=True, exist_ok=True)
  path = flags.output / f"{flags.suite}.json"
  path.write_text(json.dumps(found, indent=1) + "\n")
  print(oversight.table(found))


if __name__ == "__main__":
  main()
