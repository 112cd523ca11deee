"""Splash attention of jax, for rows of one sequence each: forward pass.

The backward pass is that of `trie_passes`, which needs no more than the
log-sum-exps, so that the remat policies hold here as well.
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from csrm_jax.types import Indices

_BLOCKS = (512, 256, 128)  # tokens; the largest that divides the row is used


def forward(
  q: Float[Array, "b g n m e"],
  k: Float[Array, "b g l e"],
  v: Float[Array, "b g l e"],
  subtree_end: Indices,
  *,
  interpret: bool,
) -> tuple[Float[Array, "b g n m e"], Float[Array, "b g n 1 m"]]:
  """As `trie_passes.forward`, under a causal mask; see there.

  Args:
    q: queries, in blocks; bfloat16 (a TPU would round float32 to it).
    k: keys; a multiple of 128 tokens.
    v: values.
    subtree_end: not read: that the mask is causal is known before.
    interpret: see `trie_passes.forward`.
  """
  b, g, n, m, e = q.shape
  length = k.shape[2]
  block, r = length // n, m * n // length
  heads = q.reshape(b, g, n, r, block, e).swapaxes(2, 3)
  size = next(size for size in _BLOCKS if length % size == 0)
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * (g * r))
  kernel = splash.make_splash_mha(
    mask,
    block_sizes=splash.BlockSizes(block_q=size, block_kv=size),
    head_shards=1,
    q_seq_shards=1,
    save_residuals=True,
    interpret=interpret,
  )
  scaled = heads.reshape(b, g * r, length, e) * e**-0.5
  out, (lse,) = jax.vmap(kernel)(scaled.astype(q.dtype), k, v)
  out = out.reshape(b, g, r, n, block, e).swapaxes(2, 3)
  lse = lse.reshape(b, g, r, n, block).swapaxes(2, 3)
  return out.reshape(q.shape), lse.reshape(b, g, n, 1, m)
