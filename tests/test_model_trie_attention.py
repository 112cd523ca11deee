"""Attention by Pallas kernels equals the dense form; interpreted here."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.model import trie_attention as module
from csrm_jax.model.attention import SAVED
from csrm_jax.model.trie_attention import causal, pallas
from tests import masks, runs
from tests.masks import (
  arrays,
  assert_equal_to_dense,
  both,
  dense,
  forest,
  forests,
)

BLOCK = 8  # tokens; small blocks, so that short rows have many

few_blocks = jax.jit(functools.partial(pallas, block=BLOCK))
plain = jax.jit(causal)


@settings(deadline=None, max_examples=40)
@given(
  seed=st.integers(0, 2**31),
  chains=st.sampled_from([0.0, 0.5, 0.9, 0.98, 1.0]),
)
def test_pallas_equals_dense_on_random_tries(seed, chains):
  end = forests(seed, chains)

  assert_equal_to_dense(few_blocks, end, *arrays(end, seed=seed % 97))


@pytest.mark.parametrize(
  ("length", "h", "g", "e"),
  [
    (5, 2, 2, 16),  # less than a block
    (24, 3, 1, 64),  # whole blocks, one key head
    (29, 6, 2, 64),  # a padded block
    (29, 4, 2, 128),
  ],
)
def test_pallas_equals_dense_at_any_length_and_grouping(length, h, g, e):
  end = jnp.asarray([forest(length, seed, 0.9) for seed in range(3)])

  assert_equal_to_dense(few_blocks, end, *arrays(end, h, g, e))


def test_the_default_block_at_its_real_size():
  end = jnp.asarray([forest(300, seed=6, chains=0.97)])

  assert_equal_to_dense(jax.jit(pallas), end, *arrays(end, h=3, g=1, e=64))


def test_blocks_that_a_query_does_not_see_are_not_read():
  """Keys that are NaN reach only the branch that sees them."""
  # A root of one block; then branches of one block that see the root alone.
  end = np.repeat(np.arange(2, 8) * BLOCK, BLOCK)
  end = jnp.asarray([np.r_[np.full(BLOCK, 7 * BLOCK), end]] * 2)
  q, k, v, cotangent = arrays(end)
  ill = slice(3 * BLOCK, 4 * BLOCK)
  k, v = k.at[:, ill].set(jnp.nan), v.at[:, ill].set(jnp.nan)
  others = np.r_[BLOCK : 3 * BLOCK, 4 * BLOCK : 7 * BLOCK]

  out, dq, dk, dv = both(few_blocks, end, q, k, v, cotangent)

  for x in (out, dq, dk, dv):
    assert np.all(np.isnan(x[:, ill]))
    assert np.all(np.isfinite(x[:, others]))
  # The dense form multiplies all of them by zero, which is NaN as well.
  assert np.all(np.isnan(both(dense, end, q, k, v, cotangent)[0]))


def test_padding_sees_itself_and_touches_nobody():
  masks.assert_padding_sees_itself(few_blocks, atol=1e-5)


def test_large_logits_stay_finite():
  masks.assert_large_logits_stay_finite(few_blocks)


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
  masks.assert_bfloat16_keeps_its_dtype(few_blocks)


def _runs(jaxpr, name: str) -> int:
  """How often a primitive is called in a jaxpr, interpreted kernels apart."""
  total = 0
  for eqn in jaxpr.eqns:
    total += eqn.primitive.name == name and not eqn.params["interpret"]
    for inner in jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns") and eqn.primitive.name != name:
        total += _runs(inner, name)
  return total


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
  # Forward, two kernels backward; without the names, forward once more.
  for kept, kernels in ((policy, 3), (None, 4)):
    traced = grad.trace(q, few_blocks, kept).jaxpr
    assert _runs(traced.jaxpr, "pallas_call") == kernels


@pytest.mark.parametrize(
  ("h", "g", "tensor", "block", "expected"),
  [
    (9, 3, 1, 128, 3),
    (32, 8, 4, 128, 8),
    (32, 8, 16, 128, 16),  # each key head twice
    (32, 8, 32, 128, 32),
    (6, 2, 4, 128, 2),  # query heads do not divide: whole on each device
    (12, 3, 4, 128, 12),
    (64, 1, 1, 128, 8),  # 64 heads x 128 queries would be one block
    (8, 8, 1, 2048, 8),  # nothing left to repeat
  ],
)
def test_key_heads_are_repeated_no_more_than_needed(
  h, g, tensor, block, expected
):
  assert module._key_heads(h, g, tensor=tensor, block=block) == expected


def test_long_rows_take_larger_blocks():
  assert [module._block(n) for n in (1, 8192, 8193, 40_000)] == [
    128, 128, 256, 1024,
  ]  # fmt: skip


def chains(*lengths: int, row: int) -> jax.Array:
  """`subtree_end` of rows of one sequence each, with padding behind it."""
  after = np.arange(1, row + 1)
  return jnp.asarray([np.maximum(after, n) for n in lengths])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_causal_equals_dense_where_rows_hold_one_sequence(dtype):
  end = chains(130, 77, row=150)
  real = (jnp.arange(150) < end[:, :1])[..., None, None]
  q, k, v, cotangent = arrays(end, h=4, g=2, e=64)
  args = [x.astype(dtype) for x in (q, k, v, jnp.where(real, cotangent, 0.0))]
  exact = [x.astype(jnp.float32) for x in args]

  got, expected = both(plain, end, *args), both(dense, end, *exact)

  out, wanted = jnp.where(real, got[0], 0), jnp.where(real, expected[0], 0)
  loose = dtype == jnp.bfloat16  # 8 bits of mantissa, values up to 4
  for a, b in zip((out, *got[1:]), (wanted, *expected[1:]), strict=True):
    assert a.dtype == dtype
    atol = 0.05 if loose else 1e-4
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=atol)


def test_causal_never_passes_for_a_trie():
  end = chains(30, 20, row=40).at[1, 5].set(9)  # a branch in the second row
  q, k, v, _ = arrays(end)

  out = plain(q, k, v, end)

  assert np.all(np.isfinite(out[0])) and np.all(np.isnan(out[1]))


_ON_A_MESH = """
import functools
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from csrm_jax import sharding
from csrm_jax.model.trie_attention import pallas
from tests.masks import arrays, both, dense, forest

mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
end = jax.numpy.asarray([forest(30, seed, 0.9) for seed in range(4)])
placed = NamedSharding(mesh, P(("replica", "fsdp")))

def spread(*args):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return pallas(*args, block=8)

for h, g in ((6, 3), (3, 3)):  # key heads repeated; all heads whole
  args = (end, *arrays(end, h, g))
  expected = both(dense, *args)
  got = both(spread, *jax.device_put(args, placed))
  assert got[0].sharding.num_devices == 8
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  for a, b in zip(got[1:], expected[1:], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
"""


def test_eight_devices_equal_one():
  runs.on_devices(_ON_A_MESH)


_FOR_A_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from csrm_jax import sharding
from csrm_jax.model.trie_attention import causal, pallas

topology = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:2x2"
)
devices = np.array(topology.devices).reshape(1, 2, 2)
mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
rows = NamedSharding(mesh, P(("replica", "fsdp")))

def loss(inputs, end):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    outs = [f(*x, end) for x, f in zip(inputs, (pallas, pallas, causal))]
  return sum(jnp.sum(out.astype(jnp.float32) ** 2) for out in outs)

def shapes(h, g, e, dtype):
  return [
    jax.ShapeDtypeStruct((4, 900, n, e), dtype, sharding=rows)
    for n in (h, g, g)
  ]

inputs = (
  shapes(6, 3, 64, jnp.bfloat16),
  shapes(8, 4, 128, jnp.float32),
  shapes(6, 2, 64, jnp.bfloat16),
)
end = jax.ShapeDtypeStruct((4, 900), jnp.int32, sharding=rows)
compiled = jax.jit(jax.grad(loss)).lower(inputs, end).compile()
print(compiled.as_text().count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
def test_forward_and_backward_compile_for_a_tpu():
  """For four chips of a v5e: both head widths, both dtypes, and splash."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install 'csrm_jax[tpu]'")
  done = subprocess.run(
    [sys.executable, "-c", _FOR_A_TPU],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_WORKER_ID": "0",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.split()[-1] == "9"  # three kernels for each of three
