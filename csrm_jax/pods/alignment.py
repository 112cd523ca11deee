"""The programs of an alignment recipe, compiled for a machine not here."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csrm_jax import sharding
from csrm_jax.align import agent as agents
from csrm_jax.align import feedback, rollout
from csrm_jax.align import setup as setups
from csrm_jax.align.feedback import Constraint
from csrm_jax.align.ppo import AlignState, Episodes
from csrm_jax.config import Config
from csrm_jax.model import decode, reward
from csrm_jax.model.reward import RewardModel
from csrm_jax.pods import ahead, roofline
from csrm_jax.types import Params

PROGRAMS = ("ppo", "sample")
_STOP = (0,)  # any token: there is no tokenizer to ask


class Program(NamedTuple):
  """An alignment recipe on a machine, before it is compiled.

  Attributes:
    bound: the constraints.
    networks: the models.
    mesh: of described devices.
    state: shapes and places of what an update changes.
    frozen: of the leaves that it only reads.
    episodes: of one update.
    ptx: of the rows to imitate, or None.
  """

  bound: list[Constraint]
  networks: agents.Networks
  mesh: Mesh
  state: AlignState
  frozen: Params
  episodes: Episodes
  ptx: Any

  @property
  def parameters(self) -> tuple[Params, Params]:
    """All models, trained and frozen leaves."""
    return self.state.params, self.frozen

  @property
  def carried(self) -> AlignState:
    """The rest of the state: moments, multipliers, counters."""
    return self.state._replace(params={})


def program(config: Config, devices: list[Any]) -> Program:
  """Shapes and places of a recipe's arrays on described devices.

  Policy and critics have the shapes of `model.size`; no weights are read.

  Raises:
    ValueError: mesh, responses and devices do not go together, or as
      `feedback.constraints`.
  """
  tpu = devices[0].platform == "tpu"
  config = ahead.for_accelerators(config, "pallas" if tpu else "dense")
  align = config.align
  bound = feedback.constraints(config)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  n = align.prompts_per_step * align.samples
  sharding.check_rows(n, align.minibatches, mesh)
  length = align.prompt_length + align.response_length
  policy, _ = reward.make(config.model, row_length=length, language_model=True)
  networks, params = _models(policy, len(bound), config)
  trained, frozen = jax.eval_shape(
    lambda p: agents.split(networks, p, heads_only=setups.heads_only(config)),
    params,
  )
  optimizer = setups.make_optimizers(config)
  state = jax.eval_shape(
    lambda p: setups.first_state(
      p, config=config, optimizer=optimizer, k=len(bound)
    ),
    trained,
  )
  rows = sharding.batch_sharding(mesh)
  state = ahead.placed(state, sharding.shardings(state, mesh))
  frozen = ahead.placed(frozen, sharding.shardings(frozen, mesh))

  def field(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  k, whole = len(bound), jnp.int32
  once = setups.sees_once(config)  # then the update finds them itself
  critics = networks.reward_critic is not None and not once
  ptx = None
  if align.ptx_weight:
    x = align.ptx_rows
    ptx = (field(x, length, dtype=whole), field(x, dtype=whole))
    ptx = (*ptx, field(x, length))
  episodes = Episodes(
    tokens=field(n, length, dtype=whole),
    length=field(n, dtype=whole),
    mask=field(n, length),
    group=field(n, dtype=whole),
    logprobs=None if once else field(n, length),
    reference_logprobs=field(n, length),
    rewards=field(n),
    costs=field(n, k),
    observed=field(n, k),
    reward_values=field(n, length) if critics else None,
    cost_values=field(n, length, k) if critics else None,
  )
  return Program(bound, networks, mesh, state, frozen, episodes, ptx)


def _models(
  policy: RewardModel, k: int, config: Config
) -> tuple[agents.Networks, Params]:
  """Policy and critics, with the shapes of their parameters."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = {"policy": jax.eval_shape(policy.init, key)}
  if config.align.method in setups.WITHOUT_CRITICS:
    return agents.Networks(policy), shapes
  trunk = dataclasses.replace(policy, keep_lm_head=False, lora_rank=0)
  still = setups.heads_only(config)
  model = agents.critic_model(trunk, policy, heads_only=still)

  def critic(key: jax.Array, count: int) -> Params:
    width = trunk.architecture.width
    return agents.critic(
      model,
      trunk.init(key),
      key,
      rows=jnp.zeros((count, width), jnp.float32),
      bias=jnp.zeros(count, jnp.float32),
      heads_only=still,
    )

  for name, count in (("reward_critic", 1), ("cost_critic", k)):
    shapes[name] = jax.eval_shape(lambda key, c=count: critic(key, c), key)
  return agents.Networks(policy, model, model), shapes


def compile_program(config: Config, made: Program, name: str) -> ahead.Compiled:
  """Compiles the update of an alignment run, or its sampling.

  Args:
    config: the recipe.
    made: of `program`.
    name: of PROGRAMS. "sample" decodes all responses of an update at once, of
      a policy whose adapters are merged and whose prompts are of full length.

  Raises:
    DoesNotFit: a chip's memory is too small.
  """
  if name == "ppo":
    # The policy's start gives the KL penalty, before the update.
    policy = dict(made.frozen["policy"])
    start = policy.pop("reference", {})
    made = made._replace(frozen=made.frozen | {"policy": policy})
    lowered, batch = _update(config, made)
    return ahead.finish(
      lowered,
      parameters=made.parameters,
      moments=made.carried,
      batch=batch,
      idle=start,
    )
  if name == "sample":
    lowered, params, batch = _sample(config, made)
    parts = (made.state.params, made.frozen)
    idle = (
      made.carried,
      [{k: v for k, v in p.items() if k != "policy"} for p in parts],
      made.frozen["policy"].get("reference", {}),
    )
    return ahead.finish(
      lowered, parameters=params, moments=(), batch=batch, idle=idle
    )
  raise ValueError(f"--program={name!r}: use one of {', '.join(PROGRAMS)}")


def _update(config: Config, made: Program) -> tuple[Any, Any]:
  """(lowered, its arguments beside the state)."""
  align = config.align
  update: Any = setups.compile_update(
    made.state,
    made.frozen,
    made.mesh,
    agent=agents.make_agent(made.networks, chunk=align.logit_tokens),
    optimizer=setups.make_optimizers(config),
    keywords=setups.update_keywords(config, made.bound),
  )
  n = made.episodes.tokens.shape[0]
  indices = jax.ShapeDtypeStruct(
    (align.epochs * align.minibatches, n // align.minibatches),
    jnp.int32,
    sharding=NamedSharding(made.mesh, P()),
  )
  batch = (made.episodes, indices, made.ptx)
  return update.lower(made.state, made.frozen, *batch), batch


def _sample(config: Config, made: Program) -> tuple[Any, Params, Any]:
  """(lowered, the policy, prompts with their lengths and keys)."""
  align = config.align
  run: Any = rollout._compiled(
    made.networks.policy,
    align.response_length,
    float(align.temperature),
    1.0,  # no nucleus: the policy is the whole distribution
    _STOP,
    made.mesh,
  )
  params = agents.join(made.state.params["policy"], made.frozen["policy"])
  rows = sharding.batch_sharding(made.mesh)
  n = made.episodes.tokens.shape[0]
  keys = jax.eval_shape(
    lambda: decode.row_keys(jax.random.key(0), jnp.arange(n))
  )
  batch = (
    jax.ShapeDtypeStruct((n, align.prompt_length), np.int32, sharding=rows),
    jax.ShapeDtypeStruct((n,), np.int32, sharding=rows),
    jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=rows),
  )
  return run.lower(params, *batch), params, batch


def flops(config: Config, made: Program) -> roofline.Flops:
  """Counts an update: every model forwards and back, once an epoch."""
  n, length = made.episodes.tokens.shape
  models = [m for m in made.networks if m is not None]
  counted = [roofline.passes(m, rows=n, length=length) for m in models]
  counted.append(roofline.vocabulary(models[0], rows=n, length=length))
  epochs = config.align.epochs
  return roofline.Flops(
    *(epochs * sum(part) for part in zip(*counted, strict=True))
  )
