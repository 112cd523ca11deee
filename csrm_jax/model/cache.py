"""Reading tokens after those whose keys and values are already held."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from csrm_jax import sharding
from csrm_jax.model.attention import MASKED
from csrm_jax.model.backbone import Block, rope_table
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Params

STACKS = ("lower", "upper")


class Cache(NamedTuple):
  """Keys and values of all layers, turned to their positions."""

  keys: Float[Array, "c n g s e"]  # c layers, g key heads, s slots
  values: Float[Array, "c n g s e"]


def empty(model: RewardModel, rows: int) -> Cache:
  """A cache without slots: nothing was read yet."""
  a = model.architecture
  dtype = "float32" if model.dtype == "mixed" else model.dtype
  none = jnp.zeros((a.layers, rows, a.kv_heads, 0, a.head_dim), dtype)
  return Cache(none, none)


def extend(
  model: RewardModel,
  params: Params,
  tokens: Int[Array, "n m"],
  positions: Int[Array, "n m"],
  visible: Bool[Array, "n m t"],
  past: Cache,
) -> tuple[Float[Array, "n m d"], Cache]:
  """Reads tokens after those of a cache; one scan over the layers.

  Args:
    model: static choices; its kind of attention is not used, the product is
      one of all tokens and slots.
    params: of the model, adapters or none.
    tokens: to be read.
    positions: of these tokens in their sequences, from 0.
    visible: which slots of the cache, then which of these tokens, each sees
      (t = s + m).
    past: keys and values of what came before.

  Returns:
    (states before the final norm, keys and values of these tokens alone).
  """
  x = model._embed(params, tokens)
  shape = x.shape
  flat = x.reshape(-1, shape[-1])
  rope = rope_table(model.architecture, positions)
  added, first = [], 0
  for stack in (params[name] for name in STACKS if name in params):
    graph, scale = block_of(model, stack)
    count = jax.tree.leaves(stack)[0].shape[0]
    old = Cache(*(c[first : first + count] for c in past))
    first += count

    def layer(
      x: Array, scanned: tuple[Params, Cache], graph=graph, scale=scale
    ):
      block = nnx.merge(graph, scanned[0])
      q, new = project(block, x, rope, scale)
      keys, values = (
        jnp.concatenate(pair, axis=2)
        for pair in zip(scanned[1], new, strict=True)
      )
      y = finish(block, x, attend(q, keys, values, visible), scale)
      return sharding.keep_rows(y), new

    flat, new = lax.scan(layer, flat, (stack, old))
    added.append(new)
  parts = zip(*added, strict=True)
  return flat.reshape(shape), Cache(*(jnp.concatenate(p) for p in parts))


def block_of(model: RewardModel, stack: Params) -> tuple[Any, float]:
  """The graph of one layer of a stack, and the scale of its adapters."""
  query = stack["attention"]["query"]
  rank = query["lora_a"].shape[-1] if "lora_a" in query else 0
  mixed = model.dtype == "mixed"
  graph, _ = nnx.split(
    nnx.eval_shape(lambda: Block(model.architecture, rank=rank, mixed=mixed))
  )
  return graph, model.lora_alpha / rank if rank else 0.0


def project(
  block: Block, x: Array, rope: Any, scale: float
) -> tuple[Array, tuple[Array, Array]]:
  """Queries [n m h e]; keys and values [n g m e]."""
  normed = block.attention_norm(x)
  q, k, v = block.attention.project(normed, rope, lora_scale=scale)
  return q, (k.swapaxes(1, 2), v.swapaxes(1, 2))


def finish(block: Block, x: Array, y: Array, scale: float) -> Array:
  """The rest of a layer once its tokens have attended."""
  y = y.reshape(x.shape[0], -1)
  x = x + block.attention.out(y, lora_scale=scale)
  return x + block.mlp(block.mlp_norm(x), lora_scale=scale)


def attend(
  q: Float[Array, "n m h e"],
  keys: Float[Array, "n g s e"],
  values: Float[Array, "n g s e"],
  visible: Bool[Array, "n m s"],
) -> Float[Array, "n m h e"]:
  """Softmax attention over slots; softmax in float32."""
  n, m, h, e = q.shape
  g = keys.shape[1]
  grouped = q.reshape(n, m, g, h // g, e)
  logits = jnp.einsum(
    "nmgre,ngse->ngrms", grouped, keys, preferred_element_type=jnp.float32
  )
  mask = visible[:, None, None]
  logits = jnp.where(mask, logits * e**-0.5, MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
  return jnp.einsum("ngrms,ngse->nmgre", weights, values).reshape(q.shape)
