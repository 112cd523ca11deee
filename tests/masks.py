"""Random masks of packed rows, and what any attention under them must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax.model import attention as module


def forest(length: int, seed: int, chains: float) -> np.ndarray:
  """`subtree_end` of a random depth-first forest with padding at its end.

  `chains` is the share of tokens that continue the path of the one before;
  the others start from an ancestor of it, or a new tree.
  """
  rng = np.random.default_rng(seed)
  end = np.arange(1, length + 1)
  path: list[int] = []
  for i in range(int(rng.integers(1, length + 1))):
    if rng.random() > chains:
      path = path[: int(rng.integers(0, len(path) + 1))]
    path.append(i)
    for j in path:
      end[j] = i + 1
  return end


def forests(seed: int, chains: float) -> jax.Array:
  """Two rows. One shape for most tests, as compiling is what takes time."""
  return jnp.asarray([forest(50, seed + i, chains) for i in range(2)])


def arrays(end, h: int = 4, g: int = 2, e: int = 4, seed: int = 0):
  rng = np.random.default_rng(seed)
  shapes = [(*np.shape(end), n, e) for n in (h, g, g, h)]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


@functools.partial(jax.jit, static_argnums=0)
def both(f, end, q, k, v, cotangent):
  """Output and gradients, as one list."""
  out, pull = jax.vjp(lambda *x: f(*x, end), q, k, v)
  return [out, *pull(cotangent)]


dense = jax.jit(module.dense)


def assert_equal_to_dense(f, end, q, k, v, cotangent):
  expected = both(dense, end, q, k, v, cotangent)
  got = both(f, end, q, k, v, cotangent)
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  for a, b in zip(got[1:], expected[1:], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def assert_padding_sees_itself(f, *, atol: float):
  """And touches nobody; `atol` is of the gradient of queries."""
  end = jnp.asarray([np.r_[np.full(30, 30), np.arange(31, 51)]] * 2)
  q, k, v, cotangent = arrays(end)
  of_padding = cotangent.at[:, :30].set(0.0)

  out, dq, dk, dv = both(f, end, q, k, v, of_padding)

  np.testing.assert_allclose(
    out[:, 30:], jnp.repeat(v[:, 30:], 2, axis=2), atol=1e-6
  )
  assert not np.any(dk[:, :30]) and not np.any(dv[:, :30])
  np.testing.assert_allclose(dq, 0.0, atol=atol)  # one key: nothing to choose


def assert_large_logits_stay_finite(f):
  end = forests(seed=2, chains=0.9)
  q, k, v, cotangent = arrays(end)

  for x in both(f, end, 300 * q, 300 * k, v, cotangent):
    assert np.all(np.isfinite(x))


def assert_bfloat16_keeps_its_dtype(f):
  """With a float32 softmax."""
  end = forests(seed=3, chains=0.95)
  exact = arrays(end)
  half = [x.astype(jnp.bfloat16) for x in exact]

  for a, b in zip(both(f, end, *half), both(dense, end, *exact), strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.1)
