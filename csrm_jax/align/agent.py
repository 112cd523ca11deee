"""Policy and critics of an alignment run: models, parameters, functions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from csrm_jax.align.ppo import Agent
from csrm_jax.model import lora, reward
from csrm_jax.model.decode import chains, token_logprobs
from csrm_jax.model.names import flatten, unflatten
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Params


class Networks(NamedTuple):
  """The static part of the models, by the names of `ppo.MODELS`."""

  policy: RewardModel
  reward_critic: Any = None  # RewardModel, if the method has critics
  cost_critic: Any = None


def values(
  model: RewardModel,
  params: Params,
  tokens: Int[Array, "n l"],
  length: Int[Array, " n"],
) -> Float[Array, "n l k"]:
  """A critic's estimates before each token, one for each row of its head.

  The value at token t is read off the state of token t - 1; at t = 0, where
  nothing was seen, it is 0.
  """
  hidden = model.hidden(params, chains(tokens, length)).astype(jnp.float32)
  head = params["head"]
  seen = jnp.einsum("nld,kd->nlk", hidden[:, :-1], head["kernel"])
  return jnp.pad(seen + head["bias"], ((0, 0), (1, 0), (0, 0)))


def critic_model(
  trunk: RewardModel, policy: RewardModel, *, heads_only: bool = False
) -> RewardModel:
  """A critic on a judge's trunk, trained and computed as the policy is.

  Without adapters if only its head is trained.
  """
  same = (
    "lora_rank",
    "lora_alpha",
    "train_layers",
    "remat",
    "dtype",
    "attention",
  )
  shared = {name: getattr(policy, name) for name in same}
  if shared["train_layers"] > trunk.architecture.layers:
    shared["train_layers"] = -1  # it has fewer than the policy trains
  if heads_only:
    shared["lora_rank"] = 0
  return dataclasses.replace(trunk, head="linear", **shared)


def critic(
  model: RewardModel,
  params: Params,
  key: jax.Array,
  *,
  rows: Float[Array, "k d"],
  bias: Float[Array, " k"],
  alpha: float = 1.0,
  heads_only: bool = False,
) -> Params:
  """Parameters of a critic that starts as the model whose score it foretells.

  Args:
    model: of `critic_model`.
    params: of the judge that gives the trunk.
    key: of the adapters.
    rows: of the head, one for each value.
    bias: of each value.
    alpha: of the judge's adapters, which are merged.
    heads_only: whether the trunk stays the judge's own.
  """
  trunk = reward.recut(model, params, key, alpha=alpha)
  if not model.lora_rank and not heads_only:
    # An update gives up what it trains; not the judge's.
    trunk = jax.tree.map(jnp.array, trunk)
  head = {"kernel": jnp.array(rows), "bias": jnp.array(bias)}
  return trunk | {"head": head}


def split(
  networks: Networks, params: Params, *, heads_only: bool = False
) -> tuple[Params, Params]:
  """(trained, frozen) leaves of all models, by name.

  The policy's frozen leaves hold its start as "reference" where it is trained
  in full; with adapters, the start is the policy without them. With
  `heads_only`, critics' trunks are frozen.
  """
  trained, frozen = {}, {}
  for name in params:
    model: RewardModel = getattr(networks, name)
    trained[name], frozen[name] = model.split(params[name])
    if name != "policy" and heads_only:
      head = {"head": params[name]["head"]}
      rest = {k: v for k, v in params[name].items() if k != "head"}
      trained[name], frozen[name] = head, rest
    if name == "policy":
      # Its score row is of no use; out of the trained leaves, no moments.
      frozen[name]["head"] = trained[name].pop("head")
      if not model.lora_rank:
        frozen[name]["reference"] = jax.tree.map(jnp.array, trained[name])
  return trained, frozen


def join(trained: Params, frozen: Params) -> Params:
  """Parameters of one model out of its two parts."""
  rest = {k: v for k, v in frozen.items() if k != "reference"}
  return unflatten(flatten(trained) | flatten(rest))


def reference(trained: Params, frozen: Params) -> Params:
  """Parameters of the policy before any update, from its two parts."""
  if "reference" in frozen:
    return join(frozen["reference"], frozen)
  flat = flatten(trained)
  still = {
    k: jnp.zeros_like(v) if k.split("/")[-1] == lora.LEAVES[1] else v
    for k, v in flat.items()
  }
  return join(unflatten(still), frozen)


def make_agent(
  networks: Networks, *, chunk: int, temperature: float = 1.0
) -> Agent:
  """The functions of an update, over (trained, frozen) leaves.

  Args:
    networks: the models.
    chunk: tokens of each row whose logits are held at a time.
    temperature: that responses are sampled at; the policy is the model's
      distribution at this temperature, and so is its reference.
  """

  def logprobs(trained, frozen, tokens, length):
    params = join(trained, frozen)
    return token_logprobs(
      networks.policy,
      params,
      tokens,
      length,
      chunk=chunk,
      temperature=temperature,
    )

  def reward_values(trained, frozen, tokens, length):
    params, model = join(trained, frozen), networks.reward_critic
    return values(model, params, tokens, length)[..., 0]

  def cost_values(trained, frozen, tokens, length):
    params, model = join(trained, frozen), networks.cost_critic
    return values(model, params, tokens, length)

  return Agent(logprobs, reward_values, cost_values)


def estimates(
  agent: Agent,
  trained: Params,
  frozen: Params,
  tokens: Int[Array, "n l"],
  length: Int[Array, " n"],
  *,
  once: bool = False,
) -> dict[str, Any]:
  """Fields of `Episodes` that the models give, before an update.

  Args:
    agent: the models.
    trained: leaves, by name of the model.
    frozen: leaves, likewise.
    tokens: rows.
    length: of each, tokens.
    once: whether the update sees all rows once: it then finds all but the
      reference's log-probabilities itself, and they are None.
  """
  start = reference(trained["policy"], frozen["policy"])
  found: dict[str, Any] = {
    "logprobs": None,
    "reference_logprobs": agent.logprobs({}, start, tokens, length)[0],
  }
  if once:
    return found
  parts = {n: (trained[n], frozen[n], tokens, length) for n in trained}
  found["logprobs"] = agent.logprobs(*parts["policy"])[0]
  if "reward_critic" in trained:
    found["reward_values"] = agent.reward_values(*parts["reward_critic"])
    found["cost_values"] = agent.cost_values(*parts["cost_critic"])
  return found
