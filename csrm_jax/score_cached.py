"""A judge that reads each spec once and keeps what it read.

What stands before the conversation depends on the spec alone. Its keys and
values are held for every spec; scoring runs the conversation behind them.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from csrm_jax import score
from csrm_jax.data import template
from csrm_jax.judge import Judge
from csrm_jax.model.cache import Cache, empty, extend
from csrm_jax.model.reward import RewardModel
from csrm_jax.score import Messages
from csrm_jax.spec import Spec

# Tokens of prefixes, and of what follows them, that get compiled; beyond that
# powers of two.
_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_TOKENS = 1024  # of a call on a CPU; accelerators take 8 times as many


class Scores(NamedTuple):
  """What a judge says about conversations under specs.

  Attributes:
    log_odds: as `score.Score.log_odds`; NaN where not asked.
    truncated: whether something was cut to fit, see `template.fit_to`; False
      where not asked.
  """

  log_odds: Float[np.ndarray, "n k"]
  truncated: Bool[np.ndarray, "n k"]


class _Prefix(NamedTuple):
  """What stands before the conversations under one spec."""

  spec: Spec | None  # None: the form without a spec, for helpfulness
  ids: tuple[int, ...]
  length: int  # of its keys, padding included; a key of `_stores`
  place: int  # among the prefixes of that length


class _Ask(NamedTuple):
  """One conversation under one spec."""

  row: int
  column: int
  prefix: _Prefix
  ids: tuple[int, ...]  # of what follows the prefix


class SpecCache:
  """A judge with the keys and values of every spec's prefix.

  They take 2 x layers x key heads x head_dim numbers a token: 45 KiB in
  float32 on SmolLM2-135M, so 50 specs of 256 tokens take 560 MiB.

  Attributes:
    judge: of `judge.load`.
    specs: in the order of the columns of `scores`.
    cut: sums over all calls so far: "messages", "shortened" and "rules" as in
      `template.fit_to`, and "uncached": sequences that lost rules, and so
      begin with no prefix that is held; they were computed as a whole.
  """

  def __init__(self, judge: Judge, specs: Sequence[Spec | str]):
    """Reads all prefixes.

    Raises:
      ValueError: an empty spec, or a judge that scores none.
    """
    self.judge = judge
    self.specs = tuple(Spec.parse(spec) for spec in specs)
    if self.specs:
      score.check_options(judge, turns="last", max_tokens=0, helpfulness=False)
    self.cut: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[int] = collections.Counter()
    self._prefixes: list[_Prefix] = []
    for spec in (*self.specs, None):
      text = None if spec is None else spec.render()
      ids = tuple(template.opening_ids(judge.tokenizer, text))
      # One that fills the context is cut, rule by rule, with each conversation.
      held = ids if len(ids) < judge.context else ()
      length = _bucket(len(held))
      self._prefixes.append(_Prefix(spec, held, length, counts[length]))
      counts[length] += 1
    self._stores = {length: self._read(length) for length in counts}

  def _read(self, length: int) -> Cache:
    """Keys and values of all prefixes of one padded length."""
    read, _ = _compiled(self.judge.model)
    parts = []
    for prefix in self._prefixes:
      if prefix.length == length:
        ids = np.zeros((1, length), np.int32)
        ids[0, : len(prefix.ids)] = prefix.ids
        parts.append(read(self.judge.params, ids))
    return Cache(
      *(jnp.concatenate(p, axis=1) for p in zip(*parts, strict=True))
    )

  def scores(
    self,
    conversations: Sequence[Messages],
    observed: Bool[np.ndarray, "n k"] | None = None,
  ) -> Scores:
    """Scores the last response of each conversation under each spec.

    Args:
      conversations: as of `score.score`.
      observed: which to score under which spec; None: all under all.

    Raises:
      ValueError: an `observed` of another shape, or a conversation, by its
        index, that is malformed or whose response does not fit.
    """
    shape = (len(conversations), len(self.specs))
    asked = np.ones(shape, bool) if observed is None else observed
    if asked.shape != shape:
      raise ValueError(
        f"observed has shape {asked.shape}; use {shape}: a row for each"
        " conversation, a column for each spec"
      )
    log_odds = np.full(shape, np.nan, np.float32)
    truncated = np.zeros(shape, bool)
    rows, columns = np.nonzero(asked)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    values, cuts = self._ask(conversations, pairs)
    for (row, column), value, cut in zip(pairs, values, cuts, strict=True):
      log_odds[row, column] = value[0] / self.judge.temperature
      truncated[row, column] = cut
    return Scores(log_odds, truncated)

  def helpfulness(
    self, conversations: Sequence[Messages]
  ) -> Float[np.ndarray, " n"]:
    """Readout of the helpfulness head for each last response, without a spec.

    Raises:
      ValueError: that head was not trained, or as `scores`.
    """
    score.check_helpfulness(self.judge)
    pairs = [(row, len(self.specs)) for row in range(len(conversations))]
    return self._ask(conversations, pairs)[0][:, 1]

  def _ask(
    self, conversations: Sequence[Messages], pairs: Sequence[tuple[int, int]]
  ) -> tuple[Float[np.ndarray, "m 2"], list[bool]]:
    """Readouts of (conversation, prefix) pairs, and which were truncated."""
    values = np.zeros((len(pairs), 2), np.float32)
    truncated, groups, whole = [], collections.defaultdict(list), {}
    for number, (row, column) in enumerate(pairs):
      prefix = self._prefixes[column]
      ids, cut = self._fit(conversations, row, prefix.spec)
      self.cut.update(cut)
      truncated.append(any(cut.values()))
      held = len(prefix.ids)
      if held and tuple(ids[:held]) == prefix.ids:
        ask = _Ask(number, column, prefix, tuple(ids[held:]))
        groups[prefix.length].append(ask)
      else:
        whole[number] = tuple(ids)
    self.cut["uncached"] += len(whole)
    for length, asks in groups.items():
      for batch in _batches(asks):
        values[[ask.row for ask in batch]] = self._suffixes(length, batch)
    if whole:
      values[list(whole)] = score.readouts(self.judge, list(whole.values()))
    return values, truncated

  def _fit(
    self, conversations: Sequence[Messages], row: int, spec: Spec | None
  ) -> tuple[list[int], dict[str, int]]:
    judge = self.judge
    try:
      return template.fit_to(
        judge.tokenizer, conversations[row], spec, judge.context
      )
    except ValueError as error:
      raise ValueError(f"conversation {row}: {error}") from error

  def _suffixes(
    self, length: int, asks: Sequence[_Ask]
  ) -> Float[np.ndarray, "m 2"]:
    """Readouts of one call, whose shapes are of a few."""
    size = _bucket(max(len(ask.ids) for ask in asks))
    rows = 1 if len(asks) == 1 else _rows(size)
    # The last one is repeated to fill the call up.
    filled = [*asks, *[asks[-1]] * (rows - len(asks))]
    tokens = np.zeros((rows, size), np.int32)
    for row, ask in zip(tokens, filled, strict=True):
      row[: len(ask.ids)] = ask.ids
    _, run = _compiled(self.judge.model)
    found = run(
      self.judge.params,
      self._stores[length],
      np.array([ask.prefix.place for ask in filled], np.int32),
      np.array([len(ask.prefix.ids) for ask in filled], np.int32),
      tokens,
      np.array([len(ask.ids) for ask in filled], np.int32),
    )
    return np.asarray(found)[: len(asks)]


def _bucket(length: int) -> int:
  for known in _LENGTHS:
    if length <= known:
      return known
  return 1 << (length - 1).bit_length()


def _rows(size: int) -> int:
  """Rows of a call of that many tokens each."""
  tokens = _TOKENS if jax.default_backend() == "cpu" else 8 * _TOKENS
  return max(1, tokens // size)


def _batches(asks: Sequence[_Ask]) -> list[list[_Ask]]:
  """Full calls, longest first; a remainder of a quarter goes one by one."""
  left = sorted(asks, key=lambda ask: -len(ask.ids))
  batches = []
  while left:
    rows = _rows(_bucket(len(left[0].ids)))
    count = rows if 4 * len(left) > rows else 1
    batches.append(left[:count])
    left = left[count:]
  return batches


@functools.lru_cache(maxsize=8)
def _compiled(
  model: RewardModel,
) -> tuple[Callable[..., Cache], Callable[..., jax.Array]]:
  """(reads prefixes, reads what follows them), for all judges of a shape."""

  def read(params: Any, tokens: jax.Array) -> Cache:
    rows, length = tokens.shape
    index = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    causal = jnp.broadcast_to(
      jnp.tri(length, dtype=bool), (rows, length, length)
    )
    return extend(model, params, tokens, index, causal, empty(model, rows))[1]

  def run(
    params: Any,
    store: Cache,
    place: jax.Array,
    before: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
  ) -> jax.Array:
    rows, size = tokens.shape
    held = store.keys.shape[3]
    past = Cache(*(part[:, place] for part in store))
    index = before[:, None] + jnp.arange(size)
    earlier = jnp.arange(held) < before[:, None]
    visible = jnp.concatenate(
      [
        jnp.broadcast_to(earlier[:, None], (rows, size, held)),
        jnp.broadcast_to(jnp.tri(size, dtype=bool), (rows, size, size)),
      ],
      axis=2,
    )
    x, _ = extend(model, params, tokens, index, visible, past)
    last = jnp.take_along_axis(x, length[:, None, None] - 1, axis=1)
    return model.read(params, model._final_norm(params, last))[:, 0]

  return jax.jit(read), jax.jit(run)
