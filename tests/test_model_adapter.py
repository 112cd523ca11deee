"""PEFT's layout: names, orientations, and what is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from csrm_jax.model import adapter, lora
from tests import tiny

JUDGE = tiny.judge(lora_rank=3, train_layers=1, lora_alpha=12.0)
PARAMS = tiny.with_noise(JUDGE.params, lora.LEAVES)
BASE = tiny.judge().params  # other layers, all in one stack


def held():
  """The file of the upper layer's adapters, with a score row."""
  tensors = dict(adapter.tensors(PARAMS["upper"], first=1))
  tensors[adapter.SCORE] = np.arange(32, dtype=np.float32)[None]
  return tensors


def made(tensors, rank=3, alpha=12.0):
  return adapter.Adapter(tensors, rank, alpha, {})


def test_names_and_shapes_are_those_of_peft():
  shapes = {name: x.shape for name, x in held().items()}

  layer = "base_model.model.model.layers.1."
  assert shapes[f"{layer}self_attn.q_proj.lora_A.weight"] == (3, 32)
  assert shapes[f"{layer}self_attn.k_proj.lora_B.weight"] == (16, 3)
  assert shapes[f"{layer}mlp.down_proj.lora_A.weight"] == (3, 64)
  assert shapes[f"{layer}mlp.down_proj.lora_B.weight"] == (32, 3)
  assert shapes.pop("base_model.model.score.weight") == (1, 32)
  assert len(shapes) == 14 and all(n.startswith(layer) for n in shapes)
  projections = ("down", "gate", "k", "o", "q", "up", "v")
  assert adapter.target_modules(PARAMS["upper"]) == [
    f"{name}_proj" for name in projections
  ]


def test_merge_by_hand():
  tensors = held()
  got = adapter.merge(BASE, made(tensors), origin="x")

  name = adapter.tensor_name("mlp/up/kernel", 1, "lora_a")
  a = tensors[name].astype(np.float64)
  b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
  before = np.asarray(BASE["upper"]["mlp"]["up"]["kernel"])
  after = np.asarray(got["upper"]["mlp"]["up"]["kernel"])
  np.testing.assert_array_equal(after[0], before[0])
  np.testing.assert_allclose(
    after[1], before[1] + (12 / 3) * (b @ a).T, rtol=1e-4, atol=1e-4
  )
  assert jax.tree.structure(got) == jax.tree.structure(BASE)
  head = np.asarray(got["head"]["kernel"])
  np.testing.assert_array_equal(head[0], np.arange(32))
  assert not np.any(head[1])


def test_fingerprint_knows_the_base_alone():
  cut = tiny.judge(train_layers=1).params
  of_base = adapter.fingerprint(PARAMS)
  other = BASE | {"final_norm": {"scale": BASE["final_norm"]["scale"] * 1.001}}

  assert of_base.startswith("sha256:") and len(of_base) == 71
  assert adapter.fingerprint(cut) == adapter.fingerprint(JUDGE.params)
  assert adapter.fingerprint(cut | {"head": {}}) == of_base
  assert adapter.fingerprint(other) != adapter.fingerprint(BASE)


def test_merge_refuses_what_has_no_place():
  q = adapter.tensor_name("attention/query/kernel", 1, "lora_a")
  whole = held()

  def merge(tensors, **kwargs):
    adapter.merge(BASE, made(tensors, **kwargs), origin="DIR")

  with pytest.raises(ValueError, match=r"layers.1.*q_proj.lora_A.*is missing"):
    merge({k: v for k, v in whole.items() if k != q})
  with pytest.raises(ValueError, match=r"score.weight' is missing"):
    merge({k: v for k, v in whole.items() if k != adapter.SCORE})
  with pytest.raises(ValueError, match=r"shape \(32, 3\).*ask for \(3, 32\)"):
    merge(whole | {q: whole[q].T})
  with pytest.raises(ValueError, match=r"ask for \(4, 32\)"):
    merge(whole, rank=4)
  deeper = q.replace("layers.1.", "layers.2.")
  with pytest.raises(ValueError, match=r"layers.2.*has no place in this base"):
    merge(whole | {deeper: whole[q]})


def test_read_refuses_adapters_of_other_kinds(tmp_path):
  config = {"r": 3, "lora_alpha": 12, "use_dora": False}
  (tmp_path / adapter.CONFIG).write_text(json.dumps(config))
  assert adapter.is_adapter(tmp_path)
  with pytest.raises(ValueError, match=r"an adapter without csrm.json; write"):
    adapter.read(tmp_path)

  (tmp_path / adapter.METADATA).write_text('{"head": "compliance"}')
  safetensors.numpy.save_file(held(), tmp_path / adapter.WEIGHTS)
  read = adapter.read(tmp_path)
  assert (read.rank, read.alpha) == (3, 12.0)
  assert read.described == {"head": "compliance"}
  assert read.tensors.keys() == held().keys()

  (tmp_path / adapter.CONFIG).write_text(json.dumps(config | {"use_dora": 1}))
  with pytest.raises(ValueError, match=r"adapter_config.json: field 'use_dora"):
    adapter.read(tmp_path)
