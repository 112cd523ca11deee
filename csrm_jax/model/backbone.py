"""One decoder-only transformer: Llama, Mistral, Qwen2 and Qwen3 (Flax NNX).

The layers of a stack share one set of parameters with a leading axis and run
under `jax.lax.scan`, so that compile time does not grow with depth.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from csrm_jax import sharding
from csrm_jax.model.attention import SAVED, attention
from csrm_jax.types import Indices, Params

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
REMAT = ("none", "layer", "dots")
ARCHITECTURE_NAMES = {
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
}


class RopeScaling(NamedTuple):
  """Llama 3's stretch of the slow rotary frequencies to longer contexts."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_context: int  # tokens


@dataclasses.dataclass(frozen=True)
class Architecture:
  """The shape of a backbone, as a Hugging Face `config.json` states it."""

  family: str  # one of FAMILIES
  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None  # None: plain rotary embedding
  qkv_bias: bool
  out_bias: bool
  tied: bool  # the output embedding is the input embedding
  context: int  # tokens
  sliding_window: int  # tokens; 0: every token sees its whole path

  @property
  def qk_norm(self) -> bool:
    return self.family == "qwen3"

  @classmethod
  def from_config(
    cls, config: dict[str, Any], *, row_length: int = 1024
  ) -> "Architecture":
    """Reads a Hugging Face config; what we cannot compute is refused by name.

    Args:
      config: the content of `config.json`.
      row_length: longest row the model is to see, tokens. A sliding window
        that no row outgrows changes nothing and is accepted.

    Raises:
      ValueError: for an unknown model type or a feature that we lack.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
      raise ValueError(
        f"model_type {family!r} is not supported: use one of {FAMILIES}"
      )
    _refuse_unsupported(config)
    heads = config["num_attention_heads"]
    bias = bool(config.get("attention_bias", False))
    theta, scaling = _read_rope(config)
    architecture = cls(
      family=family,
      vocab_size=config["vocab_size"],
      width=config["hidden_size"],
      layers=config["num_hidden_layers"],
      heads=heads,
      kv_heads=config.get("num_key_value_heads") or heads,
      head_dim=config.get("head_dim") or config["hidden_size"] // heads,
      ffn=config["intermediate_size"],
      norm_eps=config.get("rms_norm_eps", 1e-6),
      rope_theta=theta,
      rope_scaling=scaling,
      qkv_bias=family == "qwen2" or bias,
      out_bias=family in ("llama", "qwen3") and bias,
      tied=bool(config.get("tie_word_embeddings", False)),
      context=config.get("max_position_embeddings", 2048),
      sliding_window=_read_sliding_window(config),
    )
    architecture.check_row_length(row_length)
    return architecture

  def check_row_length(self, row_length: int) -> None:
    """Refuses rows in which a sliding window would hide tokens.

    Raises:
      ValueError: if the window is shorter than the row.
    """
    if 0 < self.sliding_window < row_length:
      raise ValueError(
        f"sliding_window = {self.sliding_window} is shorter than a row of "
        f"{row_length} tokens, and sliding windows are not supported: set "
        f"data.row_length <= {self.sliding_window}, or use another backbone"
      )

  def to_config(self) -> dict[str, Any]:
    """The Hugging Face config; `from_config` reads back an equal value."""
    rope: dict[str, Any] = {
      "rope_type": "default",
      "rope_theta": self.rope_theta,
    }
    if self.rope_scaling is not None:
      factor, low, high, original = self.rope_scaling
      rope |= {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
      }
    config = {
      "architectures": [f"{ARCHITECTURE_NAMES[self.family]}ForCausalLM"],
      "model_type": self.family,
      "vocab_size": self.vocab_size,
      "hidden_size": self.width,
      "num_hidden_layers": self.layers,
      "num_attention_heads": self.heads,
      "num_key_value_heads": self.kv_heads,
      "head_dim": self.head_dim,
      "intermediate_size": self.ffn,
      "hidden_act": "silu",
      "rms_norm_eps": self.norm_eps,
      # Both spellings: transformers 5 reads the first, older readers (vLLM,
      # transformers 4) the other two.
      "rope_parameters": rope,
      "rope_theta": self.rope_theta,
      "rope_scaling": rope if self.rope_scaling else None,
      "tie_word_embeddings": self.tied,
      "max_position_embeddings": self.context,
    }
    if self.family in ("llama", "qwen3"):
      config["attention_bias"] = self.qkv_bias
    if self.family == "llama":
      config["mlp_bias"] = False
    if self.family == "mistral":
      config["sliding_window"] = self.sliding_window or None
    if self.family in ("qwen2", "qwen3"):
      config["use_sliding_window"] = bool(self.sliding_window)
      if self.sliding_window:
        config["sliding_window"] = self.sliding_window
        config["max_window_layers"] = 0
    return config


def _refuse_unsupported(config: dict[str, Any]) -> None:
  """Raises for features that would change the numbers without a trace."""
  wanted = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
  }
  for key, allowed in wanted.items():
    value = config.get(key)
    if value is not None and value not in allowed:
      remedy = f"one of {allowed}" if allowed else "full-precision weights"
      raise ValueError(f"{key} = {value!r} is not supported: use {remedy}")


def _read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
  """Rotary base and scaling, from the spelling of transformers 4 or 5."""
  rope = config.get("rope_parameters") or {}
  scaling = rope or config.get("rope_scaling") or {}
  theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if scaling.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(
      f"partial_rotary_factor = {scaling['partial_rotary_factor']} is not "
      "supported: use a backbone that rotates the whole head"
    )
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(
      f"rope type {kind!r} is not supported: use 'default' or 'llama3'"
    )
  return theta, RopeScaling(
    factor=float(scaling["factor"]),
    low_freq_factor=float(scaling["low_freq_factor"]),
    high_freq_factor=float(scaling["high_freq_factor"]),
    original_context=int(scaling["original_max_position_embeddings"]),
  )


def _read_sliding_window(config: dict[str, Any]) -> int:
  """The window in tokens, 0 where no layer has one."""
  # A Mistral config that is silent has a window: the library default.
  default = 4096 if config["model_type"] == "mistral" else 0
  window = config.get("sliding_window", default) or 0
  if config["model_type"] == "mistral":
    return window
  if not config.get("use_sliding_window", False):
    return 0
  kinds = config.get("layer_types") or ["sliding_attention"]
  return window if "sliding_attention" in kinds else 0


@jax.custom_vjp
def mixed_matmul(
  x: Float[Array, "m i"], kernel: Float[Array, "i o"]
) -> Float[Array, "m o"]:
  """x W of float32 arrays with bfloat16 operands and float32 sums.

  Gradients likewise.
  """
  return _bfloat16_dot(x, kernel, ((1,), (0,)))


def _bfloat16_dot(a: Array, b: Array, axes: Any) -> Array:
  return jax.lax.dot_general(
    a.astype(jnp.bfloat16),
    b.astype(jnp.bfloat16),
    (axes, ((), ())),
    preferred_element_type=jnp.float32,
  )


def _mixed_forward(x: Array, kernel: Array) -> Any:
  return mixed_matmul(x, kernel), (x, kernel)


def _mixed_backward(saved: tuple[Array, Array], dy: Array) -> Any:
  x, kernel = saved
  dx = _bfloat16_dot(dy, kernel, ((1,), (1,)))
  return dx, _bfloat16_dot(_turned(x), dy, ((1,), (0,)))


def _turned(x: Array) -> Array:
  """x transposed, bfloat16, for a product that sums over its leading axis.

  CPUs have no fast kernel for a sum over the leading axis of both operands, so
  one is laid out anew; by itself, XLA folds the transpose into the product.
  """
  return jax.lax.platform_dependent(
    x.astype(jnp.bfloat16).T, cpu=_row_major, default=lambda x: x
  )


def _row_major(x: Array) -> Array:
  return jax.lax.optimization_barrier(with_layout_constraint(x, Layout((0, 1))))


mixed_matmul.defvjp(_mixed_forward, _mixed_backward)


@jax.custom_vjp
def mixed_logits(
  x: Float[Array, "m d"], output: Float[Array, "v d"]
) -> Float[Array, "m v"]:
  """`mixed_matmul` with an output embedding, that is not transposed for it."""
  return _bfloat16_dot(x, output, ((1,), (1,)))


def _logits_forward(x: Array, output: Array) -> Any:
  return mixed_logits(x, output), (x, output)


def _logits_backward(saved: tuple[Array, Array], dy: Array) -> Any:
  x, output = saved
  dx = _bfloat16_dot(dy, output, ((1,), (0,)))
  return dx, _bfloat16_dot(_turned(dy), x, ((1,), (0,)))


mixed_logits.defvjp(_logits_forward, _logits_backward)


class Linear(nnx.Module):
  """y = x W + b, plus the low-rank update (x A) B where a rank is given."""

  def __init__(
    self, ins: int, outs: int, *, bias: bool, rank: int, mixed: bool
  ):
    self.matmul = mixed_matmul if mixed else jnp.matmul
    self.kernel = nnx.Param(jnp.zeros((ins, outs)))  # filled by init_stack
    self.bias = nnx.Param(jnp.zeros(outs)) if bias else None
    self.lora_a = nnx.Param(jnp.zeros((ins, rank))) if rank else None
    self.lora_b = nnx.Param(jnp.zeros((rank, outs))) if rank else None

  def __call__(
    self, x: Float[Array, "m i"], *, lora_scale: float
  ) -> Float[Array, "m o"]:
    y = self.matmul(x, self.kernel[...].astype(x.dtype))
    if self.bias is not None:
      y = y + self.bias[...].astype(x.dtype)
    if self.lora_a is not None and self.lora_b is not None:
      low = x @ self.lora_a[...].astype(x.dtype)
      y = y + lora_scale * (low @ self.lora_b[...].astype(x.dtype))
    return y


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis, computed in float32."""

  def __init__(self, width: int, *, eps: float):
    self.scale = nnx.Param(jnp.ones(width))
    self.eps = eps

  def __call__(self, x: Float[Array, "m d"]) -> Float[Array, "m d"]:
    return rms_norm(x, self.scale[...], eps=self.eps)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions over token tries."""

  def __init__(self, arch: Architecture, *, rank: int, mixed: bool):
    self.arch, self.mixed = arch, mixed
    d, e = arch.width, arch.head_dim
    q, kv = arch.heads * e, arch.kv_heads * e
    bias = arch.qkv_bias
    self.query = Linear(d, q, bias=bias, rank=rank, mixed=mixed)
    self.key = Linear(d, kv, bias=bias, rank=rank, mixed=mixed)
    self.value = Linear(d, kv, bias=bias, rank=rank, mixed=mixed)
    self.out = Linear(q, d, bias=arch.out_bias, rank=rank, mixed=mixed)
    self.query_norm = RMSNorm(e, eps=arch.norm_eps) if arch.qk_norm else None
    self.key_norm = RMSNorm(e, eps=arch.norm_eps) if arch.qk_norm else None

  def __call__(
    self,
    x: Float[Array, "m d"],
    rope: tuple[Float[Array, "b l f"], Float[Array, "b l f"]],
    subtree_end: Indices,
    *,
    kind: str,
    lora_scale: float,
  ) -> Float[Array, "m d"]:
    q, k, v = self.project(x, rope, lora_scale=lora_scale)
    y = attention(q, k, v, subtree_end, kind=kind, mixed=self.mixed)
    return self.out(y.reshape(x.shape[0], -1), lora_scale=lora_scale)

  def project(
    self,
    x: Float[Array, "m d"],
    rope: tuple[Float[Array, "b l f"], Float[Array, "b l f"]],
    *,
    lora_scale: float,
  ) -> tuple[
    Float[Array, "b l h e"], Float[Array, "b l g e"], Float[Array, "b l g e"]
  ]:
    """Queries, keys and values, turned to their positions."""
    per_head = (*rope[0].shape[:2], -1, self.arch.head_dim)
    q = self.query(x, lora_scale=lora_scale).reshape(per_head)
    k = self.key(x, lora_scale=lora_scale).reshape(per_head)
    v = self.value(x, lora_scale=lora_scale).reshape(per_head)
    if self.query_norm is not None and self.key_norm is not None:
      q, k = (
        norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        for norm, x in ((self.query_norm, q), (self.key_norm, k))
      )
    return rotate(q, rope), rotate(k, rope), v


@functools.partial(jax.checkpoint, prevent_cse=False)  # see run_stack
def _gated(
  gate: Float[Array, "m f"], up: Float[Array, "m f"]
) -> Float[Array, "m f"]:
  """silu(gate) * up; the backward pass keeps these two and nothing between."""
  return jax.nn.silu(gate) * up


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x)."""

  def __init__(self, arch: Architecture, *, rank: int, mixed: bool):
    d, f = arch.width, arch.ffn
    self.gate = Linear(d, f, bias=False, rank=rank, mixed=mixed)
    self.up = Linear(d, f, bias=False, rank=rank, mixed=mixed)
    self.down = Linear(f, d, bias=False, rank=rank, mixed=mixed)

  def __call__(
    self, x: Float[Array, "m d"], *, lora_scale: float
  ) -> Float[Array, "m d"]:
    gate = self.gate(x, lora_scale=lora_scale)
    up = self.up(x, lora_scale=lora_scale)
    return self.down(_gated(gate, up), lora_scale=lora_scale)


class Block(nnx.Module):
  """One pre-norm layer: attention, then MLP, each with a residual."""

  def __init__(self, arch: Architecture, *, rank: int = 0, mixed: bool = False):
    self.attention_norm = RMSNorm(arch.width, eps=arch.norm_eps)
    self.attention = Attention(arch, rank=rank, mixed=mixed)
    self.mlp_norm = RMSNorm(arch.width, eps=arch.norm_eps)
    self.mlp = MLP(arch, rank=rank, mixed=mixed)

  def __call__(
    self,
    x: Float[Array, "m d"],
    rope: tuple[Float[Array, "b l f"], Float[Array, "b l f"]],
    subtree_end: Indices,
    *,
    kind: str,
    lora_scale: float,
  ) -> Float[Array, "m d"]:
    x = x + self.attention(
      self.attention_norm(x),
      rope,
      subtree_end,
      kind=kind,
      lora_scale=lora_scale,
    )
    return x + self.mlp(self.mlp_norm(x), lora_scale=lora_scale)


def init_stack(
  key: jax.Array, architecture: Architecture, layers: int
) -> Params:
  """Random parameters of `layers` layers, each leaf with a leading [n].

  Kernels have variance 1 / inputs, biases are 0 and norm scales 1.
  """
  one = nnx.state(Block(architecture)).to_pure_dict()
  stacked = jax.tree.map(lambda x: jnp.tile(x, (layers,) + (1,) * x.ndim), one)
  leaves, tree = jax.tree.flatten(stacked)
  kernels = [i for i, x in enumerate(leaves) if x.ndim == 3]
  drawn = normals(key, [leaves[i].shape for i in kernels])
  for i, x in zip(kernels, drawn, strict=True):
    leaves[i] = x * x.shape[1] ** -0.5
  return jax.tree.unflatten(tree, leaves)


def normals(
  key: jax.Array, shapes: Sequence[tuple[int, ...]]
) -> list[Float[Array, "..."]]:
  """Standard normal arrays out of one draw: XLA compiles each draw slowly."""
  sizes = [math.prod(shape) for shape in shapes]
  flat = jax.random.normal(key, (sum(sizes),), jnp.float32)
  parts = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
  return [x.reshape(s) for x, s in zip(parts, shapes, strict=True)]


def run_stack(
  architecture: Architecture,
  params: Params,
  x: Float[Array, "b l d"],
  positions: Indices,
  subtree_end: Indices,
  *,
  kind: str,
  remat: str,
  lora_rank: int = 0,
  lora_alpha: float = 0.0,
  mixed: bool = False,
) -> Float[Array, "b l d"]:
  """Runs stacked layers under one scan.

  Args:
    architecture: the shape of the backbone.
    params: leaves of one block with a leading layer axis.
    x: activations that enter the first of these layers.
    positions: of the tokens in their sequences, from 0.
    subtree_end: mask, see `types.Batch`.
    kind: of attention, see `attention.attention`.
    remat: what the backward pass keeps: "none" recomputes no product, "layer"
      keeps the input of each layer and what its attention in blocks needs,
      "dots" also its weight products.
    lora_rank: rank of the low-rank updates in `params`; 0 if there are none.
    lora_alpha: the updates are scaled by `lora_alpha / lora_rank`.
    mixed: whether products take bfloat16 operands, see `mixed_matmul`.

  Returns:
    Activations after the last of these layers.

  Raises:
    ValueError: for an unknown `remat`.
  """
  rope = rope_table(architecture, positions)
  graph, _ = nnx.split(
    nnx.eval_shape(lambda: Block(architecture, rank=lora_rank, mixed=mixed))
  )
  lora_scale = lora_alpha / lora_rank if lora_rank else 0.0

  def layer(x: Array, params: Params) -> tuple[Array, None]:
    block = nnx.merge(graph, params)
    y = block(x, rope, subtree_end, kind=kind, lora_scale=lora_scale)
    return sharding.keep_rows(y), None

  policies = jax.checkpoint_policies
  keep = policies.save_only_these_names(*SAVED)
  if remat == "dots":
    dots = policies.dots_with_no_batch_dims_saveable
    keep = policies.save_from_both_policies(keep, dots)
  elif remat not in REMAT:
    raise ValueError(f"model.remat {remat!r}: use one of {REMAT}")
  if remat != "none":
    # prevent_cse guards against a hazard that cannot occur inside a scan.
    layer = jax.checkpoint(layer, prevent_cse=False, policy=keep)
  # Two axes from here on: on CPUs, XLA turns products and sums over three
  # into copies and loops that cost a third of the time of a training step.
  flat = x.reshape(-1, x.shape[-1])
  return jax.lax.scan(layer, flat, params)[0].reshape(x.shape)


def rms_norm(
  x: Float[Array, "*n d"], scale: Float[Array, " d"], *, eps: float
) -> Float[Array, "*n d"]:
  """x / rms(x) * scale; Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype) * (
    scale.astype(x.dtype)
  )


def rope_table(
  architecture: Architecture, positions: Indices
) -> tuple[Float[Array, "b l f"], Float[Array, "b l f"]]:
  """Cosines and sines of the rotary angles, f = head_dim / 2.

  Source: Su et al. 2021 (arXiv:2104.09864), eq. 15; the scaling is that of
  Llama 3.1 (arXiv:2407.21783): frequencies whose wave is longer than the
  original context are divided by `factor`, short ones kept, and those between
  interpolated.
  """
  e = architecture.head_dim
  exponent = jnp.arange(0, e, 2, dtype=jnp.float32) / e
  frequency = 1.0 / architecture.rope_theta**exponent
  if architecture.rope_scaling is not None:
    factor, low, high, original = architecture.rope_scaling
    waves = original * frequency / (2 * jnp.pi)  # waves in the old context
    kept = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
    frequency = frequency * (kept + (1.0 - kept) / factor)
  angle = positions.astype(jnp.float32)[..., None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x: Float[Array, "b l h e"],
  rope: tuple[Float[Array, "b l f"], Float[Array, "b l f"]],
) -> Float[Array, "b l h e"]:
  """Turns each pair (i, i + e/2) of a head by its rotary angle."""
  cos, sin = (t[:, :, None].astype(x.dtype) for t in rope)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
