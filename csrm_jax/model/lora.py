"""Low-rank adapters: y = x W + (alpha / r) (x A) B, trained in place of W.

Source: Hu et al. 2021 (arXiv:2106.09685). The forward pass is in
`backbone.Linear`; here the leaves `lora_a`, `lora_b` are made and merged.
"""

import jax
import jax.numpy as jnp

from csrm_jax.model.backbone import normals
from csrm_jax.model.names import flatten, unflatten
from csrm_jax.types import Params

LEAVES = ("lora_a", "lora_b")


def init(key: jax.Array, stack: Params, rank: int) -> Params:
  """Adds adapters to every kernel of a stack; they start as no change.

  Args:
    key: randomness of A, whose entries have variance 1 / inputs; B is zero.
    stack: nested dict whose leaves `kernel` are [n, in, out].
    rank: of the updates, at least 1.
  """
  flat = flatten(stack)
  kernels = {k: v.shape for k, v in flat.items() if k.endswith("/kernel")}
  shapes = [(n, ins, rank) for n, ins, _ in kernels.values()]
  drawn = normals(key, shapes)
  for (path, (n, ins, outs)), a in zip(kernels.items(), drawn, strict=True):
    prefix = path.removesuffix("kernel")
    flat[f"{prefix}lora_a"] = a * ins**-0.5
    flat[f"{prefix}lora_b"] = jnp.zeros((n, rank, outs), jnp.float32)
  return unflatten(flat)


def merge(params: Params, alpha: float) -> Params:
  """Folds every adapter into its kernel; the result has no adapters.

  Args:
    params: nested dict, with adapters or without.
    alpha: numerator of the scale; the rank is read from the leaves.
  """
  if "lora_a" not in params:
    return {
      name: merge(child, alpha) if isinstance(child, dict) else child
      for name, child in params.items()
    }
  a, b = params["lora_a"], params["lora_b"]
  update = (alpha / a.shape[-1]) * jnp.matmul(a, b, precision="highest")
  rest = {k: v for k, v in params.items() if k not in LEAVES}
  return rest | {"kernel": params["kernel"] + update}
