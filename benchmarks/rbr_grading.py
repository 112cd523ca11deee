"""Graders of propositions against people's marks, on the same folds.

python benchmarks/rbr_grading.py --data=DATA \
  --output=benchmarks/rbr/grading.json --graders=tfidf,states,both,judge,yes_no

The rows are those of DATA/rbr_gold, split by prompt. tfidf (words), states (of
the frozen judge) and both are trained on the other folds; judge and yes_no are
asked as they are. Long rows are cut for states (--most tokens), for no other.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np

from csrm_jax import errors
from csrm_jax.judge import SHIPPED, load
from csrm_jax.model.reward import DTYPES
from csrm_jax.rules import completions, graders, grading, trained
from csrm_jax.rules.completions import Completion
from csrm_jax.rules.propositions import Book

GRADERS = ("tfidf", "states", "both", "judge", "yes_no")


def grade(
  name: str, book: Book, rows: Sequence[Completion], flags: Any
) -> tuple[np.ndarray, dict[str, Any]]:
  """(probabilities, what to say of how they were made)."""
  talks = [row.messages for row in rows]
  if name == "judge":
    judge = load(flags.judge or str(SHIPPED)).computing(flags.dtype)
    graded = graders.judge_grader(judge)(book.propositions, talks)
    return graded, {"dtype": flags.dtype}
  if name == "yes_no":
    model = graders.yes_no_model(flags.model).computing(flags.dtype)
    graded = graders.yes_no_grader(model)(book.propositions, talks)
    return graded, {"dtype": flags.dtype}
  fold = trained.folds(rows, count=flags.folds)
  truths = completions.truths(rows)
  dense = None if name == "tfidf" else _states(rows, flags)
  out = np.zeros(truths.shape)
  for number in range(flags.folds):
    test = fold == number
    train = [row for row, t in zip(rows, test, strict=True) if not t]
    rest = [row for row, t in zip(rows, test, strict=True) if t]
    found = []
    if name != "states":
      read = trained.words(train)
      fitted = trained.regress(
        read(train), truths[~test], strength=trained.WORDS
      )
      found.append(fitted(read(rest)))
    if dense is not None:
      fitted = trained.regress(
        dense[~test], truths[~test], strength=flags.strength
      )
      found.append(fitted(dense[test]))
    out[test] = trained.joined(found)
  sizes = np.bincount(fold, minlength=flags.folds).tolist()
  return out, {"folds": sizes}


def _states(rows: Sequence[Completion], flags: Any) -> np.ndarray:
  """Kept in a file, if one is named, since they cost most."""
  model = load(flags.judge or str(SHIPPED))
  if flags.cache:
    return trained.kept_states(model, rows, flags.cache, most=flags.most)
  return trained.states(model, rows, most=flags.most)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--data", required=True, help="folder with rbr_gold/")
  parser.add_argument("--output", required=True)
  parser.add_argument("--graders", default="tfidf,states,both")
  parser.add_argument("--judge", default="", help="default: the shipped one")
  parser.add_argument("--model", default="smollm2", help="for yes_no")
  parser.add_argument("--folds", type=int, default=3)
  parser.add_argument("--most", type=int, default=256, help="tokens of a row")
  parser.add_argument("--strength", type=float, default=trained.STATES)
  parser.add_argument("--rows", type=int, default=0, help="first so many")
  parser.add_argument(
    "--dtype", default="float32", choices=DTYPES, help="of judge and yes_no"
  )
  parser.add_argument("--cache", default="", help=".npz file of states")
  flags = parser.parse_args()
  with errors.told():
    book, rows = completions.read_gold(flags.data)
    rows = rows[: flags.rows or len(rows)]
    output = Path(flags.output)
    found: dict[str, Any] = {}
    if output.is_file():
      found = json.loads(output.read_text("utf-8"))["graders"]
    for name in flags.graders.split(","):
      if name not in GRADERS:
        raise ValueError(f"--graders={name}: use some of {', '.join(GRADERS)}")
      began = time.perf_counter()
      chances, told = grade(name, book, rows, flags)
      seconds = time.perf_counter() - began
      measured = grading.report(book.names, chances, completions.truths(rows))
      found[name] = {"seconds": round(seconds, 1), **told, **measured}
      print(
        f"{name}: macro-F1 {measured['macro_f1']:.3f} over {measured['over']},"
        f" AUROC {measured['macro_auroc']:.3f}, accuracy"
        f" {measured['accuracy']:.3f}, smECE {measured['smece']:.3f},"
        f" {seconds:.0f} s"
      )
      output.parent.mkdir(parents=True, exist_ok=True)
      about = machine.describe(("jax", "scikit-learn"), {flags.data: "DATA"})
      content = about | {"graders": found}
      output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
  main()
