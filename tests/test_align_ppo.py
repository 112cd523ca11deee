"""align/ppo.py: one update of tabular models, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csrm_jax.align import lagrange, ppo

N, L, V, K = 6, 5, 7, 3
PROMPT = 2  # tokens; rows are prompt, then up to three of response


def table_logprobs(trained, frozen, tokens, length):
  """Each position has a distribution of its own; nothing is looked back at."""
  del frozen, length
  logits = jax.nn.log_softmax(trained["table"], axis=-1)  # [l v]
  each = jnp.broadcast_to(logits, (*tokens.shape, V))
  entropy = -jnp.sum(jnp.exp(each) * each, axis=-1)
  picked = jnp.take_along_axis(each, tokens[..., None], axis=-1)[..., 0]
  return picked, entropy


AGENT = ppo.Agent(
  logprobs=table_logprobs,
  reward_values=lambda t, f, tokens, length: jnp.broadcast_to(
    t["value"], tokens.shape
  ),
  cost_values=lambda t, f, tokens, length: jnp.broadcast_to(
    t["value"], (*tokens.shape, K)
  ),
)
FROZEN = {name: {} for name in ppo.MODELS}
OPTIMIZERS = {name: optax.sgd(0.5) for name in ppo.MODELS}
MULTIPLIER = {
  "limits": jnp.array([0.1, 0.2, 0.3]),
  "optimizer": optax.sgd(0.1),
  "lam_max": 5.0,
}
AIM = functools.partial(
  ppo.targets, kl_coefficient=0.05, gae_lambda=0.95, whiten=False
)


def make_state(rng, window=8):
  params = {
    "policy": {"table": jnp.asarray(rng.normal(size=(L, V)), jnp.float32)},
    "reward_critic": {"value": jnp.asarray(rng.normal(size=L), jnp.float32)},
    "cost_critic": {"value": jnp.asarray(rng.normal(size=(L, K)), jnp.float32)},
  }
  multiplier = lagrange.init(
    K, window=window, optimizer=MULTIPLIER["optimizer"], lam0=0.7
  )
  return ppo.init_state(params, OPTIMIZERS, multiplier)


def make_episodes(rng, state, observed=None):
  tokens = jnp.asarray(rng.integers(0, V, (N, L)), jnp.int32)
  length = jnp.asarray(rng.integers(PROMPT + 1, L + 1, N), jnp.int32)
  at = jnp.arange(L)
  mask = ((at >= PROMPT) & (at < length[:, None])).astype(jnp.float32)
  p, r, c = (state.params[name] for name in ppo.MODELS)
  logprobs, _ = AGENT.logprobs(p, {}, tokens, length)
  seen = np.ones((N, K)) if observed is None else observed
  return ppo.Episodes(
    tokens=tokens,
    length=length,
    mask=mask,
    group=jnp.arange(N) // 2,
    logprobs=logprobs,
    reference_logprobs=logprobs
    - jnp.asarray(rng.normal(size=(N, L)), jnp.float32),
    rewards=jnp.asarray(rng.normal(size=N), jnp.float32),
    costs=jnp.asarray(rng.uniform(size=(N, K)), jnp.float32),
    observed=jnp.asarray(seen, jnp.float32),
    reward_values=AGENT.reward_values(r, {}, tokens, length),
    cost_values=AGENT.cost_values(c, {}, tokens, length),
  )


def one_update(state, episodes, **changes):
  keywords = {"multiplier": MULTIPLIER, "aim": AIM} | changes
  indices = jnp.arange(N)[None]
  return ppo.update(
    state,
    FROZEN,
    episodes,
    indices,
    None,
    agent=AGENT,
    optimizers=OPTIMIZERS,
    **keywords,
  )


def reference_gae(rewards, values, mask, gae_lambda):
  advantages = np.zeros_like(values)
  for i in range(values.shape[0]):
    after, ahead = 0.0, 0.0
    for t in reversed(range(values.shape[1])):
      if not mask[i, t]:
        continue
      delta = rewards[i, t] + ahead - values[i, t]
      after = delta + gae_lambda * after
      advantages[i, t] = after
      ahead = values[i, t]
  return advantages


def per_token(score, kl, mask, coefficient):
  out = coefficient * kl * mask
  for i, row in enumerate(mask):
    out[i, np.flatnonzero(row)[-1]] += score[i]
  return out


@pytest.mark.parametrize("observed", [None, np.arange(N * K).reshape(N, K) % 2])
def test_what_is_not_given_the_update_finds_itself(observed):
  rng = np.random.default_rng(5)
  state = make_state(rng)
  known = make_episodes(rng, state, observed)
  left_out = dict.fromkeys(("logprobs", "reward_values", "cost_values"))
  new, metrics = one_update(state, known._replace(**left_out))
  wanted, expected = one_update(state, known)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    (new, metrics),
    (wanted, expected),
  )
  with pytest.raises(ValueError, match="in 2 minibatches and epochs"):
    ppo.update(
      state,
      FROZEN,
      known._replace(**left_out),
      jnp.arange(N).reshape(2, -1),
      None,
      agent=AGENT,
      optimizers=OPTIMIZERS,
      multiplier=MULTIPLIER,
      aim=AIM,
    )


def test_update_equals_numpy():
  rng = np.random.default_rng(0)
  state = make_state(rng)
  episodes = make_episodes(rng, state)
  new, metrics = one_update(state, episodes)

  e = jax.tree.map(lambda x: np.asarray(x, np.float64), episodes)
  gap = e.costs.mean(0) - np.array([0.1, 0.2, 0.3])
  lam = 0.7 * np.exp(0.1 * 0.7 * gap)
  np.testing.assert_allclose(metrics["lam"], lam, rtol=1e-5)
  kl = e.logprobs - e.reference_logprobs
  gained = reference_gae(
    per_token(e.rewards, kl, e.mask, -0.05), e.reward_values, e.mask, 0.95
  )
  paid = np.stack(
    [
      reference_gae(
        per_token(e.costs[:, k], kl, e.mask, 0.05),
        e.cost_values[..., k],
        e.mask,
        0.95,
      )
      for k in range(K)
    ],
    axis=-1,
  )
  mixed = (gained - paid @ lam) / (1 + lam.sum())
  # The ratio is 1 before the update: the gradient is that of REINFORCE.
  table = np.asarray(state.params["policy"]["table"], np.float64)
  p = np.exp(table - table.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  slope = np.zeros_like(table)
  for i in range(N):
    for t in range(L):
      if e.mask[i, t]:
        onehot = np.eye(V)[int(e.tokens[i, t])]
        slope[t] -= mixed[i, t] * (onehot - p[t]) / e.mask.sum()
  np.testing.assert_allclose(
    new.params["policy"]["table"], table - 0.5 * slope, atol=1e-5
  )
  # A critic moves by the mean error, halved squares having slope V - G.
  error = -(gained * e.mask).sum(0) / e.mask.sum()
  value = np.asarray(state.params["reward_critic"]["value"], np.float64)
  np.testing.assert_allclose(
    new.params["reward_critic"]["value"], value - 0.5 * error, atol=1e-5
  )
  error = -(paid * e.mask[..., None]).sum(0) / (e.mask.sum() * K)
  value = np.asarray(state.params["cost_critic"]["value"], np.float64)
  np.testing.assert_allclose(
    new.params["cost_critic"]["value"], value - 0.5 * error, atol=1e-5
  )
  assert int(new.step) == 1
  assert float(new.tokens) == e.mask.sum()


def test_kl_weighs_beta_whatever_lambda():
  rng = np.random.default_rng(1)
  state = make_state(rng)
  episodes = make_episodes(rng, state)
  zero = episodes._replace(
    rewards=jnp.zeros(N),
    costs=jnp.zeros((N, K)),
    reward_values=jnp.zeros((N, L)),
    cost_values=jnp.zeros((N, L, K)),
  )
  partly = zero._replace(
    observed=jnp.asarray(np.eye(K)[np.arange(N) % K], jnp.float32)
  )
  found = [
    AIM(e, jnp.asarray(lam)).advantages
    for e in (zero, partly)
    for lam in ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [5.0, 0.1, 2.0])
  ]
  kl = np.asarray(zero.logprobs - zero.reference_logprobs)
  mask = np.asarray(zero.mask)
  expected = reference_gae(-0.05 * kl * mask, 0 * kl, mask, 0.95)
  for advantages in found:
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_critics_can_learn_the_end_of_a_response_alone():
  """At critic_lambda 1 all that is still to come; advantages stay."""
  state = make_state(np.random.default_rng(5))
  episodes = make_episodes(np.random.default_rng(6), state)
  lam = jnp.array([0.3, 0.0, 2.0])
  usual = ppo.targets(episodes, lam, kl_coefficient=0.1, gae_lambda=0.5)
  found = ppo.targets(
    episodes, lam, kl_coefficient=0.1, gae_lambda=0.5, critic_lambda=1.0
  )
  np.testing.assert_array_equal(found.advantages, usual.advantages)
  mask = np.asarray(episodes.mask)
  kl = np.asarray(episodes.logprobs - episodes.reference_logprobs) * mask
  later = np.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
  left = np.asarray(episodes.rewards)[:, None] - 0.1 * later
  costs = np.asarray(episodes.costs)[:, None] + 0.1 * later[..., None]
  np.testing.assert_allclose(found.returns * mask, left * mask, atol=1e-5)
  np.testing.assert_allclose(
    found.cost_returns * mask[..., None], costs * mask[..., None], atol=1e-5
  )
  assert np.abs((usual.returns - left) * mask).max() > 0.05


def test_plain_and_shaping_ignore_multipliers():
  rng = np.random.default_rng(2)
  state = make_state(rng)
  episodes = make_episodes(rng, state)
  plain, metrics = one_update(state, episodes, costs_matter=False)
  assert not np.any(metrics["lam"])
  free = episodes._replace(costs=episodes.costs + 10.0)
  same, _ = one_update(state, free, costs_matter=False)
  np.testing.assert_array_equal(
    plain.params["policy"]["table"], same.params["policy"]["table"]
  )
  shaped, _ = one_update(state, episodes, costs_matter=False, shaping=2.0)
  by_hand = episodes._replace(
    rewards=episodes.rewards - 2.0 * episodes.costs.sum(1)
  )
  hand, _ = one_update(state, by_hand, costs_matter=False)
  np.testing.assert_allclose(
    shaped.params["policy"]["table"], hand.params["policy"]["table"], atol=1e-6
  )


def test_a_constraint_that_judged_nothing_has_no_say():
  rng = np.random.default_rng(3)
  state = make_state(rng)
  seen = np.ones((N, K))
  seen[:, 1] = 0
  episodes = make_episodes(rng, state, seen)
  new, metrics = one_update(state, episodes)
  other = episodes._replace(costs=episodes.costs.at[:, 1].set(jnp.nan))
  same, _ = one_update(state, other)
  for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(same), strict=True):
    np.testing.assert_array_equal(a, b)
  assert float(metrics["lam"][1]) == pytest.approx(0.7)
  np.testing.assert_array_equal(
    new.params["cost_critic"]["value"][:, 1],
    state.params["cost_critic"]["value"][:, 1],
  )


def test_not_finite_is_skipped_and_counted():
  rng = np.random.default_rng(4)
  state = make_state(rng)
  episodes = make_episodes(rng, state)
  bad = episodes._replace(rewards=episodes.rewards.at[0].set(jnp.nan))
  new, metrics = one_update(state, bad)
  for name in ("params", "opt_state", "multiplier"):
    before, after = getattr(state, name), getattr(new, name)
    for a, b in zip(
      jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
      np.testing.assert_array_equal(a, b)
  assert (int(new.step), int(new.skipped)) == (1, 1)
  assert int(metrics["skipped_in_a_row"]) == 1
  good, metrics = one_update(new, episodes)
  assert int(metrics["skipped_in_a_row"]) == 0 and int(good.skipped) == 1


def test_clip_holds_the_second_epoch_back():
  """With large steps, a second pass moves less than one without a clip."""
  rng = np.random.default_rng(5)
  state = make_state(rng)
  episodes = make_episodes(rng, state)
  twice = jnp.tile(jnp.arange(N)[None], (8, 1))

  def run(clip):
    return ppo.update(
      state,
      FROZEN,
      episodes,
      twice,
      None,
      agent=AGENT,
      optimizers=OPTIMIZERS,
      multiplier=MULTIPLIER,
      aim=AIM,
      clip=clip,
    )

  tight, metrics = run(0.05)
  loose, unclipped = run(1e6)
  start = state.params["policy"]["table"]

  def moved(s):
    return float(jnp.abs(s.params["policy"]["table"] - start).max())

  assert moved(tight) < moved(loose)
  assert float(metrics["clip_fraction"]) > float(unclipped["clip_fraction"])
  assert float(unclipped["clip_fraction"]) == 0.0


def test_imitation_adds_its_gradient():
  rng = np.random.default_rng(6)
  state = make_state(rng)
  episodes = make_episodes(rng, state)
  still = episodes._replace(mask=jnp.zeros((N, L)).at[:, PROMPT].set(1.0))
  rows = jnp.full((2, L), 3, jnp.int32)
  ptx = (rows, jnp.full(2, L, jnp.int32), jnp.ones((2, L)))

  def run(weight):
    return ppo.update(
      state,
      FROZEN,
      still,
      jnp.arange(N)[None],
      ptx,
      agent=AGENT,
      optimizers=OPTIMIZERS,
      multiplier=MULTIPLIER,
      aim=AIM,
      ptx_weight=weight,
    )

  without, _ = run(0.0)
  with_it, metrics = run(2.0)
  table = state.params["policy"]["table"]
  p = jax.nn.softmax(table, axis=-1)
  expected = 2.0 * (p - jnp.eye(V)[3]) / L  # of the mean over tokens
  difference = (
    without.params["policy"]["table"] - with_it.params["policy"]["table"]
  )
  np.testing.assert_allclose(difference, 0.5 * expected, atol=1e-6)
  nll = -np.mean(np.log(np.asarray(p)[:, 3]))
  assert float(metrics["loss_ptx"]) == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce"])
def test_without_critics(method):
  """Only the policy is there, and KL weighs beta whatever lambda."""
  rng = np.random.default_rng(7)
  whole = make_state(rng)
  episodes = make_episodes(rng, whole)
  episodes = episodes._replace(reward_values=None, cost_values=None)
  state = whole._replace(
    params={"policy": whole.params["policy"]},
    opt_state={"policy": whole.opt_state["policy"]},
  )
  aim = functools.partial(
    ppo.targets_without_critics, method=method, kl_coefficient=0.05
  )
  new, metrics = one_update(state, episodes, aim=aim)
  assert set(new.params) == {"policy"}
  assert "loss_cost_critic" not in metrics and int(metrics["skipped"]) == 0
  moved = new.params["policy"]["table"] - state.params["policy"]["table"]
  assert float(jnp.abs(moved).max()) > 1e-3
  zero = episodes._replace(rewards=jnp.zeros(N), costs=jnp.zeros((N, K)))
  small, large = (aim(zero, jnp.full(K, lam)).advantages for lam in (0.0, 7.0))
  np.testing.assert_allclose(small, large, atol=1e-4)
  # A dearer cost pushes down the response that has it.
  costly = zero._replace(
    reference_logprobs=zero.logprobs, costs=zero.costs.at[0, 1].set(1.0)
  )
  found = aim(costly, jnp.ones(K)).advantages
  assert float(found[0].sum()) < 0 < float(found[1].sum())


def test_explained_variance():
  returns = jnp.array([[1.0, 2.0, 99.0], [3.0, 4.0, 99.0]])
  mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])

  def of(values):
    return float(ppo.explained_variance(values, returns, mask))

  assert of(returns) == 1.0
  assert of(jnp.full((2, 3), 7.0)) == 0.0
  assert of(-returns) == pytest.approx(-3.0)  # error 2 G: four times Var(G)
  assert float(ppo.explained_variance(returns, 0 * returns, mask)) == 0.0


def test_minibatches():
  key = jax.random.key(0)
  whole = ppo.minibatches(key, 6, epochs=2, count=1)
  np.testing.assert_array_equal(whole, np.tile(np.arange(6), (2, 1)))
  parts = np.asarray(ppo.minibatches(key, 6, epochs=2, count=3))
  assert parts.shape == (6, 2)
  for epoch in (parts[:3], parts[3:]):
    assert sorted(epoch.ravel()) == list(range(6))
  assert not np.array_equal(parts[:3], parts[3:])
  with pytest.raises(ValueError, match=r"minibatches = 4 does not divide"):
    ppo.minibatches(key, 6, epochs=1, count=4)
