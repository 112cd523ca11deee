"""Advantages: golden values, float64 references, the KL split, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.align import advantages

SEEDS = st.integers(0, 2**31 - 1)
REWARDS = [-0.1, 0.05, 1.0], [0.2, 0.4, 0.6]
COSTS = [0.1, -0.05, 0.5], [0.0, 0.1, 0.2]


COMPILED = jax.jit(advantages.gae, static_argnames=("discount", "gae_lambda"))
OF_CONSTRAINTS = jax.jit(
  jax.vmap(
    lambda r, v, m: advantages.gae(r, v, m, discount=1.0, gae_lambda=0.95),
    in_axes=(-1, -1, None),
    out_axes=-1,
  )
)


def row(values):
  return jnp.array([values], jnp.float32)


def gae(rewards, values, mask=None, *, discount=1.0, gae_lambda=0.95):
  mask = jnp.ones_like(rewards) if mask is None else mask
  return COMPILED(
    rewards, values, mask, discount=discount, gae_lambda=gae_lambda
  )


def random_rows(seed: int, n: int = 4, l: int = 6, k: int = 3):  # noqa: E741
  """A generator and the mask of contiguous responses; the last row has none."""
  rng = np.random.default_rng(seed)
  mask = np.zeros((n, l), np.float32)
  for i in range(n - 1):
    start = rng.integers(0, l)
    mask[i, start : rng.integers(start, l) + 1] = 1.0
  return rng, mask, k


def poisoned(x, mask):
  return jnp.asarray(np.where(mask > 0, x, np.nan), jnp.float32)


def gae_reference(rewards, values, mask, discount, gae_lambda):
  """By its definition: A_t = sum_i (discount gae_lambda)^i delta_{t+i}."""
  rewards, values = (np.asarray(x, np.float64) for x in (rewards, values))
  a, g = np.zeros(mask.shape), np.zeros(mask.shape)
  for i, live in enumerate(mask > 0):
    at = np.flatnonzero(live)
    v = np.append(values[i, at], 0.0)
    delta = rewards[i, at] + discount * v[1:] - v[:-1]
    for j in range(len(at)):
      powers = (discount * gae_lambda) ** np.arange(len(at) - j)
      a[i, at[j]] = powers @ delta[j:]
      g[i, at[j]] = a[i, at[j]] + v[j]
  return a, g


# ------------------------------------------------------------------ golden


@pytest.mark.parametrize(
  ("rewards", "a", "g"),
  [
    (REWARDS, [0.6985, 0.63, 0.4], [0.8985, 1.03, 1.0]),
    (COSTS, [0.51825, 0.335, 0.3], [0.51825, 0.435, 0.5]),
  ],
)
def test_gae_golden(rewards, a, g):
  got = gae(*map(row, rewards))
  np.testing.assert_allclose(got[0][0], a, rtol=1e-6)
  np.testing.assert_allclose(got[1][0], g, rtol=1e-6)


def test_mix_golden():
  reward, cost = (gae(*map(row, x))[0] for x in (REWARDS, COSTS))
  mixed = advantages.mix(reward, cost[..., None], jnp.array([0.5]))
  np.testing.assert_allclose(
    mixed[0], [0.29291667, 0.30833333, 0.16666667], rtol=1e-6
  )


@pytest.mark.parametrize(
  "lam", [[0.0], [0.5], [5.0], [0.0, 0.0, 0.0], [0.5, 5.0, 0.01], [2.0] * 100]
)
def test_kl_nets_to_minus_beta_for_every_lambda(lam):
  """The reward's -beta and each cost's +beta: -beta after mixing."""
  beta, k = 0.03, len(lam)
  rng, mask, _ = random_rows(0)
  kl = jnp.asarray(rng.normal(size=mask.shape), jnp.float32)
  nothing = jnp.zeros(len(mask))

  def penalty(coefficient):
    return advantages.per_token(
      nothing, kl, jnp.asarray(mask), kl_coefficient=coefficient, clip=50.0
    )

  # Discount and lambda of 0 leave each token its own reward.
  alone = {"discount": 0.0, "gae_lambda": 0.0}
  reward = gae(penalty(-beta), jnp.zeros_like(kl), jnp.asarray(mask), **alone)
  cost = gae(penalty(beta), jnp.zeros_like(kl), jnp.asarray(mask), **alone)
  costs = jnp.repeat(cost[0][..., None], k, axis=-1)
  mixed = advantages.mix(reward[0], costs, jnp.array(lam))
  np.testing.assert_allclose(mixed, -beta * kl * mask, rtol=2e-6, atol=1e-9)

  observed = jnp.asarray(rng.random((len(mask), k)) < 0.5, jnp.float32)
  mixed = advantages.mix(reward[0], costs, jnp.array(lam), observed=observed)
  np.testing.assert_allclose(mixed, -beta * kl * mask, rtol=2e-6, atol=1e-9)


def test_drawn_constraints_mix_to_all_of_them_on_average():
  """Over the three equally likely draws of one constraint out of three."""
  rng, mask, _ = random_rows(1)
  n, k = len(mask), 3
  reward = jnp.asarray(rng.normal(size=mask.shape), jnp.float32)
  costs = jnp.asarray(rng.normal(size=(*mask.shape, k)), jnp.float32)
  lam = jnp.array([0.1, 4.0, 1.0])
  drawn = [
    advantages.mix(
      reward, costs, lam, observed=jnp.tile(one, (n, 1)), judged=1 / k
    )
    for one in jnp.eye(k)
  ]
  expected = advantages.mix(reward, costs, lam)
  np.testing.assert_allclose(sum(drawn) / k, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------- references


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1]))
def test_gae_matches_reference(seed, discount, gae_lambda):
  rng, mask, _ = random_rows(seed)
  rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
  a, g = gae_reference(rewards, values, mask, discount, gae_lambda)
  got = gae(
    *map(jnp.asarray, (rewards, values, mask)),
    discount=float(discount),
    gae_lambda=float(gae_lambda),
  )
  np.testing.assert_allclose(got[0], a, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(got[1], g, rtol=1e-5, atol=2e-6)


@settings(max_examples=20)
@given(SEEDS)
def test_gae_of_returns_ignores_the_critic(seed):
  """At lambda 1 without discount, G is what is still to come."""
  rng, mask, _ = random_rows(seed)
  rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
  rewards = rewards * mask
  _, g = gae(*map(jnp.asarray, (rewards, values, mask)), gae_lambda=1.0)
  to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1] * mask
  np.testing.assert_allclose(g, to_come, rtol=1e-5, atol=2e-6)


@settings(max_examples=20)
@given(SEEDS)
def test_vmap_over_constraints_equals_each_alone(seed):
  rng, mask, k = random_rows(seed)
  rewards, values = rng.normal(size=(2, *mask.shape, k)).astype(np.float32)
  every = OF_CONSTRAINTS(*map(jnp.asarray, (rewards, values, mask)))
  for i in range(k):
    alone = gae(
      jnp.asarray(rewards[..., i]),
      jnp.asarray(values[..., i]),
      jnp.asarray(mask),
    )
    np.testing.assert_allclose(every[0][..., i], alone[0], atol=1e-6)
    np.testing.assert_allclose(every[1][..., i], alone[1], atol=1e-6)


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([-0.1, 0.1, 3.0]), st.sampled_from([0.5, 50.0]))
def test_per_token_matches_reference(seed, coefficient, clip):
  rng, mask, _ = random_rows(seed)
  reward = rng.normal(size=len(mask)).astype(np.float32)
  kl = rng.normal(size=mask.shape).astype(np.float32)
  expected = np.zeros(mask.shape)
  for i, live in enumerate(mask > 0):
    at = np.flatnonzero(live)
    if at.size:
      expected[i, at] = coefficient * np.float64(kl[i, at])
      expected[i, at[-1]] += reward[i]
  expected = np.clip(expected, -clip, clip)

  got = advantages.per_token(
    jnp.asarray(reward),
    poisoned(kl, mask),
    jnp.asarray(mask),
    kl_coefficient=coefficient,
    clip=clip,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_reward_of_a_row_without_response_goes_nowhere():
  mask = jnp.array([[0.0, 1.0], [0.0, 0.0]])
  got = advantages.per_token(
    jnp.array([2.0, jnp.nan]),
    jnp.zeros((2, 2)),
    mask,
    kl_coefficient=-0.1,
    clip=50.0,
  )
  np.testing.assert_array_equal(got, [[0.0, 2.0], [0.0, 0.0]])


@settings(max_examples=30)
@given(SEEDS, st.booleans())
def test_mix_matches_reference(seed, partly):
  rng, mask, k = random_rows(seed)
  reward = rng.normal(size=mask.shape).astype(np.float32)
  costs = rng.normal(size=(*mask.shape, k)).astype(np.float32)
  lam = rng.exponential(size=k).astype(np.float32)
  seen = (rng.random((len(mask), k)) < 0.5) if partly else np.ones((4, k), bool)
  expected = np.zeros(mask.shape)
  for i in range(len(mask)):
    weight = np.float64(lam) * seen[i]
    expected[i] = (reward[i] - costs[i].astype(np.float64) @ weight) / (
      1 + weight.sum()
    )

  got = advantages.mix(
    jnp.asarray(reward),
    poisoned(costs, np.broadcast_to(seen[:, None], costs.shape)),
    jnp.asarray(lam),
    observed=jnp.asarray(seen, jnp.float32) if partly else None,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(SEEDS)
def test_whiten_matches_reference_and_cancels_the_denominator(seed):
  rng, mask, _ = random_rows(seed)
  mask[0, :2] = 1.0
  a = rng.normal(1.0, 3.0, size=mask.shape).astype(np.float32)
  kept = a[mask > 0].astype(np.float64)
  expected = np.zeros(mask.shape)
  expected[mask > 0] = (kept - kept.mean()) / (kept.std() + 1e-8)

  got = advantages.whiten(poisoned(a, mask), jnp.asarray(mask))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  scaled = advantages.whiten(poisoned(a / 7.0, mask), jnp.asarray(mask))
  np.testing.assert_allclose(scaled, got, rtol=1e-4, atol=1e-5)


def test_whiten_of_nothing_is_zero():
  got = advantages.whiten(jnp.full((2, 2), jnp.nan), jnp.zeros((2, 2)))
  np.testing.assert_array_equal(got, 0.0)


# ----------------------------------------------------- padding, gradients


@settings(max_examples=20)
@given(SEEDS)
def test_padding_changes_nothing(seed):
  rng, mask, _ = random_rows(seed)
  rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
  clean = gae(*map(jnp.asarray, (rewards, values, mask)))
  dirty = gae(
    poisoned(rewards, mask), poisoned(values, mask), jnp.asarray(mask)
  )
  np.testing.assert_array_equal(clean[0], dirty[0])
  np.testing.assert_array_equal(clean[1], dirty[1])

  wide = np.pad(mask, ((0, 1), (0, 3)))
  more, after = (
    poisoned(np.pad(x, ((0, 1), (0, 3))), wide) for x in (rewards, values)
  )
  padded = gae(more, after, jnp.asarray(wide))
  np.testing.assert_array_equal(padded[0][:-1, :-3], clean[0])
  np.testing.assert_array_equal(padded[1][:-1, :-3], clean[1])
  np.testing.assert_array_equal(padded[0][-1:], 0.0)


def test_targets_carry_no_gradient():
  """Neither the critic nor lambda learns through an advantage."""
  mask = jnp.ones((2, 3))

  @jax.jit
  def everything(x):
    reward = advantages.per_token(
      x[:, 0], x, mask, kl_coefficient=-0.1, clip=50.0
    )
    a, g = gae(reward, x, mask)
    lam = jnp.abs(x[0, :1])
    mixed = advantages.mix(a + x, (a + x)[..., None], lam)
    return (mixed + g + advantages.whiten(x, mask)).sum()

  gradient = jax.grad(everything)(jnp.arange(6.0).reshape(2, 3))
  np.testing.assert_array_equal(gradient, 0.0)


def test_lambda_zero_is_the_reward_and_large_lambda_the_cost():
  rng, mask, _ = random_rows(3)
  reward, cost = rng.normal(size=(2, *mask.shape)).astype(np.float32)

  def mix(lam):
    return advantages.mix(
      jnp.asarray(reward), jnp.asarray(cost)[..., None], jnp.array([lam])
    )

  np.testing.assert_array_equal(mix(0.0), reward)
  np.testing.assert_allclose(mix(1e7), -cost, rtol=1e-4, atol=1e-5)
