"""Pallas TPU kernels of attention over token tries, forward and backward.

One step of a kernel is a visit: a block of queries meets a block of keys that
one of them sees. `trie_passes.py` lists the visits and calls the kernels.

Layouts: the `r` query heads of a key head are rows of one product, so a block
of queries is [m, e] with m = r * block, head-major. Logits stand as [keys,
queries]: sums over keys run down the sublanes, and what belongs to a query is
a row [1, m], of which a TPU fills every lane.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from csrm_jax.model.attention import MASKED

BITS = 16  # of a block's number: a visit is two of them in one int32


def forward_kernel(
  listed, counts, ends, q, k, v, out, lse, top, total, sums, *, block, longest
):
  (i, j), start, active, finish = _visit(listed, counts, longest)

  @pl.when(start)
  def _():
    top[...] = jnp.full(top.shape, MASKED, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

  @pl.when(active)
  def _():
    logits = _logits(q[...], k[...], ends[...], i, j, block)
    # A query that sees nothing of this block gathers finite nonsense, which
    # its first key wipes out: every query sees itself, so there is one.
    higher = jnp.maximum(top[...], jnp.max(logits, axis=0, keepdims=True))
    weights = jnp.exp(logits - higher)
    shrink = jnp.exp(top[...] - higher)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
    more = _product(v[...], weights.astype(v.dtype), 0, 0)
    sums[...] = sums[...] * shrink + more
    top[...] = higher

  @pl.when(finish)
  def _():
    out[...] = (sums[...] / total[...]).T.astype(out.dtype)
    lse[...] = top[...] + jnp.log(total[...])


def query_kernel(
  listed, counts, ends, q, k, v, dy, lse, inner, dq, sums, *, block, longest
):
  (i, j), start, active, finish = _visit(listed, counts, longest)

  @pl.when(start)
  def _():
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

  @pl.when(active)
  def _():
    logits = _logits(q[...], k[...], ends[...], i, j, block)
    weights = jnp.exp(logits - lse[...])
    slope = weights * (_product(v[...], dy[...], 1, 1) - inner[...])
    sums[...] += _product(k[...], slope.astype(k.dtype), 0, 0)

  @pl.when(finish)
  def _():
    dq[...] = (sums[...] * q.shape[-1] ** -0.5).T.astype(dq.dtype)


def key_kernel(
  listed, counts, ends, q, k, v, dy, lse, inner, dk, dv, sums_k, sums_v,
  *, block, longest,
):  # fmt: skip
  (j, i), start, active, finish = _visit(listed, counts, longest)

  @pl.when(start)
  def _():
    sums_k[...] = jnp.zeros(sums_k.shape, jnp.float32)
    sums_v[...] = jnp.zeros(sums_v.shape, jnp.float32)

  @pl.when(active)
  def _():
    logits = _logits(q[...], k[...], ends[...], i, j, block)
    weights = jnp.exp(logits - lse[...])
    sums_v[...] += _product(weights.astype(dy.dtype), dy[...], 1, 0)
    slope = weights * (_product(v[...], dy[...], 1, 1) - inner[...])
    sums_k[...] += _product(slope.astype(q.dtype), q[...], 1, 0)

  @pl.when(finish)
  def _():
    dk[...] = (sums_k[...] * q.shape[-1] ** -0.5).astype(dk.dtype)
    dv[...] = sums_v[...].astype(dv.dtype)


def _visit(listed: Any, counts: Any, longest: int) -> tuple[Any, ...]:
  """Blocks of this visit; whether its outer block starts, is due, is done."""
  row, t = pl.program_id(0), pl.program_id(2)
  first, count = row * longest, counts[row]
  now = blocks_of(listed[first + t])
  before = blocks_of(listed[first + jnp.maximum(t - 1, 0)])
  after = blocks_of(listed[first + jnp.minimum(t + 1, longest - 1)])
  active = t < count
  start = active & ((t == 0) | (before[0] != now[0]))
  finish = active & ((t == count - 1) | (after[0] != now[0]))
  return now, start, active, finish


def blocks_of(visit: Any) -> tuple[Any, Any]:
  return visit >> BITS, visit & (2**BITS - 1)


def _logits(
  q: Float[Array, "m e"],
  k: Float[Array, "block e"],
  ends: Int[Array, "1 block"],
  i: Any,
  j: Any,
  block: int,
) -> Float[Array, "block m"]:
  """Scaled and masked, [keys, queries], of query block i and key block j."""
  logits = _product(k, q, 1, 1) * q.shape[1] ** -0.5
  # Keys run along lanes in `ends`, and down sublanes here.
  end = jnp.broadcast_to(ends, (block, block)).T
  end = jnp.concatenate([end] * (q.shape[0] // block), axis=1)
  key = j * block + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  query = lax.rem(lax.broadcasted_iota(jnp.int32, logits.shape, 1), block)
  query = i * block + query
  return jnp.where((key <= query) & (query < end), logits, MASKED)


def _product(a: Array, b: Array, over_a: int, over_b: int) -> Array:
  """Product over one axis of each, summed in float32.

  A TPU would round float32 operands to bfloat16 unless told otherwise.
  """
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(
    a,
    b,
    (((over_a,), (over_b,)), ((), ())),
    precision=exact,
    preferred_element_type=jnp.float32,
  )
