"""Scores a file of conversations: JSON lines in, JSON lines out.

python launch/score.py --model=runs/demo --input=rows.jsonl \
  --output=scores.jsonl --spec=specs/kids_tutor.yaml

Without --model the judge in models/smollm2-135m-csrm is used.
"""

import argparse
import sys

from csrm_jax import errors
from csrm_jax.judge import SHIPPED, load
from csrm_jax.score_file import score_file
from csrm_jax.spec import Spec


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "--model",
    default=str(SHIPPED) if SHIPPED.is_dir() else "",
    help="a workdir of launch/train.py, one of its checkpoints, an export, a"
    ' Hugging Face folder, or "smollm2" (zero-shot); default: the judge in'
    " models/smollm2-135m-csrm of this repository",
  )
  parser.add_argument(
    "--base",
    default="",
    help="of an exported adapter: its backbone, if that is not where it was",
  )
  parser.add_argument(
    "--input", help="rows: id, messages and spec or spec_file; .jsonl[.gz]"
  )
  parser.add_argument("--output", help="scores, one line a row, same order")
  parser.add_argument(
    "--spec",
    default="",
    help="file (.yaml .md .txt) that judges every row, in place of their own",
  )
  parser.add_argument(
    "--turns",
    choices=("last", "any"),
    default="last",
    help="judge the last response, or each one and keep the lowest score",
  )
  parser.add_argument(
    "--max_tokens",
    type=int,
    default=0,
    help="longer rows are cut (history, then rules); 0: the model's context",
  )
  parser.add_argument(
    "--on_bad_row", choices=("stop", "quarantine"), default="stop"
  )
  parser.add_argument(
    "--helpfulness",
    action="store_true",
    help="also write the helpfulness readout",
  )
  flags = parser.parse_args()
  if not flags.model:
    parser.error(
      f"--model is missing and {SHIPPED} does not exist; give"
      " --model=runs/demo, or --model=smollm2 for a zero-shot judge"
    )
  for name, example in (
    ("input", "--input=rows.jsonl"),
    ("output", "--output=scores.jsonl"),
  ):
    if not getattr(flags, name):
      parser.error(f"--{name} is missing; give {example}")
  with errors.told():
    counts = score_file(
      load(flags.model, base=flags.base),
      flags.input,
      flags.output,
      spec=Spec.read(flags.spec) if flags.spec else None,
      turns=flags.turns,
      max_tokens=flags.max_tokens,
      on_bad_row=flags.on_bad_row,
      helpfulness=flags.helpfulness,
      progress=sys.stderr.isatty(),
    )
  print(f"{flags.output}: {counts['rows']} rows scored")
  if counts["truncated"]:
    print(
      f"{counts['truncated']} rows were cut to fit: {counts['cut_messages']}"
      f" messages dropped, {counts['cut_shortened']} shortened,"
      f" {counts['cut_rules']} rules dropped"
    )
  if flags.turns == "any":
    print("scores are minima over turns: they are not calibrated")
  if flags.on_bad_row == "quarantine":
    print(
      f"{counts['quarantined']} bad rows put aside in"
      f" {flags.output}.quarantine.jsonl"
    )


if __name__ == "__main__":
  main()
