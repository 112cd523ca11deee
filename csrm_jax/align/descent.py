"""One gradient step of a policy alone: pairs and supervised rows end in it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from csrm_jax import sharding
from csrm_jax.align.ppo import Metrics
from csrm_jax.types import Mean, Params, TrainState

# (state, frozen leaves, batch) to the new state and metrics.
Update = Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]


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


def descend(
  state: TrainState,
  gradient: Params,
  loss: Mean,
  optimizers: Mapping[str, optax.GradientTransformation],
  *,
  tokens: Float[Array, ""],
) -> tuple[TrainState, Metrics]:
  """The state one step down the gradient.

  A non-finite loss or gradient leaves all but the counters as it was; so does
  a batch whose weights are all 0, without being counted as skipped.

  Args:
    state: trained leaves, as {"policy": ...}.
    gradient: of the policy's leaves.
    loss: that it is the gradient of.
    optimizers: of the policy, by its name.
    tokens: that the batch was about.

  Returns:
    New state; metrics: loss, gradient_norm_policy, skipped, skipped_in_a_row.
  """
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
  new_state = TrainState(
    step=state.step + 1,
    params=kept({"policy": new}, state.params),
    opt_state=kept({"policy": moved}, state.opt_state),
    skipped=skipped,
    skipped_in_a_row=in_a_row,
    tokens=state.tokens + tokens,
  )
  return new_state, {
    "loss": loss.value(),
    "gradient_norm_policy": norm,
    "skipped": skipped,
    "skipped_in_a_row": in_a_row,
  }


def compile_update(
  update: Update, abstract: TrainState, frozen: Params, mesh: Mesh
) -> Update:
  """An update under jit on a mesh; the state's buffers are donated.

  Args:
    update: see `Update`.
    abstract: shapes of the state.
    frozen: leaves that are not trained, by name of the model.
    mesh: a batch is spread over replica and fsdp.
  """

  def step(state, frozen, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return update(state, frozen, batch)

  held = sharding.shardings(abstract, mesh)
  still = sharding.shardings(frozen, mesh)
  return jax.jit(
    step,
    in_shardings=(held, still, sharding.batch_sharding(mesh)),
    out_shardings=(held, NamedSharding(mesh, P())),
    donate_argnums=(0,),
  )
