"""The forward and backward passes of trie attention on a TPU, as kernel calls.

The visits of a kernel, see `trie_kernels.py`, are a list that is read ahead of
it (scalar prefetch): blocks that nobody sees cost neither a product nor a copy.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from csrm_jax.model import trie_kernels as kernels
from csrm_jax.model.attention import reached_blocks
from csrm_jax.types import Indices


def visits(
  subtree_end: Indices, block: int, *, by_key: bool = False
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
  """The pairs of blocks that meet, as the list that a kernel walks along.

  Args:
    subtree_end: mask, see `attention.attention`; a multiple of `block` tokens.
    block: tokens in a block of queries and in a block of keys.
    by_key: sorted by (key block, query block) for the gradients of keys and
      values; otherwise by (query block, key block).

  Returns:
    Visits `outer << 16 | inner`, t = the most a causal row can need; those
    after the last repeat it, so that a kernel copies nothing for them. And
    how many there are in each row.
  """
  needed = reached_blocks(subtree_end, block)  # [b queries keys]
  if by_key:
    needed = needed.swapaxes(1, 2)
  rows, n, _ = needed.shape
  number = jnp.arange(n, dtype=jnp.int32)
  code = (number[:, None] << kernels.BITS) | number
  beyond = jnp.iinfo(jnp.int32).max
  listed = jnp.sort(jnp.where(needed, code, beyond).reshape(rows, n * n))
  last = jnp.max(jnp.where(needed, code, 0), axis=(1, 2))
  listed = jnp.minimum(listed[:, : n * (n + 1) // 2], last[:, None])
  return listed, jnp.sum(needed, axis=(1, 2), dtype=jnp.int32)


def forward(
  q: Float[Array, "b g n m e"],
  k: Float[Array, "b g l e"],
  v: Float[Array, "b g l e"],
  subtree_end: Indices,
  *,
  interpret: bool,
) -> tuple[Float[Array, "b g n m e"], Float[Array, "b g n 1 m"]]:
  """Attended values, in the dtype of `v`, and log-sum-exps in nats.

  Source: FlashAttention (Dao et al. 2022, arXiv:2205.14135), algorithm 1.

  Args:
    q: queries, in blocks; see `trie_kernels`.
    k: keys.
    v: values.
    subtree_end: mask, see `attention.attention`.
    interpret: whether to run in XLA operations (any backend, slow).
  """
  m, e = q.shape[-2:]
  per_query = jax.ShapeDtypeStruct((*q.shape[:3], 1, m), jnp.float32)
  return _call(
    kernels.forward_kernel,
    (q, k, v),
    ("queries", "keys", "keys"),
    subtree_end,
    outputs=(jax.ShapeDtypeStruct(q.shape, v.dtype), per_query),
    kinds_out=("queries", "per_query"),
    scratch=((1, m), (1, m), (e, m)),
    interpret=interpret,
  )


def query_gradient(
  q: Float[Array, "b g n m e"],
  k: Float[Array, "b g l e"],
  v: Float[Array, "b g l e"],
  cotangent: Float[Array, "b g n m e"],
  lse: Float[Array, "b g n 1 m"],
  inner: Float[Array, "b g n 1 m"],
  subtree_end: Indices,
  *,
  interpret: bool,
) -> Float[Array, "b g n m e"]:
  """Gradient of `q`; see `key_gradients` for the arguments."""
  m, e = q.shape[-2:]
  return _call(
    kernels.query_kernel,
    (q, k, v, cotangent, lse, inner),
    ("queries", "keys", "keys", "queries", "per_query", "per_query"),
    subtree_end,
    outputs=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
    kinds_out=("queries",),
    scratch=((e, m),),
    interpret=interpret,
  )[0]


def key_gradients(
  q: Float[Array, "b g n m e"],
  k: Float[Array, "b g l e"],
  v: Float[Array, "b g l e"],
  cotangent: Float[Array, "b g n m e"],
  lse: Float[Array, "b g n 1 m"],
  inner: Float[Array, "b g n 1 m"],
  subtree_end: Indices,
  *,
  interpret: bool,
) -> tuple[Float[Array, "b g l e"], Float[Array, "b g l e"]]:
  """Gradients of `k` and `v`; the weights are computed again from `lse`.

  Source: FlashAttention, algorithm 4; the visits are sorted by key block, so
  that each gradient is written once and there is nothing to add up.

  Args:
    q: queries, in blocks; see `forward`.
    k: keys.
    v: values.
    cotangent: of the attended values.
    lse: log-sum-exps of `forward`, nats.
    inner: product of each query's cotangent and attended value.
    subtree_end: mask, see `attention.attention`.
    interpret: see `forward`.
  """
  block, e = k.shape[2] // q.shape[2], k.shape[3]
  return _call(
    kernels.key_kernel,
    (q, k, v, cotangent, lse, inner),
    ("queries", "keys", "keys", "queries", "per_query", "per_query"),
    subtree_end,
    outputs=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
    kinds_out=("keys", "keys"),
    scratch=((block, e), (block, e)),
    by_key=True,
    interpret=interpret,
  )


def _call(
  kernel: Callable[..., None],
  inputs: tuple[Array, ...],
  kinds: tuple[str, ...],
  subtree_end: Indices,
  *,
  outputs: tuple[jax.ShapeDtypeStruct, ...],
  kinds_out: tuple[str, ...],
  scratch: tuple[tuple[int, int], ...],
  interpret: bool,
  by_key: bool = False,
) -> Any:
  """Runs a kernel over (row, key head, visit); as many visits as a row needs.

  Args:
    kernel: gets refs of visits, counts, `subtree_end`, inputs, outputs and
      scratch, and the keyword `block`.
    inputs: arrays [b, g, ...].
    kinds: of the inputs, what a visit reads of them.
    subtree_end: mask.
    outputs: shapes and dtypes.
    kinds_out: as `kinds`; each must belong to the outer block of a visit.
    scratch: shapes of float32 accumulators.
    interpret: see `forward`.
    by_key: order of the visits.
  """
  b, g, n, m, e = inputs[0].shape
  block = subtree_end.shape[1] // n
  listed, counts = visits(subtree_end, block, by_key=by_key)
  longest = listed.shape[1]

  def at(row, t, listed):
    outer, inner = kernels.blocks_of(listed[row * longest + t])
    return (inner, outer) if by_key else (outer, inner)

  def queries(row, group, t, listed, counts):
    return row, group, at(row, t, listed)[0], 0, 0

  def keys(row, group, t, listed, counts):
    return row, group, at(row, t, listed)[1], 0

  def ends(row, group, t, listed, counts):
    return row, 0, at(row, t, listed)[1]

  specs = {
    "queries": pl.BlockSpec((None, None, None, m, e), queries),
    "per_query": pl.BlockSpec((None, None, None, 1, m), queries),
    "keys": pl.BlockSpec((None, None, block, e), keys),
    "ends": pl.BlockSpec((None, 1, block), ends),
  }
  return pl.pallas_call(
    functools.partial(kernel, block=block, longest=longest),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, g, jnp.max(counts)),
      in_specs=[specs[kind] for kind in ("ends", *kinds)],
      out_specs=[specs[kind] for kind in kinds_out],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=outputs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
    # One-dimensional, as scalar memory pads the last axis of a matrix.
  )(listed.reshape(-1), counts, subtree_end[:, None].astype(jnp.int32), *inputs)
