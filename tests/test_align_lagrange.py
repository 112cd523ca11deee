"""Multipliers: golden values, windows, projection, PID, bounds, no windup."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.align import lagrange, limits

SEEDS = st.integers(0, 2**31 - 1)
SGD = optax.sgd(0.1)
STATIC = (
  "optimizer",
  "lam_max",
  "lam_min",
  "delay",
  "gap_clip",
  "pid",
  "pessimism",
)
UPDATE = jax.jit(lagrange.update, static_argnames=STATIC)
OBSERVE = jax.jit(lagrange.observe)


def start(k=1, *, window=4, optimizer=SGD, lam0=1.0):
  return lagrange.init(k, window=window, optimizer=optimizer, lam0=lam0)


def step(state, costs, limit, observed=None, **options):
  """One observation and update; `costs` [n, k], `limit` a number or [k]."""
  options = {"optimizer": SGD, "lam_max": 5.0} | options
  k = state.log_lam.shape[0]
  state = OBSERVE(state, jnp.asarray(costs, jnp.float32), observed)
  d = jnp.broadcast_to(jnp.asarray(limit, jnp.float32), (k,))
  return UPDATE(state, limits=d, **options)


@functools.partial(
  jax.jit, static_argnames=("episodes", "optimizer", "lam_max", "pid")
)
def steady(state, gaps, *, episodes, optimizer=SGD, lam_max=5.0, pid=None):
  """Updates under costs of 0.5 and limits of 0.5 - gaps [t, k]."""

  def body(state, gap):
    costs = jnp.full((episodes, gap.shape[0]), 0.5)
    return lagrange.update(
      lagrange.observe(state, costs),
      limits=0.5 - gap,
      optimizer=optimizer,
      lam_max=lam_max,
      pid=pid,
    )

  return jax.lax.scan(body, state, gaps)


# ------------------------------------------------------------------ golden


def test_golden():
  """SGD on -(J - d) exp(log lam) with eta 0.1 and J - d of 2, 2, -1."""
  state = start(window=1)
  for gap, expected in ((2.0, 0.2), (2.0, 0.44428055), (-1.0, 0.28834376)):
    state, metrics = step(state, [[gap]], 0.0)
    np.testing.assert_allclose(state.log_lam, [expected], rtol=2e-6)
    np.testing.assert_allclose(metrics["lam"], np.exp([expected]), rtol=2e-6)
    assert metrics["saturated"] == 0.0


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([1, 3, 300]))
def test_matches_reference(seed, k):
  """A loop over steps and constraints in float64, hundreds at once too."""
  rng = np.random.default_rng(seed)
  lam_max, lam_min, w = 0.8 * k, 1e-3, 5
  log_lam, queues = np.zeros(k), [[] for _ in range(k)]
  state, d = start(k, window=w), rng.uniform(0.2, 0.8, size=k)
  for _ in range(6):
    costs = rng.normal(0.5, 1.0, size=(3, k)).astype(np.float32)
    observed = (rng.random((3, k)) < 0.6).astype(np.float32)
    lam = np.exp(log_lam)
    for i in range(k):
      fresh = [c for c, o in zip(costs[:, i], observed[:, i], strict=True) if o]
      queues[i] = (queues[i] + fresh)[-w:]
      if fresh:
        gap = np.mean(queues[i], dtype=np.float64) - d[i]
        lam[i] *= np.exp(0.1 * lam[i] * gap)
    lam = np.maximum(lam, lam_min) - lam_min
    room = lam_max - k * lam_min
    log_lam = np.log(lam * min(1.0, room / lam.sum()) + lam_min)

    hidden = np.where(observed > 0, costs, np.nan)
    state, metrics = step(
      state, hidden, d, jnp.asarray(observed), lam_max=lam_max, lam_min=lam_min
    )
    np.testing.assert_allclose(state.log_lam, log_lam, rtol=2e-4, atol=2e-5)
    if abs(lam.sum() / room - 1) > 1e-4:  # else rounding decides
      assert metrics["saturated"] == (lam.sum() > room)


def test_any_optimiser_ascends_the_dual():
  for optimizer in (optax.adam(0.05), optax.sgd(0.1, momentum=0.9)):
    state = start(2, optimizer=optimizer)
    state, _ = step(state, [[0.9, 0.1]], 0.5, optimizer=optimizer, lam_max=50.0)
    assert state.log_lam[0] > 0 > state.log_lam[1]
  optimizer = optax.sgd(optax.linear_schedule(0.1, 0.0, 2))
  state = start(1, window=1, optimizer=optimizer)
  moves = []
  for _ in range(3):
    before = state.log_lam
    state, _ = step(state, [[1.5]], 0.5, optimizer=optimizer)
    moves.append(float((state.log_lam - before)[0]))
  np.testing.assert_allclose(
    moves, [0.1, 0.05 * np.exp(0.1), 0.0], rtol=1e-5, atol=1e-7
  )


# ----------------------------------------------------------------- windows


@settings(max_examples=25)
@given(SEEDS, st.sampled_from([2, 6]), st.sampled_from([1, 3]))
def test_windows_are_queues_of_their_own(seed, w, k):
  """A ring per constraint holds the last w costs that it judged."""
  rng = np.random.default_rng(seed)
  queues, state = [[] for _ in range(k)], start(k, window=w)
  for n in (4, 9, 4):
    costs = rng.normal(size=(n, k)).astype(np.float32)
    seen = rng.random((n, k)) < 0.4
    for i in range(k):
      queues[i] = (queues[i] + list(costs[seen[:, i], i]))[-w:]
    hidden = jnp.asarray(np.where(seen, costs, np.nan))
    state = OBSERVE(state, hidden, jnp.asarray(seen, jnp.float32))
    for i, queue in enumerate(queues):
      held = np.asarray(state.window)[np.asarray(state.seen)[:, i] > 0, i]
      np.testing.assert_array_equal(np.sort(held), np.sort(queue))
  mean, bound, count = lagrange.judge(state)
  np.testing.assert_array_equal(count, [len(q) for q in queues])
  expected = np.array([np.mean(q) if q else 0.0 for q in queues])
  np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(bound, mean)
  assert (np.asarray(state.rejected) == 0).all()


def test_an_unjudged_constraint_stays():
  """Neither lambda nor the moments of its optimiser drift on old news."""
  optimizer = optax.adam(0.1)
  state = start(2, optimizer=optimizer)
  state, _ = step(state, [[0.9, 0.9]], 0.5, optimizer=optimizer)
  before = state
  for _ in range(3):
    state, metrics = step(
      state,
      [[0.9, np.nan]],
      0.5,
      jnp.array([[1.0, 0.0]]),
      optimizer=optimizer,
      lam_max=50.0,
    )
    np.testing.assert_array_equal(metrics["moved"], [1.0, 0.0])
  assert state.log_lam[0] > before.log_lam[0]
  assert state.log_lam[1] == before.log_lam[1]
  for now, then in zip(
    jax.tree.leaves(state.opt_state),
    jax.tree.leaves(before.opt_state),
    strict=True,
  ):
    assert now[1] == then[1]
    assert now[0] != then[0]
  np.testing.assert_array_equal(metrics["count"], [4.0, 1.0])


def test_costs_that_are_not_finite_are_counted_and_kept_out():
  state, metrics = step(
    start(3), [[np.nan, 0.2, 0.7], [0.4, 0.4, np.inf], [-np.inf, 0.6, 0.9]], 0.5
  )
  np.testing.assert_array_equal(metrics["rejected"], [2, 0, 1])
  np.testing.assert_allclose(metrics["cost"], [0.4, 0.4, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(metrics["count"], [1, 3, 2])
  assert np.isfinite(state.log_lam).all()
  state, _ = step(state, [[np.nan] * 3], 0.5)
  np.testing.assert_array_equal(state.rejected, [3, 1, 2])


def test_delay():
  state = start()
  for i in range(4):
    state, metrics = step(state, [[1.0]], 0.5, delay=2)
    assert metrics["moved"] == (i >= 2)
    assert (state.log_lam[0] > 0) == (i >= 2)
  assert state.moves[0] == 2 and state.step == 4


def test_gap_is_clipped():
  state, metrics = step(start(2), [[1e6, -1e6]], 0.0, lam_max=1e3, gap_clip=3.0)
  np.testing.assert_array_equal(metrics["gap"], [3.0, -3.0])
  np.testing.assert_allclose(state.log_lam, [0.3, -0.3], rtol=1e-6)


# -------------------------------------------------------------- projection


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([1, 2, 200]), st.sampled_from([0.1, 5.0, 100.0]))
def test_projection(seed, k, lam_max):
  raw = np.random.default_rng(seed).exponential(2.0, size=k).astype(np.float32)
  lam_min = 1e-4 * lam_max / k
  new, factor = lagrange.project(
    jnp.asarray(raw), lam_max=lam_max, lam_min=lam_min
  )
  assert (np.asarray(new) >= lam_min * (1 - 1e-6)).all()
  assert new.sum() <= lam_max * (1 + 1e-5)
  lifted = np.maximum(raw, lam_min)
  if lifted.sum() < lam_max * (1 - 1e-5):
    assert factor == 1.0
    np.testing.assert_allclose(new, lifted, rtol=1e-6)
  if lifted.sum() > lam_max * (1 + 1e-5):
    np.testing.assert_allclose(new.sum(), lam_max, rtol=1e-5)
    np.testing.assert_allclose(
      (new - lam_min), factor * (lifted - lam_min), rtol=1e-3, atol=1e-6
    )


def test_lam_max_acts_on_the_sum_and_lam_min_on_each():
  state = start(3)
  for _ in range(100):
    state, metrics = step(
      state, [[0.9, 0.9, 0.0]], [0.1, 0.5, 0.9], lam_max=2.0, lam_min=0.01
    )
  np.testing.assert_allclose(metrics["lam_sum"], 2.0, rtol=1e-5)
  assert metrics["saturated"] == 1.0
  assert metrics["lam"][0] > metrics["lam"][1] > metrics["lam"][2]
  np.testing.assert_allclose(metrics["lam"][2], 0.01, rtol=1e-5)


def test_a_step_too_large_for_exp_ends_at_the_bound():
  wild = optax.sgd(1e4)
  state = start(3, optimizer=wild)
  for _ in range(3):
    state, metrics = step(
      state, [[9.0, 9.0, -9.0]], 0.0, optimizer=wild, lam_max=4.0
    )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  np.testing.assert_allclose(
    metrics["lam"], [2.0, 2.0, lagrange.LAM_MIN], rtol=1e-4
  )


# --------------------------------------------------- infeasible, no windup

CONTROLLERS = {
  "sgd": (SGD, None),
  "adam": (optax.adam(0.05), None),
  "momentum": (optax.sgd(0.05, momentum=0.9), None),
  "pid": (SGD, (0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_infeasible_limit_says_so_and_recovers(name):
  """At lam_max while infeasible; 2 windows after relief far below it."""
  optimizer, pid = CONTROLLERS[name]
  episodes, window = 8, 128
  two_windows = 2 * window // episodes
  gaps = jnp.concatenate([jnp.full((400, 1), 0.3), jnp.full((99, 1), -0.3)])
  state = start(window=window, optimizer=optimizer)
  state, metrics = steady(
    state, gaps, episodes=episodes, optimizer=optimizer, pid=pid
  )
  lam, saturated = metrics["lam"][:, 0], metrics["saturated"]
  np.testing.assert_allclose(lam[200:400], 5.0, rtol=1e-5)
  np.testing.assert_array_equal(saturated[200:400], 1.0)
  np.testing.assert_array_equal(saturated[400 + two_windows :], 0.0)
  assert lam[400 + two_windows] < 2.5
  assert (np.diff(lam[400:]) <= 0).all()


@pytest.mark.parametrize("name", ["sgd", "pid"])
def test_how_long_it_was_infeasible_does_not_matter(name):
  """The path after relief is the same after 100 and after 3000 steps."""
  optimizer, pid = CONTROLLERS[name]
  paths = []
  for steps in (100, 3000):
    gaps = jnp.concatenate([jnp.full((steps, 1), 0.3), jnp.full((50, 1), -0.3)])
    _, metrics = steady(
      start(window=128), gaps, episodes=8, optimizer=optimizer, pid=pid
    )
    paths.append(metrics["lam"][-51:, 0])
  np.testing.assert_allclose(paths[0][0], 5.0, rtol=1e-5)
  np.testing.assert_allclose(paths[0], paths[1], rtol=1e-4)


# --------------------------------------------------------------------- PID


@settings(max_examples=20)
@given(SEEDS)
def test_pid_matches_reference(seed):
  rng = np.random.default_rng(seed)
  kp, ki, kd = gains = (1.5, 0.2, 0.7)
  k, lam_min, lam_max = 3, 1e-3, 1.5
  integral, before, moves = np.full(k, 0.5), np.zeros(k), np.zeros(k)
  expected = np.full(k, 0.5)
  state, d = start(k, window=1, lam0=0.5), np.array([0.2, 0.5, 0.8])
  for _ in range(12):
    costs = rng.random((1, k)).astype(np.float32)
    observed = (rng.random((1, k)) < 0.8).astype(np.float32)
    for i in np.flatnonzero(observed[0]):
      j, gap = float(costs[0, i]), float(costs[0, i]) - d[i]
      integral[i] = np.clip(integral[i] + ki * gap, 0.0, lam_max)
      rise = max(0.0, j - before[i]) if moves[i] else 0.0
      expected[i] = kp * gap + integral[i] + kd * rise
      before[i], moves[i] = j, moves[i] + 1
    above = np.maximum(expected, lam_min) - lam_min
    factor = min(1.0, (lam_max - k * lam_min) / max(above.sum(), 1e-9))
    expected, integral = above * factor + lam_min, integral * factor
    state, metrics = step(
      state,
      costs,
      d,
      jnp.asarray(observed),
      pid=gains,
      lam_max=lam_max,
      lam_min=lam_min,
    )
    np.testing.assert_allclose(metrics["lam"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.integral, integral, rtol=1e-4, atol=1e-5)


def test_pid_brakes_the_oscillation_of_its_integral():
  """A policy that follows lambda slowly: J tends to 0.5 - 0.1 lam, lam* = 2."""

  def path(pid):
    state, cost, lam = start(window=1, lam0=3.0), 0.5, []
    for _ in range(150):
      state, metrics = step(state, [[cost]], 0.3, pid=pid, lam_max=20.0)
      lam.append(float(metrics["lam"][0]))
      cost += 0.02 * (0.5 - 0.1 * lam[-1] - cost)
    return np.array(lam[50:])

  integral, proportional = path((0.0, 1.0, 0.0)), path((40.0, 1.0, 0.0))
  assert np.abs(integral - 2.0).max() > 1.0
  assert np.abs(proportional - 2.0).max() < 0.5
  np.testing.assert_allclose(proportional[-1], 2.0, rtol=0.02)


# --------------------------------------------------------------- pessimism


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_pessimism_is_the_upper_end_of_a_t_interval(seed, confidence):
  rng = np.random.default_rng(seed)
  costs = rng.normal(size=(7, 3)).astype(np.float32)
  seen = rng.random((7, 3)) < 0.7
  seen[:2] = True
  state = OBSERVE(
    start(3, window=7), jnp.asarray(costs), jnp.asarray(seen, jnp.float32)
  )
  mean, bound, count = lagrange.judge(state, pessimism=confidence)
  for i in range(3):
    kept = costs[seen[:, i], i].astype(np.float64)
    expected = scipy.stats.t.ppf(
      confidence, len(kept) - 1, kept.mean(), scipy.stats.sem(kept)
    )
    np.testing.assert_allclose(bound[i], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean[i], kept.mean(), rtol=1e-4, atol=1e-6)
    assert count[i] == len(kept)


def test_pessimism_raises_lambda_where_the_mean_would_not():
  costs = [[0.4], [0.5], [0.3], [0.6]]
  calm, _ = step(start(), costs, 0.5)
  wary, metrics = step(start(), costs, 0.5, pessimism=0.95)
  assert calm.log_lam[0] < 0 < wary.log_lam[0]
  assert metrics["bound"][0] > 0.5 > metrics["cost"][0]
  one, metrics = step(start(), [[0.9]], 0.5, pessimism=0.95)
  assert metrics["moved"][0] == 0.0 and one.log_lam[0] == 0.0


# ------------------------------------------------------ forms, bad settings


def test_rates_and_logits_agree_at_the_limit():
  rates = jnp.array([0.05, 0.5, 0.9])
  z = -(jnp.log(rates) - jnp.log1p(-rates))  # log-odds that comply
  for form, expected in (
    ("rate", rates),
    ("logit", np.log(np.float64(rates)) - np.log1p(-np.float64(rates))),
  ):
    d = limits.limits_of(rates, form=form)
    np.testing.assert_allclose(d, expected, rtol=1e-5, atol=1e-6)
    cost = limits.costs_of(z[None], form=form)
    np.testing.assert_allclose(cost[0], d, rtol=1e-5, atol=1e-6)
    worse = limits.costs_of(z[None] - 1.0, form=form)
    assert (worse > cost).all()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: start(0), "multiplier k: 0"),
    (lambda: start(window=0), "multiplier window: 0"),
    (lambda: start(lam0=-1.0), "multiplier lam0: -1.0"),
    (lambda: step(start(), [[0.0]], 0.0, lam_max=0.0), "lam_max 0.0"),
    (lambda: step(start(), [[0.0]], 0.0, lam_min=0.0), "lam_min 0.0"),
    (
      lambda: step(start(), [[0.0]], 0.0, pid=(1.0, -1.0, 0.0)),
      "none may be negative",
    ),
    (
      lambda: step(start(), [[0.0]], 0.0, pessimism=0.05),
      "the risk 0.05 is confidence 0.95",
    ),
    (
      lambda: step(start(window=1), [[0.0]], 0.0, pessimism=0.9),
      "needs at least 2",
    ),
    (
      lambda: lagrange.update(
        start(2), limits=jnp.zeros(3), optimizer=SGD, lam_max=5.0
      ),
      "for 2 constraints",
    ),
    (
      lambda: limits.limits_of(jnp.array([0.1, 1.0]), form="rate"),
      "constraint 1: 1.0",
    ),
    (
      lambda: limits.costs_of(jnp.zeros((1, 1)), form="odds"),
      "'odds': use 'rate' or 'logit'",
    ),
  ],
)
def test_bad_settings_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
