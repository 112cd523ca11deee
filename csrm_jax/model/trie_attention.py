"""Trie attention on TPUs: layouts, mesh and gradient around the kernels."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from csrm_jax.model import splash, trie_passes
from csrm_jax.model.attention import SAVED, dense
from csrm_jax.types import Indices

_BLOCK = 128  # tokens; the lanes of a TPU, so the least that wastes none
_BLOCKS = 64  # in a row; longer rows take larger blocks: lists of visits must
#               fit the scalar memory (2080 visits a row, 4 bytes each)
_QUERIES = 1024  # in a block of a key head, over all of its query heads


def pallas(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Indices,
  *,
  block: int = 0,
  single: bool = False,
) -> Float[Array, "b l h e"]:
  """Equals `attention.dense`; meets only the key blocks that a query sees.

  Forward and backward are Pallas kernels on a TPU. On any other platform they
  are interpreted: the same numbers, slowly, for tests.

  Under a mesh (that in context, see `sharding.keep_rows`) each device runs
  the kernels on its own rows, over replica and fsdp, and on its own heads,
  over tensor. Key heads that tensor does not divide are repeated as often as
  it takes; query heads that it does not divide stay whole on each device.

  Args:
    q: queries, float32 or bfloat16, see `attention.attention`.
    k: keys.
    v: values.
    subtree_end: mask, see `attention.attention`.
    block: tokens in a block of queries and in a block of keys; 0: 128, and
      more in rows above 8192 tokens. On a TPU a multiple of 128.
    single: whether every row is known to hold one sequence; bfloat16 then
      takes jax's splash attention for the forward pass.

  Returns:
    The attended values, in the dtype of `v`; softmax and sums in float32.
    The backward pass needs these, the log-sum-exps and the inputs alone.
  """
  length, h, g = q.shape[1], q.shape[2], k.shape[2]
  block = block or _block(length)
  wanted = _key_heads(h, g, tensor=_axes().get("tensor", 1), block=block)
  if wanted != g:
    k, v = (jnp.repeat(x, wanted // g, axis=2) for x in (k, v))
  more = -length % block
  padding = ((0, 0), (0, more), (0, 0), (0, 0))
  q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
  ends = jnp.arange(length + 1, length + more + 1, dtype=subtree_end.dtype)
  ends = jnp.broadcast_to(ends, (q.shape[0], more))
  subtree_end = jnp.concatenate([subtree_end, ends], axis=1)
  single = single and q.dtype == jnp.bfloat16
  out: Array = _pallas(q, k, v, subtree_end, block, single)  # pyright: ignore
  return out[:, :length]


def causal(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Indices,
) -> Float[Array, "b l h e"]:
  """Attention in rows of one sequence each, by the kernels of the platform.

  A packed row is a trie, and whether it branches is data: a program cannot
  choose by it. That no row does is known beforehand in one case alone, that
  of rows with one readout (`data.slots = 1`); `RewardModel` asks for it.

  bfloat16 runs on TPUs in splash attention and on GPUs in cuDNN, where remat
  computes it again; float32 as in `pallas` on TPUs, `dense` on GPUs.

  Args:
    q: queries, see `attention.attention`.
    k: keys.
    v: values.
    subtree_end: mask, see `attention.attention`.

  Returns:
    The attended values at the tokens of the sequence, in the dtype of `v`;
    what stands at padding has no meaning. A row with branches is NaN
    throughout, rather than wrong.
  """
  if jax.default_backend() != "gpu":
    out = pallas(q, k, v, subtree_end, single=True)
  elif q.dtype == jnp.bfloat16:
    out = jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation="cudnn"
    )
  else:
    out = dense(q, k, v, subtree_end)
  after = jnp.arange(1, subtree_end.shape[1] + 1)
  chain = subtree_end == jnp.maximum(subtree_end[:, :1], after)
  chain = jnp.all(chain, axis=1)[:, None, None, None]
  return jnp.where(chain, out, jnp.nan).astype(v.dtype)


def _block(length: int) -> int:
  """Tokens in a block, such that a row has `_BLOCKS` of them at most."""
  block = _BLOCK
  while length > block * _BLOCKS:
    block *= 2
  return block


def _key_heads(h: int, g: int, *, tensor: int, block: int) -> int:
  """Key heads after repetition: the fewest that spread and fit a block."""
  spread = [c for c in range(1, h // g + 1) if (h // g) % c == 0]
  if h % tensor == 0:
    spread = [c for c in spread if g * c % tensor == 0]
  fit = [c for c in spread if h // (g * c) * block <= _QUERIES]
  return g * (fit or spread[-1:])[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _pallas(q, k, v, subtree_end, block: int, single: bool):
  return _forward(q, k, v, subtree_end, block, single)[0]


def _forward(q, k, v, subtree_end, block: int, single: bool):
  """Output, and what the backward pass needs."""
  g = k.shape[2]
  kernel = splash.forward if single else trie_passes.forward
  run = _over_devices(kernel, q.shape[0], g)
  out, lse = run(_in_blocks(q, g, block), _by_head(k), _by_head(v), subtree_end)
  # Saved in two axes a row and in one: the last axes of the kernels' layouts
  # would be padded to the tiles of a TPU.
  out = _out_of_blocks(out, block)
  out = checkpoint_name(out.reshape(*out.shape[:2], -1), SAVED[0])
  lse = checkpoint_name(lse.reshape(*lse.shape[:2], -1), SAVED[1])
  return out.reshape(q.shape), (q, k, v, subtree_end, out, lse)


def _backward(block: int, single: bool, saved, cotangent: Array):
  """Gradients of q, k, v."""
  q, k, v, subtree_end, out, lse = saved
  b, length, g = q.shape[0], q.shape[1], k.shape[2]
  inner = cotangent.astype(jnp.float32) * out.reshape(q.shape)
  inner = jnp.sum(inner, axis=-1, keepdims=True)
  inner = _in_blocks(inner, g, block).swapaxes(-1, -2)
  lse = lse.reshape(b, g, length // block, 1, -1)
  arrays = (
    _in_blocks(q, g, block),
    _by_head(k),
    _by_head(v),
    _in_blocks(cotangent, g, block),
    lse,
    inner,
    subtree_end,
  )
  dq = _over_devices(trie_passes.query_gradient, b, g)(*arrays)
  dk, dv = _over_devices(trie_passes.key_gradients, b, g)(*arrays)
  return _out_of_blocks(dq, block), _by_head(dk), _by_head(dv), None


_pallas.defvjp(_forward, _backward)


def _axes() -> dict[str, int]:
  """Sizes of the axes of the mesh in context that are still to be spread."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return {}
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {
    name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual
  }


def _over_devices(
  kernel: Callable[..., Any], b: int, g: int
) -> Callable[..., Any]:
  """The kernel, interpreted unless on a TPU, on each device's rows and heads.

  XLA cannot partition a kernel by itself.

  Args:
    kernel: of arrays [b, g, ...], the last [b, l]; returns arrays [b, g, ...].
    b: rows.
    g: key heads.
  """

  def run(*arrays: Array) -> Any:
    return lax.platform_dependent(
      *arrays,
      tpu=functools.partial(kernel, interpret=False),
      default=functools.partial(kernel, interpret=True),
    )

  axes = _axes()
  if not axes:
    return run
  rows = tuple(name for name in ("replica", "fsdp") if name in axes)
  if b % math.prod(axes[name] for name in rows):
    rows = ()
  heads = "tensor" if g % axes.get("tensor", g + 1) == 0 else None
  per_head, per_row = P(rows or None, heads), P(rows or None)

  def spread(*arrays: Array) -> Any:
    return jax.shard_map(
      run,
      in_specs=(*[per_head] * (len(arrays) - 1), per_row),
      out_specs=per_head,
      check_vma=False,  # a kernel does not say over which axes it varies
    )(*arrays)

  return spread


def _by_head(x: Array) -> Array:
  """[b l g e] to [b g l e] and back."""
  return x.swapaxes(1, 2)


def _in_blocks(x: Array, g: int, block: int) -> Array:
  """[b l h e] -> [b g blocks r*block e]: a key head's queries in one block."""
  b, length, h, e = x.shape
  x = x.reshape(b, length // block, block, g, h // g, e)
  return x.transpose(0, 3, 1, 4, 2, 5).reshape(b, g, length // block, -1, e)


def _out_of_blocks(x: Array, block: int) -> Array:
  """Undoes `_in_blocks`."""
  b, g, n, _, e = x.shape
  x = x.reshape(b, g, n, -1, block, e).transpose(0, 2, 4, 1, 3, 5)
  return x.reshape(b, n * block, -1, e)
