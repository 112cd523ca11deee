"""PPO-Lagrangian reaches the known optimum of small constrained problems.

A problem is a choice of `steps` tokens out of `actions`, with a reward and k
costs of the whole sequence: a bandit with one step, a sequence with three.
Policy and critics are tables over prefixes. The optimum of the KL-regularised
problem comes from `solve`, which enumerates all sequences in float64 and shares
no code with the package.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

from csrm_jax.align import advantages, lagrange, losses

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


class Agent(NamedTuple):
  tables: Any  # policy [prefixes actions], value [prefixes], cost [prefixes k]
  opt_state: optax.OptState
  multiplier: lagrange.Multiplier


def optimizer(updates: int) -> optax.GradientTransformation:
  """Adam; the policy's rate falls so that its noise does, too."""
  return optax.multi_transform(
    {
      "policy": optax.adam(optax.cosine_decay_schedule(0.03, 2 * updates, 0.1)),
      "value": optax.adam(0.03),
      "cost": optax.adam(0.03),
    },
    {"policy": "policy", "value": "value", "cost": "cost"},
  )


def start(problem: Problem, updates: int) -> Agent:
  k, rows = problem.costs.shape[1], len(problem.ref)
  tables = {
    "policy": jnp.asarray(problem.ref, jnp.float32),
    "value": jnp.zeros(rows),
    "cost": jnp.zeros((rows, k)),
  }
  return Agent(
    tables,
    optimizer(updates).init(tables),
    lagrange.init(k, window=WINDOW, optimizer=DUAL),
  )


def rollout(problem: Problem, policy: jax.Array, key: jax.Array):
  """(prefix rows [n t], tokens [n t], number of the sequence [n])."""
  number, offset, rows, chosen = jnp.zeros(EPISODES, int), 0, [], []
  v = problem.ref.shape[1]
  for i, at in enumerate(jax.random.split(key, problem.steps)):
    rows.append(offset + number)
    chosen.append(jax.random.categorical(at, policy[rows[-1]]))
    number = number * v + chosen[-1]
    offset += v**i
  return jnp.stack(rows, 1), jnp.stack(chosen, 1), number


def ppo_update(problem, updates, agent, key, limits):
  """One update, pure: rollout, multipliers, advantages, two gradient steps."""
  rows, chosen, number = rollout(problem, agent.tables["policy"], key)
  reward = jnp.asarray(problem.reward, jnp.float32)[number]
  costs = jnp.asarray(problem.costs, jnp.float32)[number]
  observed = 1.0 - jnp.isnan(costs)
  mask = jnp.ones(rows.shape).at[:, : problem.given].set(0.0)
  judged = mask[..., None] * observed[:, None]

  multiplier, metrics = lagrange.update(
    lagrange.observe(agent.multiplier, costs, observed),
    limits=limits,
    optimizer=DUAL,
    lam_max=LAM_MAX,
  )

  def logprobs(policy):
    table = jax.nn.log_softmax(policy)
    return jnp.take_along_axis(table[rows], chosen[..., None], -1)[..., 0]

  old, values = logprobs(agent.tables["policy"]), agent.tables["value"][rows]
  cost_values = agent.tables["cost"][rows]
  kl = old - logprobs(jnp.asarray(problem.ref, jnp.float32))

  def estimate(episode, values, coefficient):
    given = advantages.per_token(
      episode, kl, mask, kl_coefficient=coefficient, clip=50.0
    )
    return advantages.gae(given, values, mask, discount=1.0, gae_lambda=0.95)

  a, g = estimate(reward, values, -BETA)
  cost_a, cost_g = jax.vmap(
    lambda c, v: estimate(c, v, BETA), in_axes=-1, out_axes=-1
  )(costs, cost_values)
  mixed = advantages.mix(a, cost_a, lagrange.lam(multiplier), observed=observed)

  def loss(tables):
    return (
      losses.policy_loss(
        logprobs(tables["policy"]), old, mixed, mask, clip=0.2
      ).value()
      + losses.value_loss(
        tables["value"][rows], values, g, mask, clip=5.0
      ).value()
      + losses.value_loss(
        tables["cost"][rows], cost_values, cost_g, judged, clip=5.0
      ).value()
    )

  tables, opt_state = agent.tables, agent.opt_state
  for _ in range(2):
    change, opt_state = optimizer(updates).update(
      jax.grad(loss)(tables), opt_state
    )
    tables = optax.apply_updates(tables, change)
  return Agent(tables, opt_state, multiplier), metrics


def train(problem: Problem, limits: np.ndarray) -> dict:
  """Metrics [seeds updates ...], with the exact `reward` and `costs` of each.

  Args:
    problem: to learn.
    limits: [updates k].
  """
  at, chosen = prefixes(problem), tokens(problem)

  def body(agent, xs):
    key, d = xs
    table = jax.nn.log_softmax(agent.tables["policy"])
    p = jnp.exp(table[at, chosen].sum(1))  # of every sequence
    agent, metrics = ppo_update(problem, len(limits), agent, key, d)
    return agent, {"p": p, **metrics}

  @jax.jit
  @jax.vmap
  def run(seed):
    keys = jax.random.split(jax.random.key(seed), len(limits))
    begin = start(problem, len(limits))
    return jax.lax.scan(body, begin, (keys, jnp.asarray(limits, jnp.float32)))

  _, log = run(jnp.array(SEEDS))
  log = {name: np.float64(value) for name, value in log.items()}
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
