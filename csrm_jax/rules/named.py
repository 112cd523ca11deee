"""Graders by the name that flags and recipes give them."""

from pathlib import Path

from csrm_jax.judge import Judge, load
from csrm_jax.rules import completions
from csrm_jax.rules.graders import (
  Grader,
  judge_grader,
  yes_no_grader,
  yes_no_model,
)
from csrm_jax.rules.propositions import Book
from csrm_jax.rules.trained import trained_grader

YES_NO = "yes_no:"  # prefix of a language model
TRAINED = "trained:"  # prefix of a file of marked completions


def grader(name: str, *, judge: Judge, book: Book) -> Grader:
  """The grader of a name.

  Args:
    name: "": `judge`; "yes_no:MODEL": a language model; "trained:FILE":
      learnt from the completions of FILE on the states of `judge`, which are
      kept beside it (its name, .states.npz); else the folder of another judge.
    judge: grades itself, or lends its states; says in which dtype a judge of a
      folder computes.
    book: of the propositions.

  Raises:
    ValueError: no such model or file, or a completion that is not marked.
  """
  if name.startswith(YES_NO):
    return yes_no_grader(yes_no_model(name.removeprefix(YES_NO)))
  if name.startswith(TRAINED):
    file = Path(name.removeprefix(TRAINED))
    rows = completions.read(file, book)
    cache = file.with_suffix(".states.npz")
    return trained_grader(judge, rows, book, cache=cache)
  if name:
    judge = load(name).computing(judge.model.dtype)
  return judge_grader(judge)
