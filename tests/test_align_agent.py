"""align/agent.py: what critics start as, and what of them is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from csrm_jax.align import agent as agents
from csrm_jax.model import reward
from csrm_jax.model.decode import chains
from csrm_jax.model.names import flatten

TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
LENGTH = jnp.array([12, 9], jnp.int32)


def models(rank, layers=-1):
  config = tiny.get_config().model
  config.train_layers = layers
  config.lora_rank, config.lora_alpha = rank, 32.0
  policy, load = reward.make(config, vocab_size=64, language_model=True)
  return policy, load


def judge_of(policy, load, rank):
  """A judge whose adapters say something, as after training."""
  judge = dataclasses.replace(policy, lora_rank=rank, keep_lm_head=False)
  params = load(jax.random.key(1))
  params = judge.with_adapters(params, jax.random.key(2))
  flat = flatten(params)
  keys = jax.random.split(jax.random.key(3), len(flat))
  flat |= {
    k: 0.1 * jax.random.normal(key, flat[k].shape)
    for k, key in zip(flat, keys, strict=True)
    if k.endswith("lora_b")
  }
  return judge, agents.unflatten(flat)


@pytest.mark.parametrize("heads_only", [False, True])
@pytest.mark.parametrize(
  "rank, its_rank, layers", [(4, 4, -1), (4, 0, 1), (0, 4, -1), (0, 4, 1)]
)
def test_a_critic_starts_as_the_judge_it_comes_from(
  rank, its_rank, layers, heads_only
):
  policy, load = models(rank, layers)
  judge, params = judge_of(policy, models(0)[1], its_rank)
  model = agents.critic_model(judge, policy, heads_only=heads_only)
  width = judge.architecture.width
  rows = jax.random.normal(jax.random.key(4), (3, width))
  bias = jnp.array([0.0, 1.0, -1.0])
  made = agents.critic(
    model,
    params,
    jax.random.key(5),
    rows=rows,
    bias=bias,
    alpha=judge.lora_alpha,
    heads_only=heads_only,
  )
  found = agents.values(model, made, TOKENS, LENGTH)
  hidden = judge.hidden(params, chains(TOKENS, LENGTH))
  wanted = hidden.astype(jnp.float32)[:, :-1] @ rows.T + bias
  np.testing.assert_allclose(found[:, 1:], wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(found[:, 0], 0.0)

  networks = agents.Networks(policy, model, model)
  start = load(jax.random.key(0))
  each = {"policy": start, "reward_critic": made, "cost_critic": made}
  trained, frozen = agents.split(networks, each, heads_only=heads_only)
  leaves = set(flatten(trained["cost_critic"]))
  assert {"head/kernel", "head/bias"} <= leaves
  assert (leaves == {"head/kernel", "head/bias"}) == heads_only
  # As many layers of the critic are trained as of the policy.
  both = (trained["policy"], trained["cost_critic"])
  counts = [
    {len(v) for k, v in flatten(p).items() if k.startswith("upper/")}
    for p in both
  ]
  assert counts[0] == {judge.architecture.layers if layers < 0 else layers}
  assert counts[1] == (set() if heads_only else counts[0])
  whole = agents.join(trained["cost_critic"], frozen["cost_critic"])
  np.testing.assert_allclose(
    agents.values(model, whole, TOKENS, LENGTH), found, rtol=1e-6
  )
