"""Adapters: no change at the start, equal when merged, trained alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.model import lora, names
from csrm_jax.model.backbone import Architecture
from csrm_jax.model.names import flatten
from csrm_jax.model.reward import RewardModel
from tests import rows

ARCHITECTURE = Architecture.from_config(
  {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
  }
)
PLAIN = RewardModel(
  ARCHITECTURE, train_layers=2, safe_ids=(1,), unsafe_ids=(2,)
)
ADAPTED = RewardModel(
  ARCHITECTURE,
  train_layers=2,
  lora_rank=3,
  lora_alpha=12.0,
  safe_ids=(1,),
  unsafe_ids=(2,),
)
BATCH = rows.plain([[9, 8, 7, 1], [2, 1]], padding=2)


@pytest.fixture(scope="module")
def params():
  return jax.jit(ADAPTED.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def moved(params):
  """Parameters whose adapters do something."""

  def move(path, x):
    key = jax.random.key(len(path))
    return jax.random.normal(key, x.shape) if path.endswith("lora_b") else x

  return names.unflatten({k: move(k, v) for k, v in flatten(params).items()})


def without_adapters(params):
  kept = {k: v for k, v in flatten(params).items() if "lora" not in k}
  return names.unflatten(kept)


def test_new_adapters_change_nothing(params):
  got = jax.jit(ADAPTED.apply)(params, BATCH)

  expected = jax.jit(PLAIN.apply)(without_adapters(params), BATCH)

  np.testing.assert_array_equal(got, expected)
  adapters = [k for k in flatten(params) if "lora_a" in k]
  assert len(adapters) == 7 and all(k.startswith("upper/") for k in adapters)
  a = np.asarray(params["upper"]["mlp"]["down"]["lora_a"])
  assert a.shape == (2, 24, 3)
  assert not np.array_equal(a[0], a[1])
  np.testing.assert_allclose(a.std(), 24**-0.5, rtol=0.3)


def test_merged_equals_adapted(moved):
  expected = jax.jit(ADAPTED.apply)(moved, BATCH)

  merged = lora.merge(moved, 12.0)

  got = jax.jit(PLAIN.apply)(merged, BATCH)
  untouched = jax.jit(PLAIN.apply)(without_adapters(moved), BATCH)
  assert flatten(merged).keys() == flatten(without_adapters(moved)).keys()
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert np.max(np.abs(got - untouched)) > 0.01


def test_merge_by_hand(moved):
  up = {
    k: np.asarray(v, np.float64) for k, v in moved["upper"]["mlp"]["up"].items()
  }

  got = lora.merge(moved, 12.0)["upper"]["mlp"]["up"]["kernel"]

  update = 12.0 / 3 * np.einsum("nir,nro->nio", up["lora_a"], up["lora_b"])
  np.testing.assert_allclose(got, up["kernel"] + update, rtol=1e-5, atol=1e-5)


def test_only_adapters_and_head_are_trained(params):
  trained, frozen = ADAPTED.split(params)

  paths = flatten(trained).keys()
  assert {k for k in paths if "lora" not in k} == {"head/kernel"}
  assert sum("lora" in k for k in paths) == 14
  assert not any("lora" in k for k in flatten(frozen))


def test_adapters_get_gradient_once_they_moved(moved):
  trained, frozen = ADAPTED.split(moved)

  def loss(trained):
    return jnp.sum(ADAPTED.apply(ADAPTED.join(trained, frozen), BATCH) ** 2)

  gradient = jax.jit(jax.grad(loss))(trained)

  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["upper"]))


def test_unmerged_adapters_are_not_exported(params):
  with pytest.raises(ValueError, match="lora_a: merge the adapters"):
    dict(names.to_hf(params, ARCHITECTURE))

  exported = dict(names.to_hf(lora.merge(params, 12.0), ARCHITECTURE))
  assert "model.layers.2.self_attn.q_proj.bias" in exported
