"""One training step: a pure function of (state, batch)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from csrm_jax import losses, sharding
from csrm_jax.data.trie import real_tokens
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Batch, Mean, Params, TrainState

Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(
  params: Params, model: RewardModel, optimizer: optax.GradientTransformation
) -> TrainState:
  """State before the first step; moments exist for trained leaves only."""
  trained, _ = model.split(params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trained),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    tokens=jnp.zeros((), jnp.float32),
  )


def loss_and_gradients(
  model: RewardModel,
  params: Params,
  batch: Batch,
  *,
  weights: Mapping[str, float],
  microbatches: int = 1,
  **options: float,
) -> tuple[Float[Array, ""], dict[str, Mean], Params]:
  """Loss, its terms, and its gradient with respect to the trained leaves.

  Denominators are those of the whole batch, so neither the number of
  micro-batches nor the mesh changes the result.

  Args:
    model: the reward model.
    params: all parameters.
    batch: global batch.
    weights: coefficient of each term of `losses.TERMS`.
    microbatches: parts that are accumulated one after the other.
    **options: further keywords of `losses.mixed`.
  """
  trained, frozen = model.split(params)
  denominators = losses.weights_of(batch)
  verbaliser = model.head == "verbaliser"

  def loss_of(trained: Params, part: Batch):
    joined = model.join(trained, frozen)
    log_mass = None
    if verbaliser:
      readouts, logits = model.apply_with_logits(joined, part)
      _, log_mass = losses.verbaliser(
        logits, safe=model.safe_ids, unsafe=model.unsafe_ids
      )
    else:
      readouts = model.apply(joined, part)
    terms = losses.mixed(readouts, part, log_mass=log_mass, **options)
    loss = losses.total(terms, weights=dict(weights), denominators=denominators)
    return loss, terms

  value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
  if microbatches == 1:
    (loss, terms), gradients = value_and_grad(trained, batch)
    return loss, terms, gradients

  # Row i goes to micro-batch i mod n: each data shard splits its own rows.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def add(carry, part):
    (loss, terms), gradients = value_and_grad(trained, part)
    new = (loss, terms, gradients)
    return jax.tree.map(jnp.add, carry, new), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(value_and_grad, trained, first)
  (loss, terms), gradients = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), shapes
  )
  (loss, terms, gradients), _ = jax.lax.scan(
    add, (loss, terms, gradients), parts
  )
  return loss, terms, gradients


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: RewardModel,
  optimizer: optax.GradientTransformation,
  weights: Mapping[str, float],
  microbatches: int = 1,
  **options: float,
) -> tuple[TrainState, Metrics]:
  """Takes one optimizer step, or counts it as skipped.

  A non-finite loss or gradient leaves parameters and moments as they were.

  Returns:
    New state; metrics: loss, loss_<term> (nats), gradient_norm, skipped,
    skipped_in_a_row, tokens (of this batch, padding excluded).
  """
  loss, terms, gradients = loss_and_gradients(
    model,
    state.params,
    batch,
    weights=weights,
    microbatches=microbatches,
    **options,
  )
  norm = optax.global_norm(gradients)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  trained, frozen = model.split(state.params)

  def take(_):
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  def keep(_):
    return trained, state.opt_state

  trained, opt_state = jax.lax.cond(finite, take, keep, None)
  tokens = jnp.sum(real_tokens(batch)).astype(jnp.float32)
  skipped = jnp.where(finite, 0, 1)
  state = TrainState(
    step=state.step + 1,
    params=model.join(trained, frozen),
    opt_state=opt_state,
    skipped=state.skipped + skipped,
    skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    tokens=state.tokens + tokens,
  )
  metrics: dict[str, Any] = {
    "loss": loss,
    **{f"loss_{name}": term.value() for name, term in terms.items()},
    "gradient_norm": norm,
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
    "tokens": tokens,
  }
  return state, metrics


def compile_step(
  abstract: TrainState,
  mesh: Mesh,
  *,
  model: RewardModel,
  optimizer: optax.GradientTransformation,
  weights: Mapping[str, float],
  microbatches: int = 1,
  **options: float,
) -> Step:
  """`train_step` under jit on a mesh; the state's buffers are donated."""

  def step(state: TrainState, batch: Batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return train_step(
        state,
        batch,
        model=model,
        optimizer=optimizer,
        weights=weights,
        microbatches=microbatches,
        **options,
      )

  held = sharding.shardings(abstract, mesh)
  rows = sharding.batch_sharding(mesh)
  everywhere = NamedSharding(mesh, P())
  return jax.jit(
    step,
    in_shardings=(held, Batch._make([rows] * len(Batch._fields))),
    out_shardings=(held, everywhere),
    donate_argnums=(0,),
  )
