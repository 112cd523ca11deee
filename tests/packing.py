"""Families and models that tests of packing and training share."""

import numpy as np

from csrm_jax.config import default
from csrm_jax.data.trie import Packed, pack, real_tokens
from csrm_jax.model import reward
from csrm_jax.types import Example, Pair, Segment

VOCAB = 60


def families(seed: int = 0, number: int = 6) -> list[Example]:
  """Families of two responses to one prompt, under one of three specs."""
  rng = np.random.default_rng(seed)

  def words(n: int) -> tuple[int, ...]:
    return tuple(int(t) for t in rng.integers(1, VOCAB, n))

  specs = [words(8) for _ in range(3)]
  made = []
  for i in range(number):
    prefix = specs[int(rng.integers(3))] + words(int(rng.integers(2, 6)))
    good = Segment(prefix + words(int(rng.integers(2, 9))), 1.0)
    bad = Segment(prefix + words(int(rng.integers(2, 9))), 0.0, 2.0)
    kind = ("resp", "spec", "help")[(i + seed) % 3]
    pair = Pair(0, 1, kind, 0.25 * (i % 2), 1.0 + i % 2)
    made.append(Example(f"family {i}", (good, bad), (pair,)))
  return made


def packed(number: int = 6, *, row_length: int = 64, seed: int = 0) -> Packed:
  return pack(families(seed, number), row_length=row_length, slots=8, pairs=6)


def tiny_model(**changes):
  """(model, load_params) of the random model of the default config."""
  config = default().model
  config.path = "random"
  config.attention = "dense"
  config.update(changes)
  return reward.make(config, vocab_size=VOCAB, safe_ids=[3], unsafe_ids=[4])


def trie_tokens(batch) -> int:
  """Tokens of a batch that are not padding."""
  return int(np.asarray(real_tokens(batch)).sum())
