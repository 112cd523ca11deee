"""Judges: functions from rows to log-odds of compliance, ours and baselines.

A judge takes the rows of a suite (`messages`, `spec`) and returns one float64
for each, larger = complies. A row without a spec asks for helpfulness; a judge
that has no such readout answers NaN.
"""

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from csrm_jax import score
from csrm_jax.data import template
from csrm_jax.eval.suites import spec_text
from csrm_jax.metrics import complies

Row = Mapping[str, Any]
Judge = Callable[[Sequence[Row]], Float[np.ndarray, " n"]]

NAMES = ("csrm", "spec_shuffled", "always_unsafe", "tfidf")
# The constant verdict, at the confidence of a model that means it: p_comply =
# 4.5e-5. An infinite one would make nll infinite.
ALWAYS_UNSAFE = -10.0
TFIDF_ROWS = 20_000


def csrm(loaded: score.Judge) -> Judge:
  """A reward model of ours; NaN where it has no trained helpfulness head."""

  def judge(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    result = np.full(len(rows), np.nan)
    under = [i for i, row in enumerate(rows) if row.get("spec") is not None]
    free = [i for i, row in enumerate(rows) if row.get("spec") is None]
    if under:
      asked = [rows[i] for i in under]
      scores = score.score_rows(loaded, asked, progress=sys.stderr.isatty())
      result[under] = [s.log_odds for s in scores]
    if free and loaded.has_helpfulness:
      sequences = [
        tuple(
          template.fit_to(
            loaded.tokenizer, rows[i]["messages"], None, loaded.context
          )[0]
        )
        for i in free
      ]
      result[free] = score.readouts(
        loaded, sequences, progress=sys.stderr.isatty()
      )[:, 1]
    return result

  return judge


def always_unsafe(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
  """Everything violates: what F1 has to be read against."""
  return np.full(len(rows), ALWAYS_UNSAFE)


def derangement(specs: Iterable[str], *, seed: int) -> dict[str, str]:
  """Maps each distinct spec to another one; a random cycle through all.

  Raises:
    ValueError: fewer than two distinct specs.
  """
  distinct = sorted(set(specs))
  if len(distinct) < 2:
    raise ValueError(
      "spec_shuffled needs rows under at least two different specs; leave "
      "this judge out"
    )
  random.Random(seed).shuffle(distinct)
  return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))


def spec_shuffled(judge: Judge, *, seed: int = 0) -> Judge:
  """The same model reading the wrong spec: what it knows without its spec.

  Rows that share a spec share the wrong one too, so scoring costs the same.
  """

  def score(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    specs = [spec_text(row) for row in rows]
    other = derangement([s for s in specs if s is not None], seed=seed)
    return judge(
      [
        {**row} if spec is None else {**row, "spec": other[spec]}
        for row, spec in zip(rows, specs, strict=True)
      ]
    )

  return score


def _conversation(row: Row) -> str:
  return "\n".join(m["content"] for m in row["messages"])


def tfidf(training: Iterable[Row], *, limit: int = TFIDF_ROWS) -> Judge:
  """Logistic regression on the words of the spec and of the conversation.

  One- and two-word TF-IDF features, separate for spec, earlier turns and
  judged response: a strong reader of words that cannot relate them.

  Args:
    training: contract rows; those with a label are used.
    limit: rows used at most.

  Raises:
    ValueError: the rows do not hold both labels.
  """
  rows = []
  for row in training:
    if "label" in row and "messages" in row:
      rows.append(row)
    if len(rows) == limit:
      break
  gold = complies(np.array([float(row["label"]) for row in rows]))
  if len(set(gold.tolist())) < 2:
    raise ValueError(
      f"tfidf: {len(rows)} labelled training rows without both verdicts; "
      "give rows that comply and rows that violate, or leave this judge out"
    )
  parts: list[Callable[[Row], str]] = [
    lambda row: spec_text(row) or "",
    _conversation,
    lambda row: row["messages"][-1]["content"],
  ]
  readers = [
    TfidfVectorizer(ngram_range=(1, 2), max_features=30_000, sublinear_tf=True)
    for _ in parts
  ]

  def features(rows: Sequence[Row], *, fit: bool) -> Any:
    made = []
    for reader, part in zip(readers, parts, strict=True):
      texts = [part(row) for row in rows]
      made.append(
        reader.fit_transform(texts) if fit else reader.transform(texts)
      )
    return scipy.sparse.hstack(made).tocsr()

  weight = np.array([float(row.get("weight", 1.0)) for row in rows])
  model = LogisticRegression(max_iter=1000)
  model.fit(features(rows, fit=True), gold, sample_weight=weight)

  def score(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    odds = model.decision_function(features(rows, fit=False))
    asked = np.array([row.get("spec") is not None for row in rows])
    return np.where(asked, odds, np.nan)

  return score
