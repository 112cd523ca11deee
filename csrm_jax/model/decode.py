"""Sampling with a key-value cache, and the log-probability of what was said.

Rows are padded on the right. Keys of generated tokens lie behind the longest
prompt, in one slot for all rows; what a row may see is a mask, and positions
follow its own length, so the gap between its prompt and there is never read.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from csrm_jax import sharding
from csrm_jax.model import lora
from csrm_jax.model.backbone import rope_table
from csrm_jax.model.cache import (
  STACKS,
  attend,
  block_of,
  empty,
  extend,
  finish,
  project,
)
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Batch, Indices, Params

# A bit pattern above that of 1.0; those of floats from 0 up are in their order.
_ABOVE_ONE = 0x3F800001


class Generated(NamedTuple):
  """Prompts and what followed them.

  Attributes:
    tokens: of each row its prompt, its response, padding.
    length: of prompt and response, the stop token included; tokens.
    stopped: whether the response ended in a stop token, not in want of room.
  """

  tokens: Int[Array, "n l"]
  length: Int[Array, " n"]
  stopped: Bool[Array, " n"]


# -- Sampling --------------------------------------------------------------


def row_keys(
  key: jax.Array, rows: Int[np.ndarray, " n"] | Int[Array, " n"]
) -> Key[Array, " n"]:
  """A key for each row id, whatever other rows there are."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows))


def nucleus(
  probabilities: Float[Array, "n v"], top_p: float
) -> Bool[Array, "n v"]:
  """The fewest most likely tokens whose mass reaches `top_p`; ties all stay.

  Source: Holtzman et al. 2020 (arXiv:1904.09751), eq. 2. The least probability
  that stays is found by halving an interval of bit patterns, exactly and
  without sorting a vocabulary.
  """
  bits = lax.bitcast_convert_type(probabilities, jnp.int32)

  def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = low + (high - low) // 2
    above = jnp.where(bits >= middle, probabilities, 0.0)
    enough = jnp.sum(above, axis=-1, keepdims=True) >= top_p
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low = jnp.zeros((bits.shape[0], 1), jnp.int32)
  low, _ = lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, _ABOVE_ONE)))
  return bits >= low


def choose(
  logits: Float[Array, "n v"],
  keys: Key[Array, " n"],
  *,
  temperature: float,
  top_p: float,
) -> Int[Array, " n"]:
  """The next token of each row, by its own key; the likeliest one at 0.

  Args:
    logits: float32.
    keys: one a row; each is used once.
    temperature: logits are divided by it; 0 takes the largest.
    top_p: see `nucleus`, after the temperature; 1 leaves all tokens in.
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_p < 1:
    kept = nucleus(jax.nn.softmax(logits, axis=-1), top_p)
    logits = jnp.where(kept, logits, -jnp.inf)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
  return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def generate(
  model: RewardModel,
  params: Params,
  prompts: Int[Array, "n p"] | Int[np.ndarray, "n p"],
  lengths: Int[Array, " n"] | Int[np.ndarray, " n"],
  keys: Key[Array, " n"],
  *,
  max_new: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  stop_ids: Sequence[int] = (),
  pad_id: int = 0,
) -> Generated:
  """Continues every prompt until a stop token or for `max_new` tokens.

  For use under `jax.jit`: shapes depend on those of `prompts` and on `max_new`
  alone, and the loop ends once all rows have stopped. A row depends on its
  prompt and its key only, but for the rounding of products of another size.
  Adapters are merged first.

  Args:
    model: with an output embedding (tied, or `keep_lm_head`).
    params: of the model.
    prompts: ids, padded on the right.
    lengths: of the prompts, tokens, at least 1.
    keys: one a row, see `row_keys`.
    max_new: most tokens of a response, the stop token included.
    temperature: see `choose`.
    top_p: see `choose`.
    stop_ids: tokens that end a response.
    pad_id: what stands behind a response.

  Raises:
    ValueError: options out of range, or rows longer than the context.
  """
  prompts, lengths = jnp.asarray(prompts), jnp.asarray(lengths)
  n, p = prompts.shape
  _check(model, p, max_new, temperature, top_p)
  params = lora.merge(params, model.lora_alpha)
  model = dataclasses.replace(model, lora_rank=0)
  dtype = "bfloat16" if model.dtype == "mixed" else model.dtype
  output = model._output(params).astype(dtype)
  stops = jnp.asarray(tuple(stop_ids), jnp.int32)

  def pick(states: Float[Array, "n d"], t: Any) -> Array:
    hidden = model._final_norm(params, states)
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
    logits = model._to_logits(output, hidden)
    return choose(logits, step_keys, temperature=temperature, top_p=top_p)

  index = jnp.broadcast_to(jnp.arange(p), (n, p))
  causal = jnp.broadcast_to(jnp.tri(p, dtype=bool), (n, p, p))
  x, cache = extend(model, params, prompts, index, causal, empty(model, n))
  last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
  token = pick(last, 0)

  layers = _unrolled(params, dtype)
  room = ((0, 0), (0, 0), (0, max_new), (0, 0))
  caches = [
    tuple(sharding.keep_rows(jnp.pad(part[i], room)) for part in cache)
    for i in range(len(layers))
  ]
  graph, _ = block_of(model, layers[0])
  said = jnp.full((n, max_new), pad_id, jnp.int32).at[:, 0].set(token)
  stopped = jnp.isin(token, stops)
  slots = jnp.arange(p + max_new)

  def more(carry: Any) -> Array:
    t, _, _, stopped, _, _ = carry
    return (t < max_new) & ~jnp.all(stopped)

  def step(carry: Any) -> Any:
    t, token, said, stopped, count, caches = carry
    slot = p + t - 1  # where the last token's keys go
    x = model._embed(params, token[:, None])[:, 0]
    rope = rope_table(model.architecture, (lengths + t - 1)[:, None])
    seen = (slots < lengths[:, None]) | ((slots >= p) & (slots <= slot))
    new_caches = []
    for layer, held in zip(layers, caches, strict=True):
      block = nnx.merge(graph, layer)
      q, new = project(block, x, rope, 0.0)
      keys, values = (
        lax.dynamic_update_slice(c, one, (0, 0, slot, 0))
        for c, one in zip(held, new, strict=True)
      )
      y = attend(q, keys, values, seen[:, None])
      x = sharding.keep_rows(finish(block, x, y, 0.0))
      new_caches.append((keys, values))
    token = jnp.where(stopped, pad_id, pick(x, t))
    said = lax.dynamic_update_slice(said, token[:, None], (0, t))
    count = count + ~stopped
    stopped = stopped | jnp.isin(token, stops)
    return t + 1, token, said, stopped, count, new_caches

  count = jnp.ones(n, jnp.int32)
  start = (jnp.int32(1), token, said, stopped, count, caches)
  _, _, said, stopped, count, _ = lax.while_loop(more, step, start)
  return _join(prompts, lengths, said, stopped, count, pad_id)


def _check(
  model: RewardModel, p: int, max_new: int, temperature: float, top_p: float
) -> None:
  if max_new < 1:
    raise ValueError(f"max_new = {max_new}: use 1 token or more")
  if temperature < 0:
    raise ValueError(f"temperature = {temperature}: use 0 (greedy) or more")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p = {top_p}: use a probability above 0, up to 1")
  context = model.architecture.context
  if p + max_new > context:
    raise ValueError(
      f"prompts of {p} and responses of {max_new} tokens exceed the context of"
      f" the backbone, {context}: shorten one of them"
    )
  model.architecture.check_row_length(p + max_new)


def _unrolled(params: Params, dtype: str) -> list[Params]:
  """Parameters of each layer; cut, and kernels cast, here, not once a token."""

  def cut(path: Any, x: Array, i: int) -> Array:
    return x[i].astype(dtype) if path[-1].key == "kernel" else x[i]

  layers = []
  for stack in (params[name] for name in STACKS if name in params):
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
      layers.append(
        jax.tree_util.tree_map_with_path(functools.partial(cut, i=i), stack)
      )
  return layers


def _join(
  prompts: Array,
  lengths: Array,
  said: Array,
  stopped: Array,
  count: Array,
  pad_id: int,
) -> Generated:
  """Moves each response to the end of its own prompt."""
  p, max_new = prompts.shape[1], said.shape[1]
  index = jnp.arange(p + max_new)
  length = lengths + count
  later = jnp.clip(index - lengths[:, None], 0, max_new - 1)
  response = jnp.take_along_axis(said, later, axis=1)
  prompts = jnp.pad(prompts, ((0, 0), (0, max_new)))
  tokens = jnp.where(index < lengths[:, None], prompts, response)
  tokens = jnp.where(index < length[:, None], tokens, pad_id)
  return Generated(tokens.astype(jnp.int32), length, stopped)


# -- Log-probabilities -----------------------------------------------------


def token_logprobs(
  model: RewardModel,
  params: Params,
  tokens: Indices,
  length: Int[Array, " b"] | Int[np.ndarray, " b"],
  *,
  chunk: int = 128,
  temperature: float = 1.0,
) -> tuple[Float[Array, "b l"], Float[Array, "b l"]]:
  """log p(token | those before it) and the entropy it was drawn with, nats.

  Both float32, differentiable; 0 at the first token and at padding, which has
  no part in any gradient.

  Args:
    model: with an output embedding (tied, or `keep_lm_head`).
    params: of the model.
    tokens: rows of one sequence each, padded on the right.
    length: of the sequences, tokens.
    chunk: tokens of each row whose logits are held at a time; they are
      computed again in the backward pass.
    temperature: of p, above 0: logits are divided by it.

  Raises:
    ValueError: chunk below 1, or no such temperature.
  """
  if chunk < 1:
    raise ValueError(f"chunk = {chunk}: use 1 token or more")
  if not temperature > 0:
    raise ValueError(f"temperature = {temperature}: use one above 0")
  b, many = tokens.shape
  batch = chains(tokens, length)
  real = batch.positions < jnp.asarray(length)[:, None]
  x = model.hidden(params, batch)
  x, targets = x[:, :-1], batch.tokens[:, 1:]
  more = -(many - 1) % chunk
  x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, more)))

  @jax.checkpoint
  def read(x: Array, targets: Array) -> tuple[Array, Array]:
    logits = model._vocabulary(params, x) / temperature
    mass = jax.nn.logsumexp(logits, axis=-1)
    said = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    weights = jnp.exp(logits - mass[..., None])
    return said - mass, mass - jnp.sum(weights * logits, axis=-1)

  def chunked(x: Array) -> Array:
    return x.reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

  _, parts = lax.scan(
    lambda carry, part: (carry, read(*part)),
    None,
    (chunked(x), chunked(targets)),
  )
  logprobs, entropy = (
    jnp.pad(
      jnp.where(
        real[:, 1:], part.swapaxes(0, 1).reshape(b, -1)[:, : many - 1], 0
      ),
      ((0, 0), (1, 0)),
    )
    for part in parts
  )
  return logprobs, entropy


def chains(
  tokens: Indices, length: Int[Array, " b"] | Int[np.ndarray, " b"]
) -> Batch:
  """A batch of plain sequences, one readout each, nothing labelled.

  Args:
    tokens: rows of one sequence each, padded on the right; what the padding
      holds is not looked at.
    length: of the sequences, tokens.
  """
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  ends = jnp.asarray(length)[:, None]
  real = index < ends
  none = jnp.zeros((tokens.shape[0], 1), jnp.float32)
  slot = jnp.zeros((tokens.shape[0], 1), jnp.int32)
  return Batch(
    tokens=jnp.where(real, jnp.asarray(tokens), 0),
    positions=index,
    subtree_end=jnp.where(real, ends, index + 1),
    readout=slot,
    label=none,
    label_weight=none,
    pair=jnp.zeros((tokens.shape[0], 1, 2), jnp.int32),
    pair_kind=slot,
    pair_weight=none,
    pair_margin=none,
  )
