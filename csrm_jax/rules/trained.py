"""Trained graders: logistic regression on words, on a frozen model's states."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from csrm_jax.data import template
from csrm_jax.judge import Judge
from csrm_jax.model.cache import empty, extend
from csrm_jax.model.reward import RewardModel
from csrm_jax.rules.completions import Completion
from csrm_jax.types import Params

_LENGTHS = (64, 128, 192, 256, 384, 512)  # tokens that get compiled


def folds(rows: Sequence[Completion], *, count: int) -> Int[np.ndarray, " n"]:
  """Number of the fold of each row: a hash of its prompt decides."""
  return np.array([int(row.family, 16) % count for row in rows])


def states(
  judge: Judge,
  rows: Sequence[Completion],
  *,
  most: int = 256,
) -> Float[np.ndarray, "n f"]:
  """What a frozen model makes of each response, read behind its prompt.

  Final-norm states, averaged over the tokens of the response, and the last
  one. Of a long prompt the tail is read, of a long response the head: no more
  than `most` tokens in all, half of them of the prompt where both are long.

  Args:
    judge: any model that `judge.load` or `graders.yes_no_model` gives.
    rows: their last message is the response.
    most: tokens read of a row, up to 512.
  """
  found = []
  for row in rows:
    before, after = _ids(judge, row, most)
    length = next(n for n in _LENGTHS if len(before) + len(after) <= n)
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(before) + len(after)] = before + after
    found.append(
      np.asarray(
        _read(
          judge.model,
          judge.params,
          tokens,
          np.int32(len(before)),
          np.int32(len(after)),
        )
      )
    )
  return np.stack(found).astype(np.float64)


def _ids(
  judge: Judge, row: Completion, most: int
) -> tuple[list[int], list[int]]:
  words = judge.tokenizer
  form = template.FORMATS[words.style]
  parts = [
    template.fill(
      form.answer if m["role"] == "assistant" else form.turn,
      m["role"],
      words.mark(m["content"]),
    )
    for m in row.messages
  ]
  before = words.encode_marked("".join(parts[:-1]))
  after = words.encode_marked(parts[-1])
  kept = after[: max(most // 2, most - len(before))]
  room = most - len(kept)
  return before[len(before) - min(room, len(before)) :], kept


def _forward(
  model: RewardModel,
  params: Params,
  tokens: Int[Array, "1 l"],
  before: Int[Array, ""],
  after: Int[Array, ""],
) -> Float[Array, " f"]:
  """Mean over the `after` tokens of the response, then the last of them."""
  rows, length = tokens.shape
  index = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
  x, _ = extend(model, params, tokens, index, causal, empty(model, rows))
  x = model._final_norm(params, x)[0].astype(jnp.float32)
  place = jnp.arange(length)
  said = (place >= before) & (place < before + after)
  mean = jnp.sum(jnp.where(said[:, None], x, 0.0), 0) / jnp.maximum(after, 1)
  return jnp.concatenate([mean, x[before + after - 1]])


_read = jax.jit(_forward, static_argnums=0)


def words(
  train: Sequence[Completion], rows: Sequence[Completion]
) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
  """TF-IDF of prompt and response, one and two words; fitted on `train`."""
  seen, new = [], []
  for part in (slice(None, -1), slice(-1, None)):
    reader = TfidfVectorizer(
      ngram_range=(1, 2), max_features=30_000, sublinear_tf=True
    )
    seen.append(reader.fit_transform(_texts(train, part)))
    new.append(reader.transform(_texts(rows, part)))
  return (
    scipy.sparse.csr_array(scipy.sparse.hstack(seen)),
    scipy.sparse.csr_array(scipy.sparse.hstack(new)),
  )


def _texts(rows: Sequence[Completion], part: slice) -> list[str]:
  return ["\n".join(m["content"] for m in row.messages[part]) for row in rows]


def regress(
  train: Float[np.ndarray, "n f"] | scipy.sparse.csr_array,
  truths: Bool[np.ndarray, "n k"],
  rows: Float[np.ndarray, "m f"] | scipy.sparse.csr_array,
  *,
  strength: float = 1.0,
  balanced: bool = True,
) -> Float[np.ndarray, "m k"]:
  """Probabilities by one logistic regression a proposition.

  Args:
    train: features, dense ones are standardised.
    truths: of the training rows. One that is always (or never) true gets the
      share of (n true + 1/2) in n + 1.
    rows: features to grade.
    strength: inverse of the L2 penalty.
    balanced: weighs both answers alike, which rare propositions need to be
      found at 1/2; probabilities then are too high for what is rare.
  """
  graded: Any = rows
  out = np.zeros((graded.shape[0], truths.shape[1]))
  for column in range(truths.shape[1]):
    gold = truths[:, column]
    if gold.all() or not gold.any():
      out[:, column] = (gold.sum() + 0.5) / (len(gold) + 1)
      continue
    model = LogisticRegression(
      C=strength,
      max_iter=2000,
      class_weight="balanced" if balanced else None,
    )
    dense = not scipy.sparse.issparse(train)
    whole: Any = model
    if dense:
      whole = make_pipeline(StandardScaler(), model)
    whole.fit(train, gold)
    out[:, column] = whole.predict_proba(rows)[:, 1]
  return out
