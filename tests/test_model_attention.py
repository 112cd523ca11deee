"""Trie attention: the block form equals the dense form, and a reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.model import attention as module
from csrm_jax.model.attention import SAVED, blocks, reached_blocks, visible
from tests import masks
from tests.masks import (
  arrays,
  assert_equal_to_dense,
  both,
  dense,
  forest,
  forests,
)

BLOCK = 8  # tokens; small blocks, so that short rows have many


few_blocks = jax.jit(functools.partial(blocks, block=BLOCK))
attention = jax.jit(module.attention, static_argnames="kind")


@settings(deadline=None, max_examples=40)
@given(
  seed=st.integers(0, 2**31),
  chains=st.sampled_from([0.0, 0.5, 0.9, 0.98, 1.0]),
)
def test_blocks_equal_dense_on_random_tries(seed, chains):
  end = forests(seed, chains)

  assert_equal_to_dense(few_blocks, end, *arrays(end, seed=seed % 97))


@pytest.mark.parametrize(
  ("length", "h", "g"), [(8, 2, 1), (24, 2, 2), (65, 6, 3)]
)
def test_blocks_equal_dense_at_any_length_and_grouping(length, h, g):
  end = jnp.asarray([forest(length, seed, 0.9) for seed in range(3)])

  assert_equal_to_dense(few_blocks, end, *arrays(end, h, g))


def test_dense_matches_a_float64_reference():
  end = forest(23, seed=5, chains=0.8)
  tensors = arrays([end])[:3]
  got = dense(*tensors, jnp.asarray([end]))
  q, k, v = (np.asarray(x, np.float64) for x in tensors)

  for i in range(23):
    seen = [j for j in range(i + 1) if i < end[j]]
    for head in range(4):
      logits = k[0, seen, head // 2] @ q[0, i, head]
      weights = np.exp(logits / 4**0.5)
      np.testing.assert_allclose(
        got[0, i, head],
        weights @ v[0, seen, head // 2] / weights.sum(),
        atol=1e-6,
      )


def test_a_single_sequence_is_causal():
  end = jnp.full((2, 50), 50)
  q, k, v, cotangent = arrays(end)
  expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)

  got = both(few_blocks, end, q, k, v, cotangent)[0]

  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_array_equal(visible(end)[0], np.tri(50, dtype=bool))


def test_padding_sees_itself_and_touches_nobody():
  masks.assert_padding_sees_itself(few_blocks, atol=1e-6)


def test_large_logits_stay_finite():
  masks.assert_large_logits_stay_finite(few_blocks)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
  masks.assert_bfloat16_keeps_its_dtype(few_blocks)


def test_blocks_between_branches_are_skipped():
  # Root of one block; then branches of one block that see the root alone.
  end = np.repeat(np.arange(2, 8) * BLOCK, BLOCK)
  end = np.r_[np.full(BLOCK, 7 * BLOCK), end]
  expected = np.eye(7, dtype=bool)
  expected[:, 0] = True

  got = reached_blocks(jnp.asarray([end]), BLOCK)

  np.testing.assert_array_equal(got[0], expected)


def test_works_under_scan_and_remat_and_saves_by_name():
  end = jnp.asarray([forest(24, seed=4, chains=0.9)])
  q, k, v, _ = arrays(end, h=4, g=4)
  policy = jax.checkpoint_policies.save_only_these_names(*SAVED)

  def loss(q, f, policy):
    layer = jax.checkpoint(lambda x, _: (f(x, k, v, end), None), policy=policy)
    return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0] ** 2)

  grad = jax.jit(jax.grad(loss), static_argnums=(1, 2))
  expected = grad(q, dense, None)
  np.testing.assert_allclose(grad(q, few_blocks, None), expected, atol=1e-4)
  np.testing.assert_allclose(grad(q, few_blocks, policy), expected, atol=1e-4)


def test_shapes_alone_decide_what_is_compiled():
  traces = []

  @jax.jit
  def run(end, q, k, v):
    traces.append(1)
    return few_blocks(q, k, v, end)

  for seed in range(3):
    end = jnp.asarray([forest(64, seed, 0.9)])
    run(end, *arrays(end, h=2, g=1)[:3])

  assert len(traces) == 1


def test_the_default_block_at_its_real_size():
  end = jnp.asarray([forest(150, seed=6, chains=0.97)])
  q, k, v, _ = arrays(end, h=3, g=1, e=16)

  np.testing.assert_allclose(
    attention(q, k, v, end, kind="blocks"),
    attention(q, k, v, end, kind="dense"),
    atol=1e-5,
  )


@pytest.mark.parametrize(("h", "g", "e"), [(9, 3, 64), (4, 1, 16), (2, 2, 8)])
def test_bfloat16_operands_change_little(h, g, e):
  end = jnp.asarray([forest(200, seed=6, chains=0.97)])
  tensors = arrays(end, h, g, e)
  mixed = both(functools.partial(blocks, mixed=True), end, *tensors)
  full = both(blocks, end, *tensors)

  for got, expected in zip(mixed, full, strict=True):
    assert jnp.linalg.norm(got - expected) > 0
    assert jnp.linalg.norm(got - expected) < 8e-3 * jnp.linalg.norm(expected)


def test_an_unknown_kind_is_refused():
  end = jnp.ones((1, 1), jnp.int32)
  with pytest.raises(ValueError, match="'flash': use one of"):
    attention(*arrays(end, h=1, g=1)[:3], end, kind="flash")
