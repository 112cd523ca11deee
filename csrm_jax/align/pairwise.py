"""One update on pairs of responses: DPO, IPO, reward distillation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from csrm_jax import sharding
from csrm_jax.align import agent as agents
from csrm_jax.align import distill, dpo
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


def init_state(
  params: Params, optimizers: Mapping[str, optax.GradientTransformation]
) -> TrainState:
  """State before the first update; `params` by name of the model."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    tokens=jnp.zeros((), jnp.float32),
  )


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

  A non-finite loss or gradient leaves all but the counters as it was; so does
  a batch whose weights are all 0, without being counted as skipped.

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
  norm = optax.global_norm(gradient)
  finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)
  taken = finite & (loss.weight > 0)
  step, moved = optimizers["policy"].update(
    gradient, state.opt_state["policy"], state.params["policy"]
  )
  new = optax.apply_updates(state.params["policy"], step)

  def kept(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)

  skipped = state.skipped + jnp.where(finite, 0, 1)
  in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
  metrics = _facts(said, known, pairs, beta=beta) | {
    "loss": loss.value(),
    "gradient_norm_policy": norm,
    "skipped": skipped,
    "skipped_in_a_row": in_a_row,
  }
  real = jnp.where(pairs.weight > 0, 1.0, 0.0)
  return TrainState(
    step=state.step + 1,
    params=kept({"policy": new}, state.params),
    opt_state=kept({"policy": moved}, state.opt_state),
    skipped=skipped,
    skipped_in_a_row=in_a_row,
    tokens=state.tokens + jnp.sum(pairs.mask * real[:, None, None]),
  ), metrics


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


def compile_update(
  abstract: TrainState,
  frozen: Params,
  mesh: Mesh,
  **keywords: Any,
) -> Callable[[TrainState, Params, Pairs], tuple[TrainState, Metrics]]:
  """`update` under jit on a mesh; the state's buffers are donated.

  Args:
    abstract: shapes of the state.
    frozen: see `update`.
    mesh: pairs are spread over replica and fsdp.
    **keywords: of `update`.
  """

  def step(state, frozen, pairs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return update(state, frozen, pairs, **keywords)

  held = sharding.shardings(abstract, mesh)
  still = sharding.shardings(frozen, mesh)
  return jax.jit(
    step,
    in_shardings=(held, still, sharding.batch_sharding(mesh)),
    out_shardings=(held, NamedSharding(mesh, P())),
    donate_argnums=(0,),
  )
