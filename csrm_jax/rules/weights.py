"""Fitted weights of a book, by response type: made, kept in a folder, read."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from csrm_jax.rules import fit as fits
from csrm_jax.rules import propositions
from csrm_jax.rules.completions import Completion, truths
from csrm_jax.rules.propositions import Book

FILE, BOOK = "rules.json", "book.yaml"


@dataclasses.dataclass(frozen=True)
class RuleWeights:
  """What a completion earns for its form: w . phi, w of its response type.

  Attributes:
    book: whose features the weights are of.
    weights: by response type, in the order of `feature_names`.
    report: what was fitted on and how well, for each type.
    grader: that made the features in fitting; "" if people did.
  """

  book: Book
  weights: Mapping[str, Float[np.ndarray, " f"]]
  report: Mapping[str, Any]
  grader: str = ""

  def rewards(
    self, response_type: str, chances: Float[np.ndarray, "n k"]
  ) -> Float[np.ndarray, " n"]:
    """w . phi of completions whose prompts want this response type.

    Raises:
      ValueError: no weights for this type; says how to get some.
    """
    if response_type not in self.weights:
      raise ValueError(
        f"no weights for response type {response_type!r}, only for"
        f" {', '.join(self.weights)}; fit them on completions of that type"
      )
    phi = propositions.features(self.book, response_type, chances)
    return phi @ self.weights[response_type].astype(np.float64)


def chances_of(rows: Sequence[Completion]) -> Float[np.ndarray, "n k"]:
  """A grader's probabilities; of rows without any, what people said.

  Raises:
    ValueError: rows of both kinds, or with neither.
  """
  graded = [row.chances is not None for row in rows]
  if not any(graded):
    return truths(rows).astype(np.float64)
  if not all(graded):
    name = rows[graded.index(False)].id
    raise ValueError(
      f"completion {name!r}: field 'probabilities': missing, while others have"
      " it; grade all of them"
    )
  return np.array([row.chances for row in rows], np.float64)


def helpfulness_of(rows: Sequence[Completion]) -> Float[np.ndarray, " n"]:
  """Of the reward model; zeros if no row has any.

  Raises:
    ValueError: some rows have it and others not.
  """
  known = [row.helpfulness is not None for row in rows]
  if not any(known):
    return np.zeros(len(rows))
  if not all(known):
    name = rows[known.index(False)].id
    raise ValueError(
      f"completion {name!r}: field 'helpfulness': missing, while others have"
      " it; grade all of them with --reward"
    )
  return np.array([row.helpfulness for row in rows], np.float64)


def ranks_of(
  book: Book, kind: str, rows: Sequence[Completion]
) -> Int[np.ndarray, " n"]:
  """Rank of each row's class, 0 best, by its human or composed truths."""
  classes = propositions.classify(book, kind, truths(rows))
  return np.array(book.ranks[kind])[classes]


def fit_rows(
  book: Book,
  rows: Sequence[Completion],
  *,
  margin: float = 1.0,
  per_rank: float = 0.0,
  heldout: float = 0.05,
  seed: int = 0,
  steps: int = 1000,
  lr: float = 0.01,
  weight_decay: float = 0.0,
  grader: str = "",
) -> RuleWeights:
  """Weights of every response type that has ordered pairs.

  Classes come from the rows' truths, features from their probabilities (or
  from the truths, without a grader). For each type the report has counts of
  `rows` and of `prompts`, what `fit.measure` says of `fitted` and `heldout`
  pairs, and `optimum`, the exact minimum of the loss on the fitted ones.

  Args:
    book: of the rows.
    rows: several completions a prompt.
    margin: see `fit.make_pairs`, as `per_rank`.
    heldout: share of pairs kept from fitting, by prompt where there are two.
    seed: of which those are.
    steps: see `fit.fit`, as `lr` and `weight_decay`.
    grader: its name, for the file.

  Raises:
    ValueError: no type has an ordered pair, or rows lack what is needed.
  """
  found, report = {}, {}
  for kind in book.types:
    of_kind = [row for row in rows if row.response_type == kind]
    families = [row.family for row in of_kind]
    report[kind] = {"rows": len(of_kind), "prompts": len(set(families))}
    if not of_kind:
      continue
    pairs = fits.make_pairs(
      propositions.features(book, kind, chances_of(of_kind)),
      helpfulness_of(of_kind),
      ranks_of(book, kind, of_kind),
      families,
      margin=margin,
      per_rank=per_rank,
    )
    held = fits.hold_out(pairs.family, share=heldout, seed=seed)
    kept = pairs.keep(~held)
    if not len(kept.gap):
      report[kind]["pairs"] = 0
      continue
    made = fits.fit(kept, steps=steps, lr=lr, weight_decay=weight_decay)
    found[kind] = made.weights
    report[kind] |= {
      "fitted": fits.measure(made.weights, kept),
      "heldout": fits.measure(made.weights, pairs.keep(held)),
      "optimum": fits.optimum(kept)[1],
    }
  if not found:
    raise ValueError(
      "no two completions of one prompt and type differ in class, so nothing"
      " can be fitted; give several completions a prompt"
    )
  return RuleWeights(book, found, report, grader)


def save(made: RuleWeights, folder: str | Path) -> None:
  """Writes `rules.json`, and the book beside it.

  Raises:
    ValueError: the book came from no file.
  """
  source = Path(made.book.origin)
  if not source.is_file():
    raise ValueError(f"{source}: the book is no file; write it to one first")
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if source.resolve() != (folder / BOOK).resolve():
    shutil.copyfile(source, folder / BOOK)
  content = {
    "book_fingerprint": made.book.fingerprint(),
    "grader": made.grader,
    "weights": {
      kind: dict(
        zip(
          propositions.feature_names(made.book, kind), w.tolist(), strict=True
        )
      )
      for kind, w in made.weights.items()
    },
    "report": made.report,
  }
  text = json.dumps(content, indent=1) + "\n"
  (folder / FILE).write_text(text, "utf-8")


def load(folder: str | Path) -> RuleWeights:
  """Reads what `save` wrote; `folder` may be its `rules.json`.

  Raises:
    ValueError: a file is missing, or the weights are of another book.
  """
  folder = Path(folder)
  if folder.name == FILE:
    folder = folder.parent
  file = folder / FILE
  if not file.is_file():
    raise ValueError(
      f"{file}: missing; fit weights with launch/rules.py fit --output={folder}"
    )
  content = json.loads(file.read_text("utf-8"))
  book = propositions.read(folder / BOOK)
  if content["book_fingerprint"] != book.fingerprint():
    raise ValueError(
      f"{file}: book_fingerprint is {content['book_fingerprint']}, that of"
      f" {BOOK} beside it {book.fingerprint()}: its propositions or classes"
      " were changed. Fit the weights again"
    )
  weights = {
    kind: np.array(
      [w[name] for name in propositions.feature_names(book, kind)], np.float32
    )
    for kind, w in content["weights"].items()
  }
  return RuleWeights(book, weights, content["report"], content["grader"])
