"""The visits of the kernels are the pairs of blocks that meet, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csrm_jax.model.trie_passes import visits
from tests.masks import forest

BLOCK, BLOCKS = 8, 7

listed = jax.jit(visits, static_argnames=("block", "by_key"))


def meeting(end: np.ndarray) -> set[tuple[int, int]]:
  """(query block, key block) of every pair of tokens that the mask joins."""
  return {
    (i // BLOCK, j // BLOCK)
    for i in range(len(end))
    for j in range(i + 1)
    if i < end[j]
  }


@pytest.mark.parametrize("by_key", [False, True])
@given(
  seed=st.integers(0, 2**31),
  chains=st.sampled_from([0.0, 0.5, 0.9, 0.98, 1.0]),
)
def test_visits_are_what_the_mask_joins(by_key, seed, chains):
  ends = [forest(BLOCK * BLOCKS, seed + i, chains) for i in range(2)]

  codes, counts = listed(jnp.asarray(ends), block=BLOCK, by_key=by_key)

  assert codes.shape == (2, BLOCKS * (BLOCKS + 1) // 2)
  for end, code, count in zip(ends, codes, counts, strict=True):
    pairs = [(int(c) >> 16, int(c) & 0xFFFF) for c in code]
    expected = meeting(end)
    if by_key:
      expected = {(j, i) for i, j in expected}
    assert pairs[: int(count)] == sorted(expected)
    assert set(pairs[int(count) :]) <= {pairs[int(count) - 1]}


def test_branches_cost_what_they_see():
  """A root of a block, six branches of a block: 13 visits of causal 28."""
  end = np.repeat(np.arange(2, 8) * BLOCK, BLOCK)
  end = np.r_[np.full(BLOCK, 7 * BLOCK), end]

  for by_key in (False, True):
    codes, counts = listed(jnp.asarray([end]), block=BLOCK, by_key=by_key)
    assert codes.shape == (1, 28) and counts.tolist() == [13]
