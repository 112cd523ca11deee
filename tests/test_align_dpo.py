"""DPO and IPO: golden values, float64 references, properties, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.align import dpo

SEEDS = st.integers(0, 2**32 - 1)


def f32(x):
  return jnp.asarray(x, jnp.float32)


def drawn(seed: int, n: int = 5):
  """(chosen, rejected, both references, weight), float64."""
  rng = np.random.default_rng(seed)
  return (*rng.normal(-20, 4, size=(4, n)), rng.uniform(0.5, 2, size=n))


GOLDEN = tuple(f32([x]) for x in (-10, -11, -12, -11.5, 1))


def test_dpo_golden():
  u = dpo.lead(*GOLDEN, beta=0.1)
  np.testing.assert_allclose(u, [0.15], rtol=1e-6)
  loss = dpo.dpo(*GOLDEN, beta=0.1)
  np.testing.assert_allclose(loss.value(), 0.62095705, rtol=1e-6)
  smooth = dpo.dpo(*GOLDEN, beta=0.1, label_smoothing=0.1)
  # + eps u, for softplus(u) = softplus(-u) + u.
  np.testing.assert_allclose(smooth.value(), 0.62095705 + 0.015, rtol=1e-6)


def test_ipo_golden():
  """u / beta = 1.5 nats, 1 / (2 beta) = 5: 12.25."""
  loss = dpo.ipo(*GOLDEN, beta=0.1)
  np.testing.assert_allclose(loss.value(), 12.25, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_matches_reference(smoothing):
  for seed in range(3):
    chosen, rejected, chosen_ref, rejected_ref, weight = drawn(seed)
    u = 0.3 * ((chosen - chosen_ref) - (rejected - rejected_ref))
    nats = (1 - smoothing) * np.logaddexp(0, -u)
    nats += smoothing * np.logaddexp(0, u)
    args = tuple(map(f32, drawn(seed)))
    got = jax.jit(lambda *x: dpo.dpo(*x, beta=0.3, label_smoothing=smoothing))(
      *args
    )
    np.testing.assert_allclose(got.total, weight @ nats, rtol=1e-5)
    np.testing.assert_allclose(got.weight, weight.sum(), rtol=1e-6)
    got = dpo.ipo(*args, beta=0.3)
    np.testing.assert_allclose(
      got.total, weight @ (u / 0.3 - 1 / 0.6) ** 2, rtol=1e-4
    )
    got = dpo.accuracy(dpo.lead(*args, beta=0.3), args[-1])
    np.testing.assert_allclose(got.total, weight @ (u > 0), rtol=1e-6)


@settings(max_examples=25)
@given(SEEDS)
def test_gradients(seed):
  """Pull on chosen and rejected is opposite, sigmoid(-u) beta of the weight."""
  args = tuple(map(f32, drawn(seed)))

  def loss(chosen, rejected):
    return dpo.dpo(chosen, rejected, *args[2:], beta=0.3).total

  up, down = jax.grad(loss, (0, 1))(*args[:2])
  u = np.asarray(dpo.lead(*args, beta=0.3), np.float64)
  expected = -0.3 * np.asarray(args[-1]) / (1 + np.exp(u))
  np.testing.assert_allclose(up, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(down, -expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=25)
@given(SEEDS, st.floats(-10, 10))
def test_a_constant_of_the_prompt_cancels(seed, shift):
  """The policy at the reference has log 2 whatever the pair."""
  chosen, rejected, _, _, weight = drawn(seed)
  got = dpo.dpo(
    f32(chosen),
    f32(rejected),
    f32(chosen + shift),
    f32(rejected + shift),
    f32(weight),
    beta=0.1,
  )
  np.testing.assert_allclose(got.value(), np.log(2), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothed_optimum(smoothing):
  lead = np.log((1 - smoothing) / smoothing)

  def loss(chosen):
    zero = jnp.zeros(1)
    return dpo.dpo(
      chosen, zero, zero, zero, jnp.ones(1), beta=1.0, label_smoothing=smoothing
    ).value()

  np.testing.assert_allclose(jax.grad(loss)(f32([lead])), [0], atol=1e-6)


def test_ipo_stops_at_half_over_beta():
  def loss(chosen):
    zero = jnp.zeros(1)
    return dpo.ipo(chosen, zero, zero, zero, jnp.ones(1), beta=0.25).value()

  slopes = [float(jax.grad(loss)(f32([x]))[0]) for x in (1.9, 2.0, 2.1)]
  assert slopes[0] < 0 and slopes[1] == 0 and slopes[2] > 0


@pytest.mark.parametrize("loss", [dpo.dpo, dpo.ipo])
def test_padding_changes_neither_value_nor_gradient(loss):
  args = drawn(3)
  nan = [np.append(x, np.nan) for x in args[:4]]
  weight = np.append(args[4], 0.0)

  def total(x, weight):
    return loss(*x, weight, beta=0.1).total

  plain = jax.value_and_grad(total)(tuple(map(f32, args[:4])), f32(args[4]))
  padded = jax.value_and_grad(total)(tuple(map(f32, nan)), f32(weight))
  np.testing.assert_allclose(padded[0], plain[0], rtol=1e-6)
  for one, other in zip(padded[1], plain[1], strict=True):
    np.testing.assert_allclose(one[:5], other, rtol=1e-6)
    assert one[5] == 0
  none = loss(*map(f32, nan), jnp.zeros(6), beta=0.1)
  assert none.value() == 0


def test_response_logprob_sums_tokens_alone():
  logprobs = f32([[np.nan, -1, -2, np.nan], [-np.inf, -3, np.nan, np.nan]])
  mask = f32([[0, 1, 1, 0], [0, 1, 0, 0]])
  got = dpo.response_logprob(logprobs, mask)
  np.testing.assert_array_equal(got, [-3, -3])
  slope = jax.grad(lambda x: dpo.response_logprob(x, mask).sum())(logprobs)
  np.testing.assert_array_equal(slope, mask)


def test_implicit_reward_and_ties():
  got = dpo.implicit_reward(f32([-1, -2]), f32([-3, -2]), beta=0.5)
  np.testing.assert_array_equal(got, [1, 0])
  share = dpo.accuracy(f32([0, 1, -1, np.nan]), f32([1, 1, 1, 0]))
  assert share.value() == 0.5 and share.weight == 3
