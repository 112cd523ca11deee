"""Advantages without a critic: references, properties, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.align import reinforce

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *, prompts: int = 3, samples: int = 4, k: int = 2):
  """(reward, costs, lam, group, observed), float64, groups interleaved."""
  rng = np.random.default_rng(seed)
  n = prompts * samples
  group = rng.permutation(np.repeat(np.arange(prompts), samples))
  return (
    rng.normal(size=n),
    rng.uniform(size=(n, k)),
    rng.uniform(0, 3, size=k),
    group,
    (rng.uniform(size=(n, k)) < 0.7).astype(np.float64),
  )


def f32(x):
  return jnp.asarray(x, jnp.float32)


def ints(x):
  return jnp.asarray(x, jnp.int32)


def baseline(values, group, observed, *, leave_one_out):
  """Loops over episodes: value less the mean of (the others of) its group."""
  out = np.zeros_like(values)
  for i in range(len(values)):
    peers = [
      j
      for j in range(len(values))
      if group[j] == group[i] and observed[j] and not (leave_one_out and j == i)
    ]
    if observed[i] and peers:
      out[i] = values[i] - np.mean(values[peers])
  return out


def reference(reward, costs, lam, group, observed, *, leave_one_out, scale):
  one = np.ones(len(reward))
  mixed = baseline(reward, group, one, leave_one_out=leave_one_out)
  for k in range(len(lam)):
    mixed = mixed - lam[k] * baseline(
      costs[:, k], group, observed[:, k], leave_one_out=leave_one_out
    )
  mixed = mixed / (1 + lam.sum())
  if scale == "none":
    return mixed
  if scale == "batch":
    return mixed / (np.std(mixed) + 1e-4)
  deviation = np.array([np.std(mixed[group == g]) for g in group])
  return mixed / (deviation + 1e-4)


@pytest.mark.parametrize("scale", reinforce.SCALES)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_lagrangian_matches_reference(scale, leave_one_out):
  for seed in range(3):
    reward, costs, lam, group, observed = drawn(seed)
    expected = reference(
      reward,
      costs,
      lam,
      group,
      observed,
      leave_one_out=leave_one_out,
      scale=scale,
    )
    # One member of a group alone has no others: the loop says 0 as well.
    got = jax.jit(
      lambda *x: reinforce.lagrangian(
        *x[:4], observed=x[4], leave_one_out=leave_one_out, scale=scale
      )
    )(f32(reward), f32(costs), f32(lam), ints(group), f32(observed))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_grpo_golden():
  """Rewards 1, 2, 3: deviation sqrt(2/3); equal rewards have no advantage."""
  got = reinforce.grpo(
    f32([1, 0.1, 2, 0.1, 3, 0.1]), ints([0, 7, 0, 7, 0, 7]), eps=0.0001
  )
  d = np.sqrt(2 / 3) + 1e-4
  np.testing.assert_allclose(got, [-1 / d, 0, 0, 0, 1 / d, 0], atol=1e-6)


def test_rloo_golden():
  got = reinforce.rloo(f32([1, 2, 6, 5, 5]), reinforce.groups_of(1, 5))
  # 1 - (2 + 6 + 5 + 5) / 4, ...
  np.testing.assert_allclose(got, [-3.5, -2.25, 2.75, 1.5, 1.5], rtol=1e-6)
  lone = reinforce.rloo(f32([4.0]), ints([9]))
  assert lone[0] == 0  # nobody to compare with


def test_groups_of():
  np.testing.assert_array_equal(reinforce.groups_of(2, 3), [0, 0, 0, 1, 1, 1])


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([False, True]), st.floats(-50, 50))
def test_groups_are_centred_and_ignore_shifts(seed, leave_one_out, shift):
  reward, costs, lam, group, observed = drawn(seed)

  def advantages(reward, costs):
    return np.asarray(
      reinforce.lagrangian(
        f32(reward),
        f32(costs),
        f32(lam),
        ints(group),
        observed=f32(observed),
        leave_one_out=leave_one_out,
        scale="none",
      )
    )

  plain = advantages(reward, costs)
  for g in range(3):
    assert abs(plain[group == g].sum()) < 1e-5
  moved = advantages(reward + shift * group, costs - shift)
  np.testing.assert_allclose(moved, plain, atol=5e-5)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from(["group", "batch"]))
def test_mixture_is_scaled_by_its_own_deviation(seed, scale):
  """Unit deviation, and the ratio of reward to costs that lam says."""
  reward, costs, lam, group, _ = drawn(seed)
  args = f32(reward), f32(costs), f32(lam), ints(group)
  got = np.asarray(reinforce.lagrangian(*args, scale=scale, eps=0.0))
  members = [group == g for g in range(3)]
  for own in members if scale == "group" else [np.ones(12, bool)]:
    np.testing.assert_allclose(np.std(got[own]), 1.0, rtol=1e-4)
  bare = np.asarray(reinforce.lagrangian(*args, scale="none"))
  for own in members:
    ratio = got[own] @ bare[own] / (bare[own] @ bare[own])
    np.testing.assert_allclose(got[own], ratio * bare[own], atol=1e-4)


def test_large_multiplier_leaves_the_constraint_alone():
  reward, costs, _, group, _ = drawn(0, k=1)
  got = reinforce.lagrangian(
    f32(reward), f32(costs), f32([1e6]), ints(group), eps=0.0
  )
  own = reinforce.grpo(-f32(costs[:, 0]), ints(group), eps=0.0)
  np.testing.assert_allclose(got, own, atol=1e-3)


def test_padded_episodes_count_for_nothing():
  reward, costs, lam, group, observed = drawn(1)
  for leave_one_out in (False, True):
    how = {"leave_one_out": leave_one_out, "scale": "batch"}
    plain = reinforce.lagrangian(
      f32(reward),
      f32(costs),
      f32(lam),
      ints(group),
      observed=f32(observed),
      **how,
    )
    nan = np.full(2, np.nan)
    padded = reinforce.lagrangian(
      f32(np.append(reward, nan)),
      f32(np.vstack([np.where(observed > 0, costs, np.nan), [nan, nan]])),
      f32(lam),
      ints(np.append(group, [0, 1])),
      weight=f32([1.0] * 12 + [0.0] * 2),
      observed=f32(np.vstack([observed, np.ones((2, 2))])),
      **how,
    )
    np.testing.assert_allclose(padded[:12], plain, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(padded[12:], 0.0)


def test_no_gradient_runs_into_rewards():
  reward, costs, lam, group, _ = drawn(2)

  def loss(reward, costs, lam):
    got = reinforce.lagrangian(reward, costs, lam, ints(group))
    mask = jnp.ones((12, 2))
    token = reinforce.reinforce_plus_plus(
      reward, mask, mask, kl_coefficient=0.1, costs=costs, lam=lam
    )
    return jnp.sum(jnp.square(got)) + jnp.sum(token**3)

  slopes = jax.grad(loss, (0, 1, 2))(f32(reward), f32(costs), f32(lam))
  assert all((np.asarray(s) == 0).all() for s in slopes)


# ---------------------------------------------------------- REINFORCE++


def tokens(seed: int, n: int = 6, l: int = 5):  # noqa: E741
  rng = np.random.default_rng(seed)
  start = rng.integers(0, 2, n)
  stop = rng.integers(3, l + 1, n)
  at = np.arange(l)
  mask = (at >= start[:, None]) & (at < stop[:, None])
  return rng.normal(size=n), rng.normal(size=(n, l)), mask.astype(np.float64)


def reference_tokens(reward, kl, mask, beta, *, whiten):
  out = np.zeros_like(kl)
  for i in range(len(reward)):
    for t in range(kl.shape[1]):
      if mask[i, t]:
        out[i, t] = reward[i] - beta * sum(
          kl[i, j] for j in range(t, kl.shape[1]) if mask[i, j]
        )
  if whiten:
    counted = out[mask > 0]
    out = (out - counted.mean()) / (counted.std() + 1e-8) * mask
  return out


@pytest.mark.parametrize("whiten", [False, True])
def test_reinforce_plus_plus_matches_reference(whiten):
  for seed in range(3):
    reward, kl, mask = tokens(seed)
    got = reinforce.reinforce_plus_plus(
      f32(reward), f32(kl), f32(mask), kl_coefficient=0.3, whiten=whiten
    )
    expected = reference_tokens(reward, kl, mask, 0.3, whiten=whiten)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6)


def test_reinforce_plus_plus_golden():
  """R = 1, kl = .5, -.25, 1, beta = .2: .75, .85, .8; whitened by hand."""
  args = f32([1.0]), f32([[0.5, -0.25, 1.0]]), jnp.ones((1, 3))
  raw = reinforce.reinforce_plus_plus(*args, kl_coefficient=0.2, whiten=False)
  np.testing.assert_allclose(raw, [[0.75, 0.85, 0.8]], rtol=1e-6)
  got = reinforce.reinforce_plus_plus(*args, kl_coefficient=0.2)
  root = np.sqrt(1.5)
  np.testing.assert_allclose(got, [[-root, root, 0.0]], atol=2e-5)


def test_penalty_is_beta_whatever_the_multipliers():
  reward, kl, mask = tokens(4)
  costs = np.random.default_rng(4).uniform(size=(6, 2))
  slopes = []
  for lam in ([0.0, 0.0], [0.5, 0.1], [5.0, 3.0]):
    both = [
      reinforce.reinforce_plus_plus(
        f32(reward),
        f32(x),
        f32(mask),
        kl_coefficient=0.3,
        costs=f32(costs),
        lam=f32(lam),
        whiten=False,
      )
      for x in (kl, np.zeros_like(kl))
    ]
    slopes.append(both[0] - both[1])
  np.testing.assert_allclose(slopes[1], slopes[0], atol=1e-6)
  np.testing.assert_allclose(slopes[2], slopes[0], atol=1e-6)
  assert np.abs(slopes[0]).max() > 0.1


def test_costs_are_mixed_and_the_unobserved_are_average():
  reward, kl, mask = tokens(5)
  rng = np.random.default_rng(5)
  costs, lam = rng.uniform(size=(6, 2)), np.array([2.0, 0.5])
  observed = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [1, 1.0]])
  total = reward.copy()
  for k in range(2):
    seen = observed[:, k] > 0
    total -= lam[k] * np.where(seen, costs[:, k] - costs[seen, k].mean(), 0)
  expected = reference_tokens(
    total / (1 + lam.sum()), kl, mask, 0.3, whiten=True
  )
  hidden = np.where(observed > 0, costs, np.nan)
  got = reinforce.reinforce_plus_plus(
    f32(reward),
    f32(kl),
    f32(mask),
    kl_coefficient=0.3,
    costs=f32(hidden),
    lam=f32(lam),
    observed=f32(observed),
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6)


@settings(max_examples=25)
@given(SEEDS)
def test_token_advantages_are_white_and_padding_counts_for_nothing(seed):
  reward, kl, mask = tokens(seed)
  got = np.asarray(
    reinforce.reinforce_plus_plus(
      f32(reward), f32(kl), f32(mask), kl_coefficient=0.1
    )
  )
  valid = got[mask > 0]
  np.testing.assert_allclose(valid.mean(), 0.0, atol=1e-5)
  np.testing.assert_allclose(valid.std(), 1.0, rtol=1e-4)
  nan = np.full((1, 5), np.nan)
  padded = reinforce.reinforce_plus_plus(
    f32(np.append(reward, np.nan)),
    f32(np.vstack([np.where(mask > 0, kl, np.nan), nan])),
    f32(np.vstack([mask, np.zeros((1, 5))])),
    kl_coefficient=0.1,
  )
  np.testing.assert_allclose(padded[:6], got, atol=1e-5)
  np.testing.assert_array_equal(padded[6], 0.0)
  assert (np.asarray(padded)[:6][mask == 0] == 0).all()


def test_advantages_reach_tokens():
  got = reinforce.to_tokens(f32([2.0, np.nan]), f32([[0, 1, 1], [0, 0, 0]]))
  np.testing.assert_array_equal(got, [[0, 2, 2], [0, 0, 0]])


def test_bad_arguments_are_named():
  one = jnp.ones((2, 3))
  with pytest.raises(ValueError, match=r"'std'.*group, batch, none"):
    reinforce.lagrangian(one[:, 0], one, jnp.ones(3), ints([0, 0]), scale="std")
  with pytest.raises(ValueError, match="costs alone"):
    reinforce.reinforce_plus_plus(
      one[:, 0], one, one, kl_coefficient=0.1, costs=one
    )
