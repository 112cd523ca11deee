"""Our parameter paths and the tensor names of Hugging Face and GGUF."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.model.backbone import Architecture
from csrm_jax.types import Params


class Name(NamedTuple):
  """One row of the table; `{}` stands for the layer number."""

  ours: str  # path inside a stack, or of the whole tree
  hf: str
  gguf: str


LAYER = (
  Name("attention_norm/scale", "input_layernorm.weight", "attn_norm.weight"),
  Name("attention/query/kernel", "self_attn.q_proj.weight", "attn_q.weight"),
  Name("attention/query/bias", "self_attn.q_proj.bias", "attn_q.bias"),
  Name("attention/key/kernel", "self_attn.k_proj.weight", "attn_k.weight"),
  Name("attention/key/bias", "self_attn.k_proj.bias", "attn_k.bias"),
  Name("attention/value/kernel", "self_attn.v_proj.weight", "attn_v.weight"),
  Name("attention/value/bias", "self_attn.v_proj.bias", "attn_v.bias"),
  Name("attention/out/kernel", "self_attn.o_proj.weight", "attn_output.weight"),
  Name("attention/out/bias", "self_attn.o_proj.bias", "attn_output.bias"),
  Name(
    "attention/query_norm/scale",
    "self_attn.q_norm.weight",
    "attn_q_norm.weight",
  ),
  Name(
    "attention/key_norm/scale", "self_attn.k_norm.weight", "attn_k_norm.weight"
  ),
  Name("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
  Name("mlp/gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight"),
  Name("mlp/up/kernel", "mlp.up_proj.weight", "ffn_up.weight"),
  Name("mlp/down/kernel", "mlp.down_proj.weight", "ffn_down.weight"),
)
GLOBAL = (
  Name("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
  Name("final_norm/scale", "model.norm.weight", "output_norm.weight"),
  Name("lm_head/kernel", "lm_head.weight", "output.weight"),
)
SCORE = "score.weight"  # of a `*ForSequenceClassification`
BY_PATH = {name.ours: name for name in LAYER + GLOBAL}


def layer_name(ours: str, layer: int, *, gguf: bool = False) -> str:
  """The foreign name of a layer's tensor, given its path inside a stack."""
  name = BY_PATH[ours]
  if gguf:
    return f"blk.{layer}.{name.gguf}"
  return f"model.layers.{layer}.{name.hf}"


def transposed(ours: str) -> bool:
  """Whether the foreign tensor is ours transposed (they store [out, in])."""
  return ours.endswith("/kernel") and ours != "lm_head/kernel"


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
  """Leaves by path, `/` between the keys, sorted."""
  flat: dict[str, Any] = {}
  for key, value in sorted(params.items()):
    path = f"{prefix}{key}"
    if isinstance(value, dict):
      flat |= flatten(value, f"{path}/")
    else:
      flat[path] = value
  return flat


def unflatten(flat: dict[str, Any]) -> Params:
  """The nested dict of leaves by path."""
  tree: Params = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = value
  return tree


def to_hf(
  params: Params, architecture: Architecture
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors of a backbone under their Hugging Face names.

  Layers are unstacked one tensor at a time. The head is left out: what a score
  row means is for the caller to say.

  Raises:
    ValueError: if adapters are still unmerged or layers are missing.
  """
  first = 0
  for stack in ("lower", "upper"):
    flat = flatten(params.get(stack, {}))
    count = 0
    for path, leaf in flat.items():
      if path.endswith(("/lora_a", "/lora_b")):
        raise ValueError(f"{stack}/{path}: merge the adapters before exporting")
      count = leaf.shape[0]
      for layer in range(count):
        tensor = np.asarray(leaf[layer])
        tensor = tensor.T if transposed(path) else tensor
        name = layer_name(path, first + layer)
        yield name, np.ascontiguousarray(tensor)
    first += count
  if first != architecture.layers:
    raise ValueError(f"{first} layers in params, {architecture.layers} wanted")
  flat = flatten(params)
  for name in GLOBAL:
    if name.ours in flat:
      yield name.hf, np.asarray(flat[name.ours])
