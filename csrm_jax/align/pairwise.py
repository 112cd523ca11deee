"""One update on pairs of responses: DPO, IPO, reward distillation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from csrm_jax.align import agent as agents
from csrm_jax.align import descent, distill, dpo
from csrm_jax.align.ppo import Agent, Metrics
from csrm_jax.losses import counted, weighted
from csrm_jax.types import Mean, Params, TrainState

METHODS = ("dpo", "ipo", "distill")


class Pairs(NamedTuple):
  """What one update learns from: two responses a row, the better one first.

  Attributes:
    tokens: ids of prompt, response and padding.
    length: tokens of prompt and response.
    mask: 1 on the tokens of the response, its end of turn included.
    weight: pairs that each stands for; 0 marks what does not count.
    log_rewards: log R H of each response, nats; None where it is not asked for.
  """

  tokens: Int[Array, "n 2 l"]
  length: Int[Array, "n 2"]
  mask: Float[Array, "n 2 l"]
  weight: Float[Array, " n"]
  log_rewards: Any = None  # Float[Array, "n 2"]


def update(
  state: TrainState,
  frozen: Params,
  pairs: Pairs,
  *,
  agent: Agent,
  optimizers: Mapping[str, optax.GradientTransformation],
  method: str,
  beta: float,
  label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
  """One step of the policy on the pairs; its start is the reference.

  What is not finite, and what counts for nothing, changes no parameter: see
  `descent.descend`.

  Args:
    state: trained leaves, as {"policy": ...}.
    frozen: leaves that are not trained, likewise.
    pairs: see there.
    agent: the model.
    optimizers: of the policy, by its name.
    method: of `METHODS`.
    beta: reward per nat of log-ratio.
    label_smoothing: of DPO.

  Returns:
    New state; metrics, means over pairs: loss, accuracy (of the implicit
    reward), margin (its lead), logprob_chosen, logprob_rejected (nats),
    log_ratio_chosen, log_ratio_rejected (to the reference, nats), length
    (tokens of a response).

  Raises:
    ValueError: another method.
  """
  if method not in METHODS:
    raise ValueError(f"method {method!r}: use one of {', '.join(METHODS)}")
  held = frozen["policy"]
  start = agents.reference(state.params["policy"], held)
  known = jax.lax.stop_gradient(_said(agent, {}, start, pairs))

  def loss_of(trained: Params) -> tuple[Array, tuple[Mean, Array]]:
    said = _said(agent, trained, held, pairs)
    loss = _loss(
      said, known, pairs, method, beta=beta, label_smoothing=label_smoothing
    )
    return loss.value(), (loss, said)

  (_, (loss, said)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
    state.params["policy"]
  )
  real = jnp.where(pairs.weight > 0, 1.0, 0.0)
  new, metrics = descent.descend(
    state,
    gradient,
    loss,
    optimizers,
    tokens=jnp.sum(pairs.mask * real[:, None, None]),
  )
  return new, _facts(said, known, pairs, beta=beta) | metrics


def _said(
  agent: Agent, trained: Params, frozen: Params, pairs: Pairs
) -> Float[Array, "n 2"]:
  """Log-probability of each response, nats."""
  n, two, many = pairs.tokens.shape
  logprobs, _ = agent.logprobs(
    trained,
    frozen,
    pairs.tokens.reshape(n * two, many),
    pairs.length.reshape(n * two),
  )
  mask = pairs.mask.reshape(n * two, many)
  return dpo.response_logprob(logprobs, mask).reshape(n, two)


def _loss(
  said: Float[Array, "n 2"],
  known: Float[Array, "n 2"],
  pairs: Pairs,
  method: str,
  *,
  beta: float,
  label_smoothing: float,
) -> Mean:
  good, bad = said[:, 0], said[:, 1]
  before = (known[:, 0], known[:, 1])
  if method == "distill":
    rewards = pairs.log_rewards
    return distill.distillation(
      good, bad, *before, rewards[:, 0], rewards[:, 1], pairs.weight, beta=beta
    )
  if method == "ipo":
    return dpo.ipo(good, bad, *before, pairs.weight, beta=beta)
  return dpo.dpo(
    good,
    bad,
    *before,
    pairs.weight,
    beta=beta,
    label_smoothing=label_smoothing,
  )


def _facts(
  said: Float[Array, "n 2"],
  known: Float[Array, "n 2"],
  pairs: Pairs,
  *,
  beta: float,
) -> Metrics:
  """Means over the pairs that count."""
  weight = pairs.weight
  u = dpo.lead(
    said[:, 0], said[:, 1], known[:, 0], known[:, 1], weight, beta=beta
  )

  def mean(x: Array) -> Array:
    return weighted(counted(x, weight), weight).value()

  ratio = said - known
  return {
    "accuracy": dpo.accuracy(u, weight).value(),
    "margin": mean(u),
    "logprob_chosen": mean(said[:, 0]),
    "logprob_rejected": mean(said[:, 1]),
    "log_ratio_chosen": mean(ratio[:, 0]),
    "log_ratio_rejected": mean(ratio[:, 1]),
    "length": mean(jnp.mean(jnp.sum(pairs.mask, axis=2), axis=1)),
  }
