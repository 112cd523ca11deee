"""Supervised fine-tuning: the policy imitates given responses.

What reinforcement learning cannot find, as the policy never says it, has to be
shown first: Safe RLHF (arXiv:2310.12773) starts from such a policy, too.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from csrm_jax import sharding
from csrm_jax.align import descent, losses
from csrm_jax.align.ppo import Agent, Metrics
from csrm_jax.align.setup import Setup
from csrm_jax.types import Mean, Params, TrainState

# (tokens, length, mask of what to imitate).
Batch = tuple[Int[Array, "x l"], Int[Array, " x"], Float[Array, "x l"]]


def update(
  state: TrainState,
  frozen: Params,
  batch: Batch,
  *,
  agent: Agent,
  optimizers: Mapping[str, optax.GradientTransformation],
) -> tuple[TrainState, Metrics]:
  """One step down the negative log-likelihood of responses, nats a token.

  Args:
    state: trained leaves, as {"policy": ...}.
    frozen: leaves that are not trained, likewise.
    batch: see there.
    agent: the model.
    optimizers: of the policy, by its name.

  Returns:
    New state; the metrics of `descent.descend`, and length (tokens).
  """
  tokens, length, mask = batch

  def loss_of(trained: Params) -> tuple[Array, Mean]:
    known, _ = agent.logprobs(trained, frozen["policy"], tokens, length)
    loss = losses.nll(known, mask)
    return loss.value(), loss

  (_, loss), gradient = jax.value_and_grad(loss_of, has_aux=True)(
    state.params["policy"]
  )
  new, metrics = descent.descend(
    state, gradient, loss, optimizers, tokens=jnp.sum(mask)
  )
  return new, metrics | {"length": jnp.mean(jnp.sum(mask, axis=1))}


def prepare(setup: Setup, optimizers: Any, state: TrainState) -> Any:
  """Returns the step of the loop in `run.py`."""
  rows = setup.imitated
  assert rows is not None  # `set_up` sees to it
  shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  run = descent.compile_update(
    functools.partial(update, agent=setup.agent, optimizers=optimizers),
    shape,
    setup.frozen,
    setup.mesh,
  )
  spread = sharding.batch_sharding(setup.mesh)

  def advance(state: TrainState, k: int) -> tuple[TrainState, dict[str, float]]:
    began = time.perf_counter()
    state, measured = run(state, setup.frozen, jax.device_put(rows(k), spread))
    line = {name: float(x) for name, x in measured.items()}
    line["seconds_update"] = time.perf_counter() - began
    return state, line

  return advance
