"""Losses of PPO: float64 references, properties, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.align import losses

SEEDS = st.integers(0, 2**31 - 1)
COMPILED = jax.jit(losses.policy_loss, static_argnames="clip")


def batch(seed: int, n: int = 3, l: int = 5, k: tuple[int, ...] = ()):  # noqa: E741
  """Random (new, old, third array, mask) in float32, mask with ones."""
  rng = np.random.default_rng(seed)
  arrays = [rng.normal(size=(n, l, *k)).astype(np.float32) for _ in range(3)]
  mask = (rng.random((n, l)) < 0.7).astype(np.float32)
  mask[0, 0] = 1.0
  return (*arrays, mask)


def f64(*arrays):
  return [np.asarray(a, np.float64) for a in arrays]


def device(*arrays):
  return [jnp.asarray(a, jnp.float32) for a in arrays]


def poisoned(x, mask):
  """NaN wherever the mask is 0, infinity at the first such place."""
  gone = np.broadcast_to(
    mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)) == 0, x.shape
  )
  x = np.where(gone, np.nan, x)
  if gone.any():
    x[tuple(np.argwhere(gone)[0])] = np.inf
  return jnp.asarray(x, jnp.float32)


def policy_reference(new, old, a, mask, clip):
  """(total, fraction held) token by token."""
  new, old, a, mask = f64(new, old, a, mask)
  total, held = 0.0, 0
  for i, j in np.argwhere(mask > 0):
    rho = np.exp(np.clip(new[i, j] - old[i, j], -20, 20))
    near = min(max(rho, 1 - clip), 1 + clip)
    total -= min(rho * a[i, j], near * a[i, j])
    held += near * a[i, j] < rho * a[i, j]
  return total, held


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([0.05, 0.2, 0.5]))
def test_policy_loss_matches_reference(seed, clip):
  new, old, a, mask = batch(seed)
  total, held = policy_reference(new, old, a, mask, clip)

  loss = losses.policy_loss(*device(new, old, a, mask), clip=clip)
  fraction = losses.clip_fraction(*device(new, old, a, mask), clip=clip)

  np.testing.assert_allclose(loss.total, total, rtol=2e-5, atol=1e-5)
  assert loss.weight == mask.sum() == fraction.weight
  assert fraction.total == held
  np.testing.assert_allclose(
    COMPILED(*device(new, old, a, mask), clip=clip).total,
    loss.total,
    rtol=1e-5,
    atol=1e-6,
  )


@settings(max_examples=30)
@given(SEEDS)
def test_policy_gradient_is_that_of_the_surrogate(seed):
  """d loss / d logprob = -rho A, and 0 exactly where the clip holds."""
  new, old, a, mask = batch(seed)
  gradient = jax.grad(lambda *x: losses.policy_loss(*x, clip=0.2).total)(
    *device(new, old, a, mask)
  )
  rho = np.exp(np.asarray(new, np.float64) - old)
  held = ((rho > 1.2) & (a > 0)) | ((rho < 0.8) & (a < 0))
  expected = np.where(held | (mask == 0), 0.0, -rho * a)
  np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)


def test_on_policy_gradient_is_reinforce():
  """Old log-probabilities carry no gradient, not even when they are the new."""
  new, _, a, mask = batch(0)
  gradient = jax.grad(
    lambda x, a, m: losses.policy_loss(x, x, a, m, clip=0.2).total
  )(*device(new, a, mask))
  np.testing.assert_allclose(gradient, -a * mask, rtol=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_extreme_ratios_stay_finite(sign):
  new = jnp.full((1, 2), 500.0 * sign)
  a = jnp.array([[1.0, -1.0]])

  def loss(x):
    return losses.policy_loss(
      x, jnp.zeros((1, 2)), a, jnp.ones((1, 2)), clip=0.2
    ).total

  value, gradient = jax.value_and_grad(loss)(new)
  expected = np.exp(20.0) - 1.2 if sign > 0 else 0.8 - np.exp(-20.0)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert np.isfinite(gradient).all()


@settings(max_examples=30)
@given(
  SEEDS,
  st.sampled_from([(), (1,), (4,)]),
  st.sampled_from([0.1, 0.5, float("inf")]),
)
def test_value_loss_matches_reference(seed, k, clip):
  values, old, returns, mask = batch(seed, k=k)
  v, o, g, m = f64(values, old, returns, mask)
  near = np.minimum(np.maximum(v, o - clip), o + clip)
  entries = 0.5 * np.maximum((v - g) ** 2, (near - g) ** 2)
  weight = np.broadcast_to(m.reshape(m.shape + (1,) * len(k)), v.shape)

  got = losses.value_loss(*device(values, old, returns, mask), clip=clip)
  np.testing.assert_allclose(got.total, (entries * weight).sum(), rtol=2e-5)
  assert got.weight == weight.sum()


@settings(max_examples=20)
@given(SEEDS)
def test_value_loss_of_k_constraints_is_the_mean_of_each_alone(seed):
  values, old, returns, mask = batch(seed, k=(3,))
  every = losses.value_loss(*device(values, old, returns, mask), clip=0.3)
  alone = [
    losses.value_loss(
      *device(values[..., i], old[..., i], returns[..., i], mask), clip=0.3
    ).value()
    for i in range(3)
  ]
  np.testing.assert_allclose(every.value(), np.mean(alone), rtol=1e-5)


@settings(max_examples=20)
@given(SEEDS)
def test_value_gradient_pulls_towards_the_return(seed):
  values, old, returns, mask = batch(seed)
  entries = device(values, old, returns, mask)
  gradient = jax.grad(lambda *x: losses.value_loss(*x, clip=0.2).total)(
    *entries
  )
  assert (np.asarray(gradient) * (values - returns) >= 0).all()
  free = jax.grad(lambda *x: losses.value_loss(*x, clip=np.inf).total)(*entries)
  np.testing.assert_allclose(
    free, (values - returns) * mask, rtol=1e-5, atol=1e-6
  )


def test_a_constraint_may_be_judged_on_some_episodes_only():
  values, old, returns, mask = batch(1, k=(2,))
  observed = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
  both = mask[..., None] * observed[:, None]
  unseen = poisoned(returns, both)
  v, o, g = f64(values, old, returns)
  near = np.minimum(np.maximum(v, o - 0.4), o + 0.4)
  expected = 0.5 * np.maximum((v - g) ** 2, (near - g) ** 2) * both

  got = losses.value_loss(*device(values, old, unseen, both), clip=0.4)
  np.testing.assert_allclose(got.total, expected.sum(), rtol=1e-5)
  assert got.weight == both.sum()


@settings(max_examples=20)
@given(SEEDS)
def test_nll_matches_reference(seed):
  logprobs, _, _, mask = batch(seed)
  got = losses.nll(*device(logprobs, mask))
  lp, m = f64(logprobs, mask)
  np.testing.assert_allclose(got.total, -(lp * m).sum(), rtol=1e-5, atol=1e-5)
  assert got.weight == mask.sum()


CASES = {
  "policy": lambda x, y, z, m: losses.policy_loss(x, y, z, m, clip=0.2),
  "value": lambda x, y, z, m: losses.value_loss(x, y, z, m, clip=0.2),
  "nll": lambda x, y, z, m: losses.nll(x, m),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_padding_changes_neither_value_nor_gradient(name, seed):
  loss = CASES[name]
  x, y, z, mask = batch(seed)

  def total(x, y, z):
    return loss(x, y, z, jnp.asarray(mask)).total

  clean = jax.value_and_grad(total)(*map(jnp.asarray, (x, y, z)))
  dirty = jax.value_and_grad(total)(*(poisoned(a, mask) for a in (x, y, z)))
  np.testing.assert_array_equal(clean[0], dirty[0])
  np.testing.assert_array_equal(clean[1], dirty[1])
  assert (np.asarray(dirty[1])[mask == 0] == 0).all()


def test_clip_fraction_ignores_padding():
  x, y, z, mask = batch(5)
  clean = losses.clip_fraction(*device(x, y, z, mask), clip=0.2)
  assert 0 < clean.total < clean.weight
  dirty = losses.clip_fraction(
    poisoned(x, mask),
    poisoned(y, mask),
    poisoned(z, mask),
    jnp.asarray(mask),
    clip=0.2,
  )
  assert clean.total == dirty.total
  assert clean.weight == dirty.weight


@settings(max_examples=20)
@given(SEEDS, st.sampled_from(sorted(CASES)))
def test_micro_batches_add_up(seed, name):
  loss = CASES[name]
  arrays = device(*batch(seed, n=4))
  whole = loss(*arrays)
  parts = loss(*(a[:2] for a in arrays)) + loss(*(a[2:] for a in arrays))
  np.testing.assert_allclose(parts.total, whole.total, rtol=1e-5, atol=1e-5)
  assert parts.weight == whole.weight
