"""Trained graders: logistic regression on words, on a frozen model's states."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
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
from tqdm import tqdm

from csrm_jax.data import template
from csrm_jax.judge import Judge
from csrm_jax.model.cache import empty, extend
from csrm_jax.model.reward import RewardModel
from csrm_jax.rules import completions
from csrm_jax.rules.completions import Completion
from csrm_jax.rules.graders import Conversations, Grader
from csrm_jax.rules.propositions import Book, Proposition
from csrm_jax.types import Params

# Inverse of the L2 penalty, of words and of states.
WORDS, STATES = 10.0, 0.003
_ROWS = 16  # read at a time
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
  cut = [_ids(judge, row, most) for row in rows]
  by_length: dict[int, list[int]] = {}
  for i, (before, after) in enumerate(cut):
    length = next(n for n in _LENGTHS if len(before) + len(after) <= n)
    by_length.setdefault(length, []).append(i)
  found: dict[int, np.ndarray] = {}
  # A handful, as an alignment run asks for at every update, needs no bar.
  bar = tqdm(
    total=len(rows), desc="read", unit="row", disable=len(rows) <= 8 * _ROWS
  )
  for length, members in by_length.items():
    for first in range(0, len(members), _ROWS):
      chosen = members[first : first + _ROWS]
      tokens = np.zeros((_ROWS, length), np.int32)
      places = np.zeros((2, _ROWS), np.int32)
      for row, i in enumerate(chosen):
        ids = cut[i][0] + cut[i][1]
        tokens[row, : len(ids)] = ids
        places[:, row] = [len(part) for part in cut[i]]
      read = _read(judge.model, judge.params, tokens, places[0], places[1])
      found |= dict(zip(chosen, np.asarray(read), strict=False))
      bar.update(len(chosen))
  bar.close()
  return np.stack([found[i] for i in range(len(rows))]).astype(np.float64)


def kept_states(
  judge: Judge, rows: Sequence[Completion], file: str | Path, *, most: int = 256
) -> Float[np.ndarray, "n f"]:
  """`states`, kept in a file and read from it next time.

  Args:
    judge: whose states they are.
    rows: to read.
    file: .npz; written anew if it is of another judge, of other rows or cut.
    most: tokens read of a row.
  """
  file = Path(file)
  asked = [judge.fingerprint, judge.model.dtype, most]
  asked += [row.messages for row in rows]
  key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
  try:
    with np.load(file) as held:
      if str(held["key"]) == key:
        return held["states"].astype(np.float64)
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    pass  # there is none, or none that is whole
  found = states(judge, rows, most=most).astype(np.float32)
  part = file.with_suffix(".part.npz")
  np.savez(part, key=np.array(key), states=found)
  part.replace(file)
  return found.astype(np.float64)


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
  tokens: Int[Array, "n l"],
  before: Int[Array, " n"],
  after: Int[Array, " n"],
) -> Float[Array, "n f"]:
  """Mean over the `after` tokens of the response, then the last of them."""
  rows, length = tokens.shape
  index = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
  x, _ = extend(model, params, tokens, index, causal, empty(model, rows))
  x = model._final_norm(params, x).astype(jnp.float32)
  end = (before + after)[:, None]
  said = (index >= before[:, None]) & (index < end)
  total = jnp.sum(jnp.where(said[..., None], x, 0.0), 1)
  mean = total / jnp.maximum(after, 1)[:, None]
  last = jnp.take_along_axis(x, jnp.maximum(end - 1, 0)[..., None], 1)[:, 0]
  return jnp.concatenate([mean, last], 1)


_read = jax.jit(_forward, static_argnums=0)


def _key(row: Completion) -> str:
  return json.dumps(row.messages)


def words(
  train: Sequence[Completion],
) -> Callable[[Sequence[Completion]], scipy.sparse.csr_array]:
  """TF-IDF of prompt and response, one and two words; fitted on `train`."""
  parts = (slice(None, -1), slice(-1, None))
  readers = []
  for part in parts:
    reader = TfidfVectorizer(
      ngram_range=(1, 2), max_features=30_000, sublinear_tf=True
    )
    readers.append(reader.fit(_texts(train, part)))

  def read(rows: Sequence[Completion]) -> scipy.sparse.csr_array:
    found = [
      reader.transform(_texts(rows, part))
      for reader, part in zip(readers, parts, strict=True)
    ]
    return scipy.sparse.csr_array(scipy.sparse.hstack(found))

  return read


def _texts(rows: Sequence[Completion], part: slice) -> list[str]:
  return ["\n".join(m["content"] for m in row.messages[part]) for row in rows]


def regress(
  train: Float[np.ndarray, "n f"] | scipy.sparse.csr_array,
  truths: Bool[np.ndarray, "n k"],
  *,
  strength: float = 1.0,
  balanced: bool = True,
) -> Callable[..., Float[np.ndarray, "m k"]]:
  """One logistic regression a proposition: features to probabilities.

  Args:
    train: features, dense ones are standardised.
    truths: of the training rows. One that is always (or never) true gets the
      share of (n true + 1/2) in n + 1.
    strength: inverse of the L2 penalty.
    balanced: weighs both answers alike, which rare propositions need to be
      found at 1/2; probabilities then are too high for what is rare.
  """
  fitted: list[Any] = []
  for gold in truths.T:
    if gold.all() or not gold.any():
      fitted.append((gold.sum() + 0.5) / (len(gold) + 1))
      continue
    model: Any = LogisticRegression(
      C=strength,
      max_iter=2000,
      class_weight="balanced" if balanced else None,
    )
    if not scipy.sparse.issparse(train):
      model = make_pipeline(StandardScaler(), model)
    fitted.append(model.fit(train, gold))

  def grade(features: Any) -> Float[np.ndarray, "m k"]:
    out = np.zeros((features.shape[0], len(fitted)))
    for column, model in enumerate(fitted):
      known = isinstance(model, float)
      out[:, column] = model if known else model.predict_proba(features)[:, 1]
    return out

  return grade


def joined(
  opinions: Sequence[Float[np.ndarray, "n k"]],
) -> Float[np.ndarray, "n k"]:
  """Probabilities of several graders: the mean of their log-odds."""
  p = np.clip(np.stack(opinions), 1e-6, 1 - 1e-6)
  odds = np.mean(np.log(p) - np.log1p(-p), axis=0)
  return 1 / (1 + np.exp(-odds))


def trained_grader(
  judge: Judge,
  rows: Sequence[Completion],
  book: Book,
  *,
  count: int = 3,
  most: int = 256,
  cache: str | Path = "",
) -> Grader:
  """Grades by words and by states of a judge, learnt from marked completions.

  One model for each of `count` folds, fitted on the others. A prompt decides
  the fold, so no completion is graded by a model that has seen its prompt, not
  even one of `rows`.

  Args:
    judge: whose states are read; it stays as it is.
    rows: completions whose propositions are known.
    book: of these propositions; no other is graded.
    count: folds.
    most: tokens read of a completion, see `states`.
    cache: file that keeps the states of `rows`, see `kept_states`; "": none.

  Raises:
    ValueError: propositions are not known, or all prompts are in one fold.
  """
  truths = completions.truths(rows)
  fold = folds(rows, count=count)
  if cache:
    seen = kept_states(judge, rows, cache, most=most)
  else:
    seen = states(judge, rows, most=most)
  known = {_key(row): state for row, state in zip(rows, seen, strict=True)}
  models = []
  for number in range(count):
    others = np.flatnonzero(fold != number)
    if not len(others):
      raise ValueError(
        f"{len(rows)} completions of so few prompts that they are all in fold"
        f" {number} of {count}: nothing to learn from; give more prompts"
      )
    train = [rows[i] for i in others.tolist()]
    read = words(train)
    by_words = regress(read(train), truths[others], strength=WORDS)
    by_states = regress(seen[others], truths[others], strength=STATES)
    models.append((read, by_words, by_states))

  def grade(
    propositions: Sequence[Proposition], conversations: Conversations
  ) -> Float[np.ndarray, "n k"]:
    names = [p.name for p in propositions]
    columns = [book.names.index(name) for name in names]
    made = [Completion("", list(talk), "") for talk in conversations]
    asked = folds(made, count=count)
    if all(_key(row) in known for row in made):
      found = np.stack([known[_key(row)] for row in made])
    else:
      found = states(judge, made, most=most)
    out = np.zeros((len(made), len(columns)))
    for number, (read, by_words, by_states) in enumerate(models):
      here = np.flatnonzero(asked == number)
      if len(here):
        opinions = (
          by_words(read([made[i] for i in here.tolist()])),
          by_states(found[here]),
        )
        out[here] = joined(opinions)[:, columns]
    return out

  return grade
