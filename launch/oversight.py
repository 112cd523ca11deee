"""Measures whether debates, or verdicts rule by rule, help a judge.

python launch/oversight.py --model=runs/demo --suite=synthetic_unseen \
    --rows=40 --debater=smollm2 --output=runs/demo/oversight.json

Two sides argue for and against the compliance of each response, and the judge
reads them before its verdict; or it reads its own verdict on every rule alone.
Figures are of agreement with gold labels, each against the plain judge, with
95 % intervals; docs/oversight.md.
"""

import argparse
import json
from pathlib import Path

from csrm_jax import errors


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, meaning in (
    ("model", "the judge: workdir, checkpoint, export, Hugging Face folder"),
    ("suite", "label rows: one suite, as of launch/evaluate.py"),
    ("output", "the report, a .json file"),
  ):
    parser.add_argument(f"--{name}", required=True, help=meaning)
  parser.add_argument("--data", help="folder of the real sets")
  parser.add_argument(
    "--answers", default="", help=".jsonl of all log-odds and transcripts"
  )
  parser.add_argument(
    "--debater",
    default="",
    help="smollm2, a Hugging Face folder, a .gguf file, or endpoint:MODEL@URL"
    " (key in CSRM_ENDPOINT_KEY); empty: no debates",
  )
  for name, value, meaning in (
    ("rows", 100, "of the suite, by whole families; 0: all"),
    ("rounds", 1, "words of each side"),
    ("prompt_length", 512, "tokens; who has more to read says nothing"),
    ("response_length", 48, "tokens of a side's word, at most"),
    ("bootstrap", 2000, "resamples for the 95 %% intervals"),
    ("seed", 0, "of samples and resamples"),
  ):
    parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
  flags = parser.parse_args()
  for name in ("rounds", "prompt_length", "response_length"):
    if getattr(flags, name) < 1:
      parser.error(f"--{name}={getattr(flags, name)}: give 1 or more")
  with errors.told():
    write_report(flags)


def write_report(flags: argparse.Namespace) -> None:
  from csrm_jax import storage
  from csrm_jax.align.debater import oversee
  from csrm_jax.eval import oversight

  found = oversee(
    flags.model,
    flags.suite,
    name=flags.debater,
    data=flags.data,
    rows=flags.rows,
    rounds=flags.rounds,
    prompt_length=flags.prompt_length,
    response_length=flags.response_length,
    bootstrap=flags.bootstrap,
    seed=flags.seed,
  )
  answers = found.pop("answers")
  files = {flags.output: json.dumps(found, indent=2) + "\n"}
  if flags.answers:
    files[flags.answers] = "".join(json.dumps(x) + "\n" for x in answers)
  for name, text in files.items():
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(Path(name), text)
  print(oversight.table(found))
  print(f"wrote {', '.join(files)}")


if __name__ == "__main__":
  main()
