"""PPO-Lagrangian reaches the known optimum of small constrained problems.

A problem is a choice of `steps` tokens out of `actions`, with a reward and k
costs of the whole sequence: a bandit with one step, a sequence with three.
Policy and critics are tables over prefixes, and what learns is `ppo.update`,
as in launch/align.py. The optimum of the KL-regularised problem comes from
`solve`, which enumerates all sequences in float64 and shares no code with the
package.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

from csrm_jax.align import lagrange, ppo

BETA = 0.1  # reward per nat of KL
EPISODES, WINDOW = 256, 1024
LAM_MAX = 5.0
DUAL = optax.sgd(0.2)
UPDATES = 1200
SEEDS = (0, 1, 2)

# ------------------------------------------------------------- the problems


class Problem(NamedTuple):
  """Every sequence by number: digits base `actions`, first token leading."""

  ref: np.ndarray  # [prefixes actions] logits of the reference policy
  reward: np.ndarray  # [sequences]
  costs: np.ndarray  # [sequences k], probabilities; NaN if k never judges it
  steps: int
  given: int = 0  # leading tokens that are a prompt, drawn from the reference


def bandit(k: int) -> Problem:
  """Eight tokens, the rewarding ones the costly ones."""
  rng = np.random.default_rng(k)
  reward = np.linspace(0.2, 1.2, 8)
  costs = 0.75 * np.linspace(0.05, 1.0, 8)[:, None] + 0.25 * rng.random((8, k))
  if k > 1:  # each constraint has its own idea of what is harmful
    costs = 0.4 * costs + 0.6 * rng.random((8, k))
  return Problem(0.5 * rng.normal(size=(1, 8)), reward, costs, 1)


def sequence(k: int) -> Problem:
  """Three steps of three tokens; the second and third depend on the first."""
  rng = np.random.default_rng(10 + k)
  reward = 0.4 + 0.8 * rng.random(27)
  costs = 0.5 * (reward[:, None] - 0.4) / 0.8 + 0.5 * rng.random((27, k))
  return Problem(0.5 * rng.normal(size=(13, 3)), reward, costs, 3)


def prompted(one: Problem, other: Problem) -> Problem:
  """Two bandits behind an even choice of prompt, each with its own constraint.

  As two of `actions` first tokens are prompts, the others never come.
  """
  v = one.ref.shape[1]
  ref = np.full((1 + v, v), -np.inf)
  ref[0, :2], ref[1], ref[2], ref[3:] = 0.0, one.ref, other.ref, 0.0
  reward, costs = np.zeros((v, v)), np.full((v, v, 2), np.nan)
  reward[0], costs[0, :, 0] = one.reward, one.costs[:, 0]
  reward[1], costs[1, :, 1] = other.reward, other.costs[:, 0]
  return Problem(ref, reward.ravel(), costs.reshape(-1, 2), 2, given=1)


def prefixes(problem: Problem) -> np.ndarray:
  """[sequences steps]: the row of the tables in which each token is chosen."""
  v, t = problem.ref.shape[1], problem.steps
  rows, offset, number = [], 0, np.arange(v**t)
  for i in range(t):
    rows.append(offset + number // v ** (t - i))
    offset += v**i
  return np.stack(rows, 1)


def tokens(problem: Problem) -> np.ndarray:
  """[sequences steps]."""
  v, t = problem.ref.shape[1], problem.steps
  return np.arange(v**t)[:, None] // v ** np.arange(t)[::-1] % v


def log_softmax(x: np.ndarray) -> np.ndarray:
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def distribution(problem: Problem, lam: np.ndarray) -> np.ndarray:
  """pi_ref exp((r - lam c) / (beta (1 + sum lam))), over whole sequences."""
  ref = log_softmax(problem.ref)[prefixes(problem), tokens(problem)].sum(1)
  gain = (problem.reward - problem.costs @ lam) / (BETA * (1 + lam.sum()))
  return np.exp(log_softmax(ref + gain))


def solve(problem: Problem, limits: np.ndarray) -> tuple[np.ndarray, ...]:
  """(lam*, E r, E c): one root search inside the other, one a constraint.

  Given the multipliers before it, constraint i has the lam_i at which its cost
  meets its limit, or 0 if it stays below without.
  """
  k = len(limits)

  def best(fixed: list[float]) -> np.ndarray:
    if len(fixed) == k:
      return np.array(fixed)

    def excess(x: float) -> float:
      p = distribution(problem, best([*fixed, x]))
      return float(p @ problem.costs[:, len(fixed)]) - limits[len(fixed)]

    if excess(0.0) <= 0:
      return best([*fixed, 0.0])
    root: Any = brentq(excess, 0.0, 100.0, xtol=1e-12)
    return best([*fixed, root])

  lam = best([])
  p = distribution(problem, lam)
  cost = p @ problem.costs
  assert (cost <= limits + 1e-8).all() and (lam >= 0).all()
  np.testing.assert_allclose(lam * (cost - limits), 0.0, atol=1e-8)
  return lam, p @ problem.reward, cost


# ------------------------------------------------------------------ the loop


def rows_of(chosen: jax.Array, actions: int) -> jax.Array:
  """[n t]: the row of the tables in which each token was chosen."""
  number, offset, rows = jnp.zeros(len(chosen), jnp.int32), 0, []
  for i in range(chosen.shape[1]):
    rows.append(offset + number)
    number = number * actions + chosen[:, i]
    offset += actions**i
  return jnp.stack(rows, 1)


def tabular(actions: int) -> ppo.Agent:
  """Policy and critics as tables: every prefix has a row of its own."""

  def logprobs(trained, frozen, chosen, length):
    del frozen, length
    table = jax.nn.log_softmax(trained["table"])
    each = table[rows_of(chosen, actions)]  # [n t actions]
    # A prompt that never comes has -inf, and no share in the entropy.
    spread = jnp.where(jnp.isfinite(each), jnp.exp(each) * each, 0.0)
    said = jnp.take_along_axis(each, chosen[..., None], -1)[..., 0]
    return said, -spread.sum(-1)

  def values(trained, frozen, chosen, length):
    del frozen, length
    return trained["table"][rows_of(chosen, actions)]

  return ppo.Agent(logprobs, values, values)


def optimizers(updates: int) -> dict[str, optax.GradientTransformation]:
  """Adam; the policy's rate falls so that its noise does, too."""
  falling = optax.cosine_decay_schedule(0.03, 2 * updates, 0.1)
  rates = {"policy": falling, "reward_critic": 0.03, "cost_critic": 0.03}
  return {name: optax.adam(rates[name]) for name in ppo.MODELS}


def start(problem: Problem, updates: int) -> ppo.AlignState:
  k, rows = problem.costs.shape[1], len(problem.ref)
  params = {
    "policy": {"table": jnp.asarray(problem.ref, jnp.float32)},
    "reward_critic": {"table": jnp.zeros(rows)},
    "cost_critic": {"table": jnp.zeros((rows, k))},
  }
  multiplier = lagrange.init(k, window=WINDOW, optimizer=DUAL)
  return ppo.init_state(params, optimizers(updates), multiplier)


def rollout(
  problem: Problem,
  agent: ppo.Agent,
  params: Any,
  key: jax.Array,
  judged: float,
) -> ppo.Episodes:
  """What the policy says, what that earns and costs, what the critics think.

  `judged` below 1: one constraint of k judges each sequence, drawn anew.
  """
  v, t = problem.ref.shape[1], problem.steps
  chosen = jnp.zeros((EPISODES, t), jnp.int32)
  for i, at in enumerate(jax.random.split(key, t)):
    logits = params["policy"]["table"][rows_of(chosen, v)[:, i]]
    chosen = chosen.at[:, i].set(jax.random.categorical(at, logits))
  number = (chosen * v ** jnp.arange(t)[::-1]).sum(1)
  costs = jnp.asarray(problem.costs, jnp.float32)[number]
  if judged < 1:
    k = problem.costs.shape[1]
    drawn = jax.random.randint(jax.random.fold_in(key, 1), (EPISODES,), 0, k)
    costs = jnp.where(jax.nn.one_hot(drawn, k) > 0, costs, jnp.nan)
  length = jnp.full(EPISODES, t, jnp.int32)
  ref = {"table": jnp.asarray(problem.ref, jnp.float32)}
  return ppo.Episodes(
    tokens=chosen,
    length=length,
    mask=jnp.ones((EPISODES, t)).at[:, : problem.given].set(0.0),
    group=jnp.zeros(EPISODES, jnp.int32),
    logprobs=agent.logprobs(params["policy"], {}, chosen, length)[0],
    reference_logprobs=agent.logprobs(ref, {}, chosen, length)[0],
    rewards=jnp.asarray(problem.reward, jnp.float32)[number],
    costs=costs,
    observed=1.0 - jnp.isnan(costs),
    reward_values=agent.reward_values(
      params["reward_critic"], {}, chosen, length
    ),
    cost_values=agent.cost_values(params["cost_critic"], {}, chosen, length),
  )


def train(problem: Problem, limits: np.ndarray, *, judged: float = 1.0) -> dict:
  """Metrics [seeds updates ...], with the exact `reward` and `costs` of each.

  Each update is two gradient steps over all episodes.

  Args:
    problem: to learn.
    limits: [updates k].
    judged: chance that a constraint judges a sequence: 1, or 1 of k.
  """
  at, chosen = prefixes(problem), tokens(problem)
  agent = tabular(problem.ref.shape[1])
  aim = functools.partial(
    ppo.targets,
    kl_coefficient=BETA,
    gae_lambda=0.95,
    whiten=False,
    judged=judged,
  )
  indices = jnp.tile(jnp.arange(EPISODES), (2, 1))

  def body(state, xs):
    key, d = xs
    table = jax.nn.log_softmax(state.params["policy"]["table"])
    p = jnp.exp(table[at, chosen].sum(1))  # of every sequence
    state, metrics = ppo.update(
      state,
      {name: {} for name in ppo.MODELS},
      rollout(problem, agent, state.params, key, judged),
      indices,
      None,
      agent=agent,
      optimizers=optimizers(len(limits)),
      multiplier={"limits": d, "optimizer": DUAL, "lam_max": LAM_MAX},
      aim=aim,
      clip=0.2,
      value_clip=5.0,
    )
    return state, {"p": p, **metrics}

  @jax.jit
  @jax.vmap
  def run(seed):
    keys = jax.random.split(jax.random.key(seed), len(limits))
    begin = start(problem, len(limits))
    return jax.lax.scan(body, begin, (keys, jnp.asarray(limits, jnp.float32)))

  _, log = run(jnp.array(SEEDS))
  log = {name: np.float64(value) for name, value in log.items()}
  assert (log["skipped"] == 0).all()
  log["reward"] = log["p"] @ problem.reward
  share = log["p"] @ ~np.isnan(problem.costs)  # of episodes that k judges
  log["costs"] = log["p"] @ np.nan_to_num(problem.costs) / share
  return log


def averaged(log: dict, name: str) -> np.ndarray:
  """[seeds ...]: mean over the last half of the updates."""
  return log[name][:, log[name].shape[1] // 2 :].mean(1)


# ------------------------------------------------------------------ the tests

PROBLEMS = {
  "bandit": (bandit(1), [0.5]),
  "sequence": (sequence(1), [0.35]),
  "bandit, 3 constraints": (bandit(3), [0.6, 0.85, 0.53]),
  "sequence, 3 constraints": (sequence(3), [0.54, 0.55, 0.85]),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_reaches_the_constrained_optimum(name):
  problem, limits = PROBLEMS[name][0], np.array(PROBLEMS[name][1])
  lam, reward, _ = solve(problem, limits)
  free = distribution(problem, np.zeros(len(limits)))
  binds = lam > 0
  # Worth the name: 1 of 1 or 2 of 3 bind, and the reward alone breaks a limit.
  assert binds.sum() == (1 if len(limits) == 1 else 2)
  assert (free @ problem.costs > 1.05 * limits)[binds].any()

  log = train(problem, np.tile(limits, (UPDATES, 1)))

  np.testing.assert_allclose(averaged(log, "reward"), reward, rtol=0.02)
  costs, lams = averaged(log, "costs"), averaged(log, "lam")
  for i in range(len(limits)):
    if binds[i]:
      np.testing.assert_allclose(costs[:, i], limits[i], rtol=0.01)
      np.testing.assert_allclose(lams[:, i], lam[i], rtol=0.1)
    else:
      assert (costs[:, i] < limits[i]).all()
      assert (lams[:, i] < 0.05).all()
  assert (log["saturated"] == 0).all()


def test_constraints_that_judge_half_of_the_episodes_each():
  """Each prompt ends at its own optimum, under its own multiplier alone."""
  halves, limits = (bandit(1), bandit(3)), np.array([0.5, 0.6])
  problem = prompted(*halves)
  alone = [half._replace(costs=half.costs[:, :1]) for half in halves]
  lam, reward, cost = np.transpose(
    [
      np.hstack(solve(half, d))
      for half, d in zip(alone, limits[:, None], strict=True)
    ]
  )
  assert (lam > 0.5).all() and abs(lam[0] - lam[1]) > 0.3
  np.testing.assert_allclose(cost, limits, rtol=1e-6)

  log = train(problem, np.tile(limits, (UPDATES, 1)))

  lams, costs = averaged(log, "lam"), averaged(log, "costs")
  np.testing.assert_allclose(lams, [lam] * 3, rtol=0.1)
  np.testing.assert_allclose(costs, [limits] * 3, rtol=0.01)
  np.testing.assert_allclose(averaged(log, "reward"), reward.mean(), rtol=0.02)
  assert (log["rejected"] == 0).all()


def test_one_constraint_drawn_for_each_episode_stands_for_all():
  """The same optimum, each episode judged by one of the three, drawn anew.

  So few judge that a divisor of each row's own would miss it by far.
  """
  problem, limits = PROBLEMS["bandit, 3 constraints"]
  lam, reward, _ = solve(problem, np.array(limits))
  binds = lam > 0

  log = train(problem, np.tile(limits, (UPDATES, 1)), judged=1 / 3)

  costs, lams = averaged(log, "costs"), averaged(log, "lam")
  np.testing.assert_allclose(averaged(log, "reward"), reward, rtol=0.02)
  np.testing.assert_allclose(
    costs[:, binds], [np.array(limits)[binds]] * 3, rtol=0.01
  )
  np.testing.assert_allclose(lams[:, binds], [lam[binds]] * 3, rtol=0.1)
  assert (lams[:, ~binds] < 0.05).all()
  assert (log["count"][:, -1] == WINDOW).all()


def test_infeasible_limit_is_reported_and_forgotten():
  """No sequence is as cheap as 0.15; from update 400 on 0.5 is enough."""
  problem = bandit(1)
  assert problem.costs.min() > 0.15
  limits = np.repeat([[0.15], [0.5]], [400, 800], axis=0)
  lam, reward, _ = solve(problem, limits[-1])

  log = train(problem, limits)

  np.testing.assert_allclose(log["lam"][:, 100:400], LAM_MAX, rtol=1e-5)
  assert (log["saturated"][:, 100:400] == 1).all()
  relieved = 400 + 2 * WINDOW // EPISODES
  assert (log["saturated"][:, relieved:] == 0).all()
  assert (log["lam"][:, relieved] < LAM_MAX / 2).all()
  np.testing.assert_allclose(averaged(log, "lam")[:, 0], lam[0], rtol=0.1)
  np.testing.assert_allclose(averaged(log, "costs")[:, 0], 0.5, rtol=0.01)
  np.testing.assert_allclose(averaged(log, "reward"), reward, rtol=0.02)


@pytest.mark.parametrize("name", ["bandit", "sequence, 3 constraints"])
def test_solver_beats_every_other_policy_within_the_limits(name):
  """The optimum of the test is one: no feasible policy has more reward - KL.

  Maximised is `E r - beta (1 + sum lam*) KL`, the objective whose Lagrangian
  over 1 + sum lam* the advantages are of.
  """
  problem, limits = PROBLEMS[name][0], np.array(PROBLEMS[name][1])
  lam, _, _ = solve(problem, limits)
  ref = log_softmax(problem.ref)[prefixes(problem), tokens(problem)].sum(1)

  def objective(p):
    kl = p @ (np.log(p) - ref)
    return p @ problem.reward - BETA * (1 + lam.sum()) * kl

  optimum = distribution(problem, lam)
  rng, tried = np.random.default_rng(0), 0
  for scale in np.repeat([0.01, 0.1, 1.0], 300):
    p = np.exp(log_softmax(np.log(optimum) + scale * rng.normal(size=len(ref))))
    if (p @ problem.costs <= limits).all():
      tried += 1
      assert objective(p) <= objective(optimum) + 1e-9
  assert tried > 50
