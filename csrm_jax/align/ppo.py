"""One update of PPO-Lagrangian: a pure function of (state, episodes).

Safe RLHF (arXiv:2310.12773, section 3.3) with a vector of constraints: each
has its multiplier, and its row of one cost critic.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from csrm_jax.align import advantages, lagrange, losses, reinforce
from csrm_jax.losses import counted, weighted
from csrm_jax.types import Mean, Params

MODELS = ("policy", "reward_critic", "cost_critic")
Metrics = dict[str, Array]  # scalars, and vectors of k constraints


class Episodes(NamedTuple):
  """What one update learns from: n responses, their scores and old values.

  Rows are a prompt, its response and padding. Values at a token are those of
  the state before it. Of padding and of prompts, all is ignored.

  Attributes:
    tokens: ids.
    length: tokens of prompt and response.
    mask: 1 on the tokens of the response, its stop token included.
    group: number of the prompt.
    logprobs: nats, of the policy that sampled; None: `update` finds them, see
      there.
    reference_logprobs: nats, of the policy before any update.
    rewards: of each response.
    costs: of each response under each constraint; smaller is better.
    observed: 1 where a cost was judged, else 0.
    reward_values: of the reward critic, before the update; None without one,
      or as `logprobs`.
    cost_values: of the cost critic, likewise.
  """

  tokens: Int[Array, "n l"]
  length: Int[Array, " n"]
  mask: Float[Array, "n l"]
  group: Int[Array, " n"]
  logprobs: Any  # Float[Array, "n l"]
  reference_logprobs: Float[Array, "n l"]
  rewards: Float[Array, " n"]
  costs: Float[Array, "n k"]
  observed: Float[Array, "n k"]
  reward_values: Any = None  # Float[Array, "n l"]
  cost_values: Any = None  # Float[Array, "n l k"]


class Agent(NamedTuple):
  """What an update needs of its models: functions of their parameters.

  Each takes (trained leaves, frozen leaves, tokens [n l], length [n]).

  Attributes:
    logprobs: (log p of each token after those before it [n l], entropy [n l]),
      nats.
    reward_values: [n l].
    cost_values: [n l k].
  """

  logprobs: Callable[..., tuple[Array, Array]]
  reward_values: Callable[..., Array]
  cost_values: Callable[..., Array]


class AlignState(NamedTuple):
  """All that a checkpoint must hold to go on as if nothing had happened.

  `params` holds trained leaves alone, by name of the model; what is frozen is
  read again from where it came.
  """

  step: Int[Array, ""]  # updates taken or skipped
  params: Params
  opt_state: dict[str, Any]
  multiplier: lagrange.Multiplier
  skipped: Int[Array, ""]  # updates with a non-finite loss or gradient
  skipped_in_a_row: Int[Array, ""]
  tokens: Float[Array, ""]  # sampled so far


class Targets(NamedTuple):
  """What the three losses of an update pull towards."""

  advantages: Float[Array, "n l"]  # of reward and costs, mixed
  returns: Any  # Float[Array, "n l"]; None without critics
  cost_returns: Any  # Float[Array, "n l k"], likewise


def init_state(
  params: Params,
  optimizers: Mapping[str, optax.GradientTransformation],
  multiplier: lagrange.Multiplier,
) -> AlignState:
  """State before the first update."""
  return AlignState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    multiplier=multiplier,
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    tokens=jnp.zeros((), jnp.float32),
  )


def targets(
  episodes: Episodes,
  lam: Float[Array, " k"],
  *,
  kl_coefficient: float,
  discount: float = 1.0,
  gae_lambda: float = 0.95,
  critic_lambda: float | None = None,
  score_clip: float = 50.0,
  whiten: bool = True,
  judged: float = 1.0,
) -> Targets:
  """Advantages of PPO-Lagrangian, and returns, under multipliers.

  The KL penalty enters the reward as -beta and each cost as +beta, hence after
  mixing as (-beta - beta sum lam) / (1 + sum lam) = -beta whatever lam is.

  Args:
    episodes: see there.
    lam: multipliers.
    kl_coefficient: beta, per nat.
    discount: per token.
    gae_lambda: of generalised advantage estimation (arXiv:1506.02438).
    critic_lambda: the same for what critics learn, decoupled
      (arXiv:2503.01491); None: as `gae_lambda`. At 1 they learn what responses
      end with, so that a small `gae_lambda` can trust them.
    score_clip: bound on every per-token reward and cost.
    whiten: mean 0 and deviation 1 for the mixed advantage over all tokens of
      responses, which cancels the factor 1 / (1 + sum lam). Reward and cost are
      never whitened apart: that would rescale lam.
    judged: chance that a constraint judged a response, if that was drawn; see
      `advantages.mix`.
  """
  mask = episodes.mask
  kl = episodes.logprobs - episodes.reference_logprobs

  def estimate(score: Array, values: Array, coefficient: float):
    per_token = advantages.per_token(
      score, kl, mask, kl_coefficient=coefficient, clip=score_clip
    )
    found, returns = advantages.gae(
      per_token, values, mask, discount=discount, gae_lambda=gae_lambda
    )
    if critic_lambda is not None:
      _, returns = advantages.gae(
        per_token, values, mask, discount=discount, gae_lambda=critic_lambda
      )
    return found, returns

  gained, returns = estimate(
    episodes.rewards, episodes.reward_values, -kl_coefficient
  )
  costs = jnp.where(episodes.observed > 0, episodes.costs, 0.0)
  paid, cost_returns = jax.vmap(
    lambda c, v: estimate(c, v, kl_coefficient), in_axes=(1, 2), out_axes=2
  )(costs, episodes.cost_values)
  mixed = advantages.mix(
    gained, paid, lam, observed=episodes.observed, judged=judged
  )
  if whiten:
    mixed = advantages.whiten(mixed, mask)
  return Targets(jax.lax.stop_gradient(mixed), returns, cost_returns)


def targets_without_critics(
  episodes: Episodes,
  lam: Float[Array, " k"],
  *,
  method: str,
  kl_coefficient: float,
) -> Targets:
  """Advantages of `align/reinforce.py`; the KL penalty is part of the reward.

  It weighs `kl_coefficient` whatever lam is, as in PPO.

  Args:
    episodes: see there.
    lam: multipliers.
    method: "grpo", "rloo" or "reinforce" (REINFORCE++).
    kl_coefficient: beta, per nat.
  """
  mask = episodes.mask
  kl = jnp.where(mask > 0, episodes.logprobs - episodes.reference_logprobs, 0.0)
  if method == "reinforce":
    mixed = reinforce.reinforce_plus_plus(
      episodes.rewards,
      kl,
      mask,
      kl_coefficient=kl_coefficient,
      costs=episodes.costs,
      lam=lam,
      observed=episodes.observed,
    )
    return Targets(mixed, None, None)
  # Mixing divides by 1 + sum lam, the penalty with it.
  penalty = kl_coefficient * (1.0 + jnp.sum(lam)) * jnp.sum(kl, axis=1)
  each = reinforce.lagrangian(
    episodes.rewards - penalty,
    episodes.costs,
    lam,
    episodes.group,
    weight=jnp.max(mask, axis=1),
    observed=episodes.observed,
    leave_one_out=method == "rloo",
    scale="group" if method == "grpo" else "none",
  )
  return Targets(reinforce.to_tokens(each, mask), None, None)


def update(
  state: AlignState,
  frozen: Params,
  episodes: Episodes,
  indices: Int[Array, "m r"],
  ptx: tuple[Int[Array, "x l"], Int[Array, " x"], Float[Array, "x l"]] | None,
  *,
  agent: Agent,
  optimizers: Mapping[str, optax.GradientTransformation],
  multiplier: Mapping[str, Any],
  aim: Callable[[Episodes, Array], Targets],
  clip: float = 0.2,
  value_clip: float = 5.0,
  ptx_weight: float = 0.0,
  costs_matter: bool = True,
  shaping: float = 0.0,
) -> tuple[AlignState, Metrics]:
  """One update: multipliers first, then policy and critics.

  Of a batch in one minibatch and one epoch, the models' own forward passes give
  log-probabilities and values from before the update: what `episodes` leaves
  None of them is taken from there.

  A non-finite loss or gradient leaves all but the counters as it was.

  Args:
    state: see there.
    frozen: leaves that are not trained, by name of the model.
    episodes: sampled by the policy of `state`.
    indices: rows of each minibatch, in order; epochs follow one another.
    ptx: (tokens, length, mask of what to imitate) of supervised data, whose
      negative log-likelihood is added (InstructGPT's PPO-ptx), or None.
    agent: the models.
    optimizers: of each model, by name.
    multiplier: keywords of `lagrange.update`.
    aim: advantages of episodes under multipliers, such as `targets` with its
      keywords.
    clip: of the probability ratio.
    value_clip: of a critic's change.
    ptx_weight: coefficient of the imitation loss.
    costs_matter: False keeps all multipliers at 0: plain PPO, or shaping.
    shaping: fixed weight nu of the summed costs in the reward.

  Returns:
    New state; metrics, those of constraints as vectors.
  """
  held = lagrange.observe(state.multiplier, episodes.costs, episodes.observed)
  held, metrics = lagrange.update(held, **multiplier)
  lam = metrics["lam"] if costs_matter else jnp.zeros_like(metrics["lam"])
  if shaping:
    shaped = _shaped(episodes, shaping)
    episodes = episodes._replace(rewards=shaped)
  whole = jnp.sum(episodes.mask)

  def learn(carry: Any, part: Episodes, wanted: Any) -> Any:
    params, opt_state, ok = carry
    gradients, measured, learnt = _gradients(
      agent,
      params,
      frozen,
      part,
      wanted,
      ptx,
      clip=clip,
      value_clip=value_clip,
      ptx_weight=ptx_weight,
    )
    finite = jnp.isfinite(optax.global_norm(gradients))
    finite &= jnp.isfinite(sum(m.total for m in measured.values()))
    new, moved = {}, {}
    for name in params:
      step, moved[name] = optimizers[name].update(
        gradients[name], opt_state[name], params[name]
      )
      new[name] = optax.apply_updates(params[name], step)
    measured["gradient_norm_policy"] = Mean(
      optax.global_norm(gradients["policy"]), jnp.ones(())
    )
    return (new, moved, ok & finite), measured, learnt

  carry = (state.params, state.opt_state, jnp.array(True))
  if episodes.logprobs is None:
    if indices.shape != (1, episodes.tokens.shape[0]):
      raise ValueError(
        f"episodes without log-probabilities, in {indices.shape[0]} minibatches"
        " and epochs: those after the first need what the first began with"
      )
    carry, measured, (episodes, goal) = learn(
      carry, episodes, lambda known: aim(known, lam)
    )
  else:
    goal = aim(episodes, lam)

    def one(carry: Any, rows: Array) -> Any:
      part, wanted = jax.tree.map(lambda x: x[rows], (episodes, goal))
      return learn(carry, part, wanted)[:2]

    carry, measured = jax.lax.scan(one, carry, indices)
  params, opt_state, ok = carry

  def kept(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

  skipped = jnp.where(ok, 0, 1)
  metrics |= {
    name: Mean(jnp.sum(m.total), jnp.sum(m.weight)).value()
    for name, m in measured.items()
  }
  metrics |= _facts(episodes, goal)
  metrics["lam"] = lam
  metrics["skipped"] = state.skipped + skipped
  metrics["skipped_in_a_row"] = jnp.where(ok, 0, state.skipped_in_a_row + 1)
  new_state = AlignState(
    step=state.step + 1,
    params=kept(params, state.params),
    opt_state=kept(opt_state, state.opt_state),
    multiplier=kept(held, state.multiplier),
    skipped=metrics["skipped"],
    skipped_in_a_row=metrics["skipped_in_a_row"],
    tokens=state.tokens + whole,
  )
  return new_state, metrics


def _shaped(episodes: Episodes, nu: float) -> Array:
  """R - nu C; a sum over part of the costs is scaled up to all of them."""
  seen = jnp.sum(episodes.observed, axis=1)
  costs = jnp.where(episodes.observed > 0, episodes.costs, 0.0)
  k = episodes.costs.shape[1]
  scale = jnp.where(seen > 0, k / jnp.where(seen > 0, seen, 1.0), 0.0)
  return episodes.rewards - nu * scale * jnp.sum(costs, axis=1)


def _gradients(
  agent: Agent,
  params: Params,
  frozen: Params,
  episodes: Episodes,
  goal: Targets | Callable[[Episodes], Targets],
  ptx: Any,
  *,
  clip: float,
  value_clip: float,
  ptx_weight: float,
) -> tuple[Params, dict[str, Mean], tuple[Episodes, Targets]]:
  """Gradient of each model's loss, what was measured, what was learnt from.

  Models run forward first: where `goal` is a function, it is of what they say.
  """
  tokens, length, mask = episodes.tokens, episodes.length, episodes.mask

  logprobs, pull, entropy = jax.vjp(
    _of_trained(agent.logprobs, frozen["policy"], tokens, length),
    params["policy"],
    has_aux=True,
  )
  pulls, said = {"policy": pull}, {"logprobs": logprobs}
  critics = [name for name in MODELS[1:] if name in params]
  for name in critics:
    field = name.replace("critic", "values")
    said[field], pulls[name] = jax.vjp(
      _of_trained(getattr(agent, field), frozen[name], tokens, length),
      params[name],
    )
  if callable(goal):
    episodes = episodes._replace(**jax.lax.stop_gradient(said))
    goal = goal(episodes)
  wanted = goal

  def policy_loss(now: Array) -> tuple[Array, dict[str, Mean]]:
    losses_of = (now, episodes.logprobs, wanted.advantages, mask)
    loss = losses.policy_loss(*losses_of, clip=clip)
    clipped = losses.clip_fraction(*losses_of, clip=clip)
    return loss.value(), {"loss_policy": loss, "clip_fraction": clipped}

  def critic_loss(now: Array, name: str) -> tuple[Array, dict[str, Mean]]:
    seen, before, returns = mask, episodes.reward_values, wanted.returns
    if name == "cost_critic":
      seen = mask[..., None] * episodes.observed[:, None, :]
      before, returns = episodes.cost_values, wanted.cost_returns
    loss = losses.value_loss(now, before, returns, seen, clip=value_clip)
    return loss.value(), {f"loss_{name}": loss}

  slope, measured = jax.grad(policy_loss, has_aux=True)(logprobs)
  gradients = {"policy": pulls["policy"](slope)[0]}
  measured["entropy"] = _masked(entropy, mask)
  if ptx is not None and ptx_weight:
    rows, lengths, imitated = ptx

    def imitation(trained: Params) -> tuple[Array, Mean]:
      known, _ = agent.logprobs(trained, frozen["policy"], rows, lengths)
      loss = losses.nll(known, imitated)
      return ptx_weight * loss.value(), loss

    more, measured["loss_ptx"] = jax.grad(imitation, has_aux=True)(
      params["policy"]
    )
    gradients["policy"] = jax.tree.map(jnp.add, gradients["policy"], more)
  for name in critics:
    now = said[name.replace("critic", "values")]
    slope, found = jax.grad(critic_loss, has_aux=True)(now, name)
    gradients[name] = pulls[name](slope)[0]
    measured |= found
  return gradients, measured, (episodes, wanted)


def _of_trained(function: Callable[..., Any], *rest: Any) -> Any:
  return lambda trained: function(trained, *rest)


def _masked(x: Array, mask: Array) -> Mean:
  return weighted(jax.lax.stop_gradient(counted(x, mask)), mask)


def _facts(episodes: Episodes, goal: Targets) -> Metrics:
  """What the batch shows before any gradient."""
  mask = episodes.mask
  kl = jnp.where(mask > 0, episodes.logprobs - episodes.reference_logprobs, 0.0)
  facts = {
    "reward": jnp.mean(episodes.rewards),
    "kl": jnp.mean(jnp.sum(kl, axis=1)),
    "length": jnp.mean(jnp.sum(mask, axis=1)),
  }
  if goal.returns is None:
    return facts
  seen = mask[..., None] * episodes.observed[:, None, :]
  return facts | {
    "explained_variance_reward": explained_variance(
      episodes.reward_values, goal.returns, mask
    ),
    "explained_variance_cost": explained_variance(
      episodes.cost_values, goal.cost_returns, seen
    ),
  }


def explained_variance(
  values: Float[Array, "..."],
  returns: Float[Array, "..."],
  mask: Float[Array, "..."],
) -> Float[Array, ""]:
  """1 - Var(return - value) / Var(return) over what the mask keeps.

  1: the critic is right; 0: no better than a constant; 0 as well where all
  returns are equal.
  """

  def variance(x: Array) -> Array:
    kept = jnp.where(mask > 0, x, 0.0)
    total = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(kept) / total
    return jnp.sum(jnp.where(mask > 0, jnp.square(x - mean), 0.0)) / total

  spread = variance(returns)
  share = variance(returns - values) / jnp.where(spread > 0, spread, 1.0)
  return jnp.where(spread > 0, 1.0 - share, 0.0)


def minibatches(
  key: jax.Array, n: int, *, epochs: int, count: int
) -> Int[Array, "m r"]:
  """Rows of each minibatch: every row once an epoch, shuffled but if whole.

  Raises:
    ValueError: n is no multiple of `count`.
  """
  if n % count:
    raise ValueError(
      f"align.minibatches = {count} does not divide the {n} responses of an "
      "update (prompts_per_step x samples); change one of them"
    )
  if count == 1:
    return jnp.tile(jnp.arange(n)[None], (epochs, 1))
  orders = [
    jax.random.permutation(jax.random.fold_in(key, e), n) for e in range(epochs)
  ]
  return jnp.concatenate(orders).reshape(epochs * count, n // count)
