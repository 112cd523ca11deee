"""Attention over token tries: token i sees j when j <= i < subtree_end[j].

"dense" is one masked L x L product. "blocks" is the CPU's path: each block of
queries meets only the blocks of keys on the paths of its tokens, so the work
grows with the depth of the trie and not with the length of the row. "pallas",
the same as TPU kernels, and "causal" are in `trie_attention.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from csrm_jax.types import Indices

KINDS = ("dense", "blocks", "pallas", "causal")

# What the backward pass of "blocks" and "pallas" needs beside its inputs: a
# remat policy that saves these names never runs the forward pass twice.
SAVED = ("attention_out", "attention_lse")

_BLOCK = 64  # tokens; measured best of 32, 64 and 128 on a CPU
MASKED = -1e30  # a logit whose exponential is 0


def attention(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Indices,
  *,
  kind: str,
  mixed: bool = False,
) -> Float[Array, "b l h e"]:
  """Softmax attention of each token over its path to the root of its trie.

  Args:
    q: queries; query head `i` reads key head `i // (h / g)`.
    k: keys.
    v: values.
    subtree_end: one past the last descendant, row indices; `i + 1` for padding.
    kind: "dense" (one masked product; any backend, any sharding), "blocks"
      (one CPU device: skips the blocks that no path reaches), "pallas" (the
      same on TPUs, under any mesh) or "causal" (rows of one sequence each:
      the libraries' kernels; see `trie_attention.causal`).
    mixed: whether the products of "blocks" take bfloat16 operands, with
      float32 sums; the other kinds go by the dtype of their arguments.

  Returns:
    The attended values, in the dtype of `v`; softmax in float32.

  Raises:
    ValueError: if `kind` is none of these.
  """
  if kind == "dense":
    return dense(q, k, v, subtree_end)
  if kind == "blocks":
    return blocks(q, k, v, subtree_end, mixed=mixed)
  if kind not in KINDS:
    raise ValueError(f"attention kind {kind!r}: use one of {KINDS}")
  # Here, as they import this module, and Pallas, which no CPU needs.
  from csrm_jax.model import trie_attention

  if kind == "pallas":
    return trie_attention.pallas(q, k, v, subtree_end)
  return trie_attention.causal(q, k, v, subtree_end)


def visible(subtree_end: Indices) -> Bool[Array, "b l l"]:
  """The mask in full: [b, i, j] is true where token i sees token j."""
  i = jnp.arange(subtree_end.shape[1])
  return (i[None, :, None] >= i) & (i[None, :, None] < subtree_end[:, None, :])


def dense(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Indices,
) -> Float[Array, "b l h e"]:
  """One masked L x L product; memory grows with the square of the row."""
  b, length, h, e = q.shape
  g = k.shape[2]
  grouped = q.reshape(b, length, g, h // g, e)
  logits = jnp.einsum(
    "bigre,bjge->bgrij", grouped, k, preferred_element_type=jnp.float32
  )
  mask = visible(subtree_end)[:, None, None]
  logits = jnp.where(mask, logits * e**-0.5, MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bgrij,bjge->bigre", weights, v).reshape(q.shape)


def blocks(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Indices,
  *,
  block: int = _BLOCK,
  mixed: bool = False,
) -> Float[Array, "b l h e"]:
  """Equals `dense`; skips the key blocks that no path of a query block meets.

  As in FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 4), the
  forward pass keeps the output and the log-sum-exp alone, and the backward
  pass computes the weights again.

  Args:
    q: queries, see `attention`.
    k: keys.
    v: values.
    subtree_end: mask, see `attention`.
    block: tokens in a block of queries and in a block of keys.
    mixed: whether products take bfloat16 operands, with float32 sums.
  """
  b, length = subtree_end.shape
  if length <= 2 * block:  # nothing to skip
    return dense(q, k, v, subtree_end)
  more = -length % block
  ends = jnp.arange(length + 1, length + more + 1, dtype=subtree_end.dtype)
  ends = jnp.broadcast_to(ends, (b, more))
  subtree_end = jnp.concatenate([subtree_end, ends], axis=1)
  # In float32 whatever comes in: CPUs sum bfloat16 products in it anyway.
  padding = ((0, 0), (0, more), (0, 0), (0, 0))
  full = (jnp.pad(x.astype(jnp.float32), padding) for x in (q, k, v))
  out: Array = _blocks(*full, subtree_end, block, mixed)  # pyright: ignore
  return out[:, :length].astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocks(
  q: Array, k: Array, v: Array, subtree_end: Array, block: int, mixed: bool
):
  return _forward(q, k, v, subtree_end, block, mixed)[0]


def _forward(
  q: Array, k: Array, v: Array, subtree_end: Array, block: int, mixed: bool
):
  """Output, and what the backward pass needs; see `_over_tiles` for `tile`."""
  b, length, h, e = q.shape
  g, r = k.shape[2], h // k.shape[2]
  m = r * block  # the queries of a group's heads are rows of one product
  product, operand = _products(mixed)
  keys, values = (operand(_by_head(x, block)) for x in (k, v))

  def tile(row, start, reached, mask, carry):
    out, lse = carry
    query = _rows_of_heads(_tile(q, row, start, block), g) * e**-0.5
    logits = product("gme,gne->gmn", query, _take(keys, row, reached))
    n = logits.shape[-1]
    logits = logits.reshape(g, r, block, n)
    logits = jnp.where(mask.T, logits, MASKED).reshape(g, m, n)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = product("gmn,gne->gme", weights, _take(values, row, reached))
    y = _heads_of_rows(y / total, block)
    tops = (top + jnp.log(total)).reshape(1, 1, g, m)
    return (
      lax.dynamic_update_slice(out, y[None], (row, start, 0, 0)),
      lax.dynamic_update_slice(lse, tops, (row, start // block, 0, 0)),
    )

  lse = jnp.zeros((b, length // block, g, m))
  out, lse = _over_tiles(subtree_end, block, tile, (jnp.zeros_like(q), lse))
  out = checkpoint_name(out, SAVED[0])
  lse = checkpoint_name(lse, SAVED[1])
  return out, (q, k, v, subtree_end, out, lse)


def _backward(
  block: int, mixed: bool, saved: tuple[Array, ...], cotangent: Array
):
  """Gradients of q, k, v. Logits stand as [keys, queries] here.

  In that order four of the five products take their operands as they lie in
  memory; the fifth, of the query gradient, reads transposed keys.
  """
  q, k, v, subtree_end, out, lse = saved
  b, length, h, e = q.shape
  g, m = k.shape[2], h // k.shape[2] * block
  product, operand = _products(mixed)
  keys, values = (operand(_by_head(x, block)) for x in (k, v))
  keys_turned = keys.swapaxes(-1, -2)  # [b g blocks e block]

  def tile(row, start, reached, mask, carry):
    dq, dk, dv = carry
    query = _rows_of_heads(_tile(q, row, start, block), g) * e**-0.5
    dy = _rows_of_heads(_tile(cotangent, row, start, block), g)
    y = _rows_of_heads(_tile(out, row, start, block), g)
    inner = jnp.sum(dy * y, axis=-1)[:, None]  # [g 1 m]
    tops = lax.dynamic_slice(lse, (row, start // block, 0, 0), (1, 1, g, m))
    logits = product("gne,gme->gnm", _take(keys, row, reached), query)
    n = logits.shape[1]
    weights = jnp.exp(logits - tops.reshape(g, 1, m))
    weights = weights.reshape(g, n, m // block, block)
    weights = jnp.where(mask[:, None], weights, 0.0).reshape(g, n, m)
    more_dv = product("gnm,gme->gne", weights, dy)
    slope = product("gne,gme->gnm", _take(values, row, reached), dy)
    slope = weights * (slope - inner)
    more_dk = product("gnm,gme->gne", slope, query)
    turned = _take_turned(keys_turned, row, reached)
    # Else the transpose would be folded into the product: no fast kernel.
    dquery = lax.optimization_barrier(product("gen,gnm->gem", turned, slope))
    dquery = dquery.swapaxes(1, 2)
    dquery = _heads_of_rows(dquery * e**-0.5, block)
    dq = lax.dynamic_update_slice(dq, dquery[None], (row, start, 0, 0))

    def add(t, carry):
      place = (row, 0, reached[t] * block, 0)
      size = (1, g, block, e)
      return tuple(
        lax.dynamic_update_slice(
          total,
          lax.dynamic_slice(total, place, size)
          + lax.dynamic_slice(part[None], (0, 0, t * block, 0), size),
          place,
        )
        for total, part in zip(carry, (more_dk, more_dv), strict=True)
      )

    dk, dv = lax.fori_loop(0, reached.shape[0], add, (dk, dv))
    return dq, dk, dv

  zeros = jnp.zeros((b, g, length, e))
  dq, dk, dv = _over_tiles(
    subtree_end, block, tile, (jnp.zeros_like(q), zeros, zeros)
  )
  return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2), None


_blocks.defvjp(_forward, _backward)


def _products(mixed: bool) -> tuple[Callable[..., Array], Callable[..., Array]]:
  """An einsum with float32 sums, and how it takes its operands."""

  def operand(x: Array) -> Array:
    return x.astype(jnp.bfloat16) if mixed else x

  def product(terms: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
      terms, operand(a), operand(b), preferred_element_type=jnp.float32
    )

  return product, operand


def reached_blocks(subtree_end: Indices, block: int) -> Bool[Array, "b c c"]:
  """[b, i, j]: whether a query of block i sees a key of block j."""
  b, length = subtree_end.shape
  count = length // block
  first = jnp.arange(length) // block
  last = (subtree_end - 1) // block
  i = jnp.arange(count)[:, None]
  seen = (first <= i) & (i <= last[:, None, :])
  return jnp.any(seen.reshape(b, count, count, block), axis=-1)


def _over_tiles(
  subtree_end: Indices,
  block: int,
  tile: Callable[..., Any],
  carry: Any,
) -> Any:
  """Folds `tile` over all query blocks, each with the key blocks it needs.

  The number of needed key blocks is data, but a product has static shapes: so
  there is one loop for each of a few sizes, over the query blocks that need
  that many or fewer, with a trip count known only on the device. (A
  conditional in one loop would copy the gradients that it carries.)

  Args:
    subtree_end: mask, see `attention`.
    block: tokens in a block.
    tile: maps (row, first query, key blocks [c], mask [c * block, block],
      carry) to carry. Surplus key blocks repeat others and are masked.
    carry: what goes into the first call.
  """
  b, length = subtree_end.shape
  count = length // block
  needed = reached_blocks(subtree_end, block).reshape(b * count, count)
  columns = jnp.argsort(~needed, axis=-1, stable=True)  # needed ones first
  many = jnp.sum(needed, axis=-1)
  sizes = _sizes(count)
  size_of = jnp.searchsorted(jnp.array(sizes), many)
  order = jnp.argsort(size_of)

  def body(t, carry, size: int):
    row, start = order[t] // count, order[t] % count * block
    reached = columns[order[t], :size]
    key = reached[:, None] * block + jnp.arange(block)
    end = lax.dynamic_index_in_dim(subtree_end, row, 0, keepdims=False)[key]
    end = jnp.where(jnp.arange(size)[:, None] < many[order[t]], end, 0)
    key, end = key.reshape(-1, 1), end.reshape(-1, 1)
    query = start + jnp.arange(block)
    mask = (key <= query) & (query < end)
    return tile(row, start, reached, mask, carry)

  low = 0
  for i, size in enumerate(sizes):
    high = jnp.sum(size_of <= i)
    step = functools.partial(body, size=size)
    carry = lax.fori_loop(low, high, step, carry)
    low = high
  return carry


def _sizes(count: int) -> list[int]:
  """Numbers of key blocks compiled for: steps of 2, then of about a third."""
  sizes = [2]
  while sizes[-1] < count:
    last = sizes[-1]
    sizes.append(last + (2 if last < 12 else (last // 3 + 3) // 4 * 4))
  return [*sizes[:-1], count]


def _by_head(x: Array, block: int) -> Array:
  """[b l g e] -> [b g blocks block e]."""
  b, length, g, e = x.shape
  return x.swapaxes(1, 2).reshape(b, g, length // block, block, e)


def _take(x: Array, row: Array, reached: Array) -> Array:
  """The reached blocks of one row, joined: [g c*block e]."""
  x = lax.dynamic_index_in_dim(x, row, 0, keepdims=False)
  return x[:, reached].reshape(x.shape[0], -1, x.shape[-1])


def _take_turned(x: Array, row: Array, reached: Array) -> Array:
  """As `_take`, from blocks whose last axes are swapped: [g e c*block]."""
  x = lax.dynamic_index_in_dim(x, row, 0, keepdims=False)
  return x[:, reached].swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _tile(x: Array, row: Array, start: Array, block: int) -> Array:
  """The queries of one block: [block h e]."""
  size = (1, block, *x.shape[2:])
  return lax.dynamic_slice(x, (row, start, 0, 0), size)[0]


def _rows_of_heads(x: Array, g: int) -> Array:
  """[i h e] -> [g r*i e]: the heads of one key group below each other."""
  i, h, e = x.shape
  x = x.reshape(i, g, h // g, e)
  return x.transpose(1, 2, 0, 3).reshape(g, -1, e)


def _heads_of_rows(x: Array, block: int) -> Array:
  """Undoes `_rows_of_heads`."""
  g, _, e = x.shape
  x = x.reshape(g, -1, block, e)
  return x.transpose(2, 0, 1, 3).reshape(block, -1, e)
