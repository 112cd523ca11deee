"""Evaluates a reward model and its baselines on suites.

python launch/evaluate.py --model=runs/demo \
    --suite=synthetic_seen,synthetic_unseen --output=runs/demo/report.json

Writes the report and, beside it, a page (.html), rows.jsonl (a line per row and
judge), reliability.png, flips.png and training.png; with --probe also
probes.md, the judges side by side; prints a table. Of several processes the
first evaluates, on one of its devices, and the others wait.
"""

import argparse

from csrm_jax import errors, hosts, peers


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model", help="workdir, checkpoint or Hugging Face folder"
  )
  parser.add_argument(
    "--suite",
    help="synthetic_seen, synthetic_unseen, heldout (rows that preparation"
    " kept from training), real (all suites of real sets, see docs/data.md),"
    " one of them or another set of docs/data.md (its held-out families), or a"
    " .jsonl file; several joined by commas",
  )
  parser.add_argument(
    "--data", help="folder of the real sets; for heldout of prepared rows"
  )
  parser.add_argument("--output", help="the report, a .json file")
  parser.add_argument(
    "--judges",
    default="csrm,spec_shuffled,always_unsafe,tfidf",
    help="joined by commas; also always_safe, tfidf_no_spec, minilm,"
    " minilm_cosine, smollm2 (untrained), hf:FOLDER (a guard or classifier,"
    " needs torch), endpoint:MODEL@URL (key in CSRM_ENDPOINT_KEY)",
  )
  parser.add_argument(
    "--train_rows",
    help=".jsonl file that baselines learn from; default: what the model did",
  )
  parser.add_argument(
    "--rows",
    type=int,
    default=0,
    help="of each suite, by whole families; 0: all (synthetic: 400, those of"
    " real: about 600)",
  )
  parser.add_argument(
    "--protocol",
    default="",
    help="joined by commas: any_turn (every assistant turn is judged, the"
    " lowest counts), top_rules (the 20 rules that BM25 finds nearest)",
  )
  parser.add_argument(
    "--probe",
    type=int,
    default=0,
    help="cases of each suite for sensitivity and failure checks; 0: none",
  )
  parser.add_argument(
    "--bootstrap",
    type=int,
    default=500,
    help="resamples for the 95 %% intervals; 0: none",
  )
  parser.add_argument(
    "--seed", type=int, default=0, help="of synthetic suites and resamples"
  )
  parser.add_argument(
    "--on_bad_row",
    choices=("stop", "quarantine"),
    default="stop",
    help="quarantine: bad rows of a .jsonl suite go to OUTPUT.quarantine.jsonl,"
    " the others are judged",
  )
  for name, (kind, meaning) in hosts.FLAGS.items():
    parser.add_argument(f"--{name}", type=kind, help=meaning)
  flags = parser.parse_args()
  for name, example in (
    ("model", "--model=runs/demo"),
    ("suite", "--suite=synthetic_unseen, or --suite=rows.jsonl"),
    ("output", "--output=report.json"),
  ):
    if not getattr(flags, name):
      parser.error(f"--{name} is missing; give {example}")
  for name in ("rows", "probe", "bootstrap"):
    if getattr(flags, name) < 0:
      parser.error(f"--{name}={getattr(flags, name)}: give 0 or more")
  place = {name: getattr(flags, name) for name in hosts.FLAGS}
  with errors.told(), peers.joined(**place), errors.told():
    peers.first("evaluation", lambda: write_report(flags))


def write_report(flags: argparse.Namespace) -> None:
  from csrm_jax.eval import output, run

  report = run.evaluate(
    flags.model,
    flags.suite,
    data=flags.data,
    output=flags.output,
    judge_names=[n.strip() for n in flags.judges.split(",") if n.strip()],
    train_rows=flags.train_rows,
    rows=flags.rows,
    protocol=[n.strip() for n in flags.protocol.split(",") if n.strip()],
    probe=flags.probe,
    bootstrap=flags.bootstrap,
    seed=flags.seed,
    on_bad_row=flags.on_bad_row,
  )
  print(output.table(report))
  if flags.on_bad_row == "quarantine":
    bad = sum(s.get("quarantined", 0) for s in report["suites"].values())
    print(f"{bad} bad rows put aside in {flags.output}.quarantine.jsonl")
  print(f"wrote {flags.output}")


if __name__ == "__main__":
  main()
