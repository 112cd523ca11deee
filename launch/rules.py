"""Rule-based rewards: compose completions, grade them, fit weights.

python launch/rules.py compose --output=runs/rules/composed.jsonl
python launch/rules.py grade --input=runs/rules/composed.jsonl \
  --grader=trained:runs/rules/composed.jsonl \
  --reward=models/smollm2-135m-helpfulness --output=runs/rules/graded.jsonl
python launch/rules.py fit --input=runs/rules/graded.jsonl --output=runs/rules

docs/rules.md explains the files; `--help` after a command lists its options.
"""

import argparse
import json
import os
from pathlib import Path

from csrm_jax import errors
from csrm_jax.eval.chat import Endpoint, asker
from csrm_jax.judge import SHIPPED, load
from csrm_jax.model.reward import DTYPES
from csrm_jax.rules import (
  completions,
  graders,
  grading,
  named,
  plots,
  propositions,
  synthetic,
  weights,
)
from csrm_jax.score_cached import SpecCache


def compose(flags: argparse.Namespace) -> None:
  book = propositions.read(flags.book)
  domains = [name for name in flags.domains.split(",") if name]
  asked = synthetic.prompts(domains, heldout=flags.heldout, seed=flags.seed)
  counts: dict[str, int] = {}
  made = synthetic.compose(
    book,
    asked,
    per_class=flags.per_class,
    seed=flags.seed,
    ask=asker(_endpoint(flags)) if flags.url else None,
    counts=counts,
  )
  completions.write(flags.output, made, book)
  told = ", ".join(f"{name} {number}" for name, number in counts.items())
  print(f"{flags.output}: {len(asked)} prompts; {told}")


def grade(flags: argparse.Namespace) -> None:
  book = propositions.read(flags.book)
  rows = completions.read(flags.input, book)
  talks = [row.messages for row in rows]
  if flags.grader == "labels":
    graded = graders.human_grader(book, rows)(book.propositions, talks)
  else:
    graded = _grader(flags, book)(book.propositions, talks)
  rows = [
    row._replace(chances=chances)
    for row, chances in zip(rows, graded, strict=True)
  ]
  if flags.reward:
    helpful = SpecCache(
      load(flags.reward).computing(flags.dtype), []
    ).helpfulness(talks)
    rows = [
      row._replace(helpfulness=float(h))
      for row, h in zip(rows, helpful, strict=True)
    ]
  completions.write(flags.output, rows, book)
  print(f"{flags.output}: {len(rows)} completions graded")
  if all(row.truths is not None for row in rows):
    found = grading.report(book.names, graded, completions.truths(rows))
    path = Path(flags.output).with_suffix(".report.json")
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(
      f"{path}: accuracy {found['accuracy']:.3f}, smECE {found['smece']:.3f},"
      f" macro-F1 {found['macro_f1']} over {found['over']} propositions"
    )


def _grader(
  flags: argparse.Namespace, book: propositions.Book
) -> graders.Grader:
  if flags.grader == "endpoint":
    return graders.endpoint_grader(_endpoint(flags))
  judge = load(flags.judge or str(SHIPPED)).computing(flags.dtype)
  return named.grader(flags.grader, judge=judge, book=book)


def _endpoint(flags: argparse.Namespace) -> Endpoint:
  if not flags.url or not flags.model:
    raise ValueError(
      "an endpoint needs --url=http(s)://host/v1 and --model=NAME"
    )
  return Endpoint(flags.url, flags.model, flags.key_variable, cache=flags.cache)


def fit(flags: argparse.Namespace) -> None:
  book = propositions.read(flags.book)
  rows = completions.read(flags.input, book)
  made = weights.fit_rows(
    book,
    rows,
    margin=flags.margin,
    per_rank=flags.per_rank,
    heldout=flags.heldout,
    seed=flags.seed,
    steps=flags.steps,
    weight_decay=flags.weight_decay,
    grader=os.path.basename(flags.input),
  )
  folder = Path(flags.output)
  weights.save(made, folder)
  plots.weights(made, folder / "weights.png")
  plots.rewards(made, rows, folder / "rewards.png")
  for kind, found in made.report.items():
    if "fitted" not in found:
      print(f"{kind}: {found['rows']} rows, nothing to fit")
      continue
    held = found["heldout"]
    told = "none held out"
    if held["pairs"]:
      told = (
        f"held out: error {held['pair_error']:.3f}, by helpfulness alone"
        f" {held['pair_error_helpfulness']:.3f}"
      )
    print(
      f"{kind}: {found['fitted']['pairs']:.0f} pairs of {found['prompts']}"
      f" prompts, loss {found['fitted']['loss']:.4f} (optimum"
      f" {found['optimum']:.4f}), clipped {found['fitted']['clipped']:.2f};"
      f" {told}"
    )
  print(f"{folder / weights.FILE}: use it by --config.align.rules={folder}")


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  commands = parser.add_subparsers(dest="command", required=True)
  for run in (compose, grade, fit):
    command = commands.add_parser(run.__name__)
    command.set_defaults(run=run)
    command.add_argument(
      "--book",
      default=str(propositions.OURS),
      help="propositions and classes (YAML); default: ours",
    )
    command.add_argument("--output", required=True)
    if run is not compose:
      command.add_argument("--input", required=True, help="completions")
    if run is not grade:
      command.add_argument("--seed", type=int, default=0)
    if run is not fit:
      _endpoint_options(command)
  _options(commands)
  flags = parser.parse_args()
  with errors.told():
    flags.run(flags)


def _endpoint_options(command: argparse.ArgumentParser) -> None:
  for name, told in (
    ("url", "an OpenAI-compatible endpoint, http(s)://host/v1"),
    ("model", "its name there"),
    ("key_variable", "environment variable that holds the key"),
    ("cache", "JSON-lines file of answers"),
  ):
    command.add_argument(f"--{name}", default="", help=told)


def _options(commands: argparse._SubParsersAction) -> None:
  add = commands.choices["compose"].add_argument
  add("--domains", default="", help="of the world, A,B; default: training's")
  add("--per_class", type=int, default=1, help="completions of each class")
  add("--heldout", action="store_true", help="prompts kept back from training")
  add = commands.choices["grade"].add_argument
  add(
    "--grader",
    default="",
    help="a judge's folder (default: --judge), yes_no:MODEL (smollm2, a"
    " folder), trained:FILE (marked completions), endpoint, or labels",
  )
  add(
    "--judge",
    default="",
    help="grades, or lends its states to trained:FILE; default: the shipped"
    " one",
  )
  add("--reward", default="", help="judge with a helpfulness head: adds h")
  add(
    "--dtype",
    default="float32",
    choices=DTYPES,
    help="of judge and reward model; mixed is faster where bfloat16 is",
  )
  add = commands.choices["fit"].add_argument
  add("--margin", type=float, default=1.0, help="units of reward")
  add("--per_rank", type=float, default=0.0, help="more of it a rank apart")
  add("--heldout", type=float, default=0.05, help="share of pairs, by prompt")
  add("--steps", type=int, default=1000)
  add("--weight_decay", type=float, default=0.0)


if __name__ == "__main__":
  main()
