"""The nouns that cross floors: Example, Batch, TrainState, Mean."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

Params = dict[str, Any]  # nested dict of arrays, as `model.reward.init` makes

# Index in this tuple is the integer in `Batch.pair_kind`. A `help` pair acts
# on the helpfulness readout, every other kind on the compliance readout.
PAIR_KINDS = ("spec", "resp", "help", "severity")

Indices = Int[Array | np.ndarray, "b l"]  # of tokens in rows
Ints = Int[np.ndarray, "..."] | Int[Array, "..."]


class Segment(NamedTuple):
  """One tokenised sequence that ends where its score is read.

  Attributes:
    tokens: ids from the first token to the last token of the cue.
    label: 1.0 complies, 0.0 violates, soft values between; NaN if unlabelled.
    weight: examples that the label stands for; ignored if unlabelled.
  """

  tokens: tuple[int, ...]
  label: float = float("nan")
  weight: float = 1.0


class Pair(NamedTuple):
  """`win` and `lose` index the segments of the same `Example`."""

  win: int
  lose: int
  kind: str  # one of PAIR_KINDS
  margin: float = 0.0  # log-odds
  weight: float = 1.0


class Example(NamedTuple):
  """One family: segments that share a prefix, and the pairs among them."""

  id: str
  segments: tuple[Segment, ...]
  pairs: tuple[Pair, ...] = ()


class Batch(NamedTuple):
  """Packed rows: each holds token tries in depth-first order.

  Token `i` sees token `j` exactly when `j <= i < subtree_end[j]` (row
  indices). Padding has `subtree_end = i + 1`; an unused readout slot points at
  token 0 with weight 0; an unused pair has slots (0, 0) and weight 0.
  """

  tokens: Int[Array, "b l"]
  positions: Int[Array, "b l"]  # depth in the trie = position in the sequence
  subtree_end: Int[Array, "b l"]  # exclusive
  readout: Int[Array, "b s"]  # token whose hidden state is scored
  label: Float[Array, "b s"]  # 1 complies, 0 violates; 0 where weight is 0
  label_weight: Float[Array, "b s"]
  pair: Int[Array, "b p 2"]  # slots (win, lose) of the same row
  pair_kind: Int[Array, "b p"]  # index into PAIR_KINDS
  pair_weight: Float[Array, "b p"]
  pair_margin: Float[Array, "b p"]  # log-odds


class Mean(NamedTuple):
  """A weighted mean before its division, so that shards add up exactly."""

  total: Float[Array, ""]
  weight: Float[Array, ""]

  def __add__(self, other: "Mean") -> "Mean":  # type: ignore[override]
    return Mean(self.total + other.total, self.weight + other.weight)

  def value(self) -> Float[Array, ""]:
    """total / weight; 0 where nothing was counted."""
    import jax.numpy as jnp

    return self.total / jnp.where(self.weight > 0, self.weight, 1.0)


class TrainState(NamedTuple):
  """All that a checkpoint must hold to go on as if nothing had happened."""

  step: Int[Array, ""]  # optimizer steps taken or skipped
  params: Params
  opt_state: Any
  skipped: Int[Array, ""]  # steps with a non-finite loss or gradient
  skipped_in_a_row: Int[Array, ""]
  tokens: Float[Array, ""]  # tokens trained on, padding excluded
