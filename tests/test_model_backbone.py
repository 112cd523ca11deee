"""The backbone computes what transformers computes, and says what it cannot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax.model import pretrained
from csrm_jax.model.backbone import (
  Architecture,
  init_stack,
  mixed_logits,
  mixed_matmul,
  run_stack,
)
from csrm_jax.model.reward import RewardModel
from tests import rows

SIZES = {
  "vocab_size": 97,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
# What sets each family apart, as its config.json says it.
FAMILIES = {
  "llama": {"model_type": "llama"},
  "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
  "llama3 rope": {"model_type": "llama", "rope_parameters": LLAMA3},
  "llama bias": {"model_type": "llama", "attention_bias": True},
  "llama one head": {"model_type": "llama", "num_key_value_heads": 4},
  "mistral": {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
  "mistral long window": {"model_type": "mistral", "sliding_window": 64},
  "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
  "qwen2 theta": {"model_type": "qwen2", "rope_theta": 1e6},
  "qwen3": {"model_type": "qwen3", "head_dim": 16},
  "qwen3 bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
}


def torch_model(config: dict, seed: int = 0):
  """A transformers model with every parameter random, norms and biases too."""
  torch = pytest.importorskip("torch")
  import transformers

  config = transformers.AutoConfig.for_model(**(SIZES | config))
  config._attn_implementation = "eager"
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter) * 0.2
      parameter.copy_(1.0 + noise if "norm" in name else noise)
  return model


def torch_logits(model, ids: list[int]) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
  theirs = torch_model(FAMILIES[name])
  theirs.save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(0, 97, 50).tolist()

  weights = pretrained.open_weights(str(tmp_path))
  architecture = Architecture.from_config(weights.config, row_length=64)
  model = RewardModel(architecture, keep_lm_head=True)
  params = pretrained.load_params(weights, architecture, lm_head=True)
  # The padding behind and the shorter row beside change nothing.
  ours = jax.jit(model.logits)(params, rows.plain([ids, ids[:9]], padding=5))

  expected = torch_logits(theirs, ids)
  assert np.ptp(expected) > 1.0
  np.testing.assert_allclose(ours[0, :50], expected, atol=1e-4, rtol=0)
  np.testing.assert_allclose(ours[1, :9], expected[:9], atol=1e-4, rtol=0)
  np.testing.assert_array_equal(
    np.argmax(ours[0, :50], -1), np.argmax(expected, -1)
  )


@pytest.mark.parametrize("name", FAMILIES)
def test_config_goes_round(name):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoConfig.for_model(**(SIZES | FAMILIES[name]))

  ours = Architecture.from_config(theirs.to_dict(), row_length=64)
  again = Architecture.from_config(ours.to_config(), row_length=64)
  read = transformers.AutoConfig.for_model(**ours.to_config()).to_dict()

  assert again == ours
  written = theirs.to_dict()
  for key in ours.to_config().keys() & written.keys():
    if key not in ("architectures", "head_dim", "rope_parameters"):
      assert read[key] == written[key], key
  for key, value in written["rope_parameters"].items():
    assert read["rope_parameters"][key] == pytest.approx(value), key


def test_config_reads_the_older_spelling():
  scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
  old = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": scaling}
  new = {"model_type": "llama", "rope_parameters": LLAMA3}

  read = Architecture.from_config(SIZES | old)

  assert read == Architecture.from_config(SIZES | new)
  assert read.rope_scaling is not None


@pytest.mark.parametrize(
  ("config", "named"),
  [
    ({"model_type": "gemma3"}, "model_type 'gemma3'"),
    ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
    ({"model_type": "mistral", "sliding_window": 63}, "sliding_window = 63"),
    (
      {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 1,
      },
      "sliding_window = 32",
    ),
    (
      {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}},
      "rope type 'linear'",
    ),
    (
      {"model_type": "qwen3", "rope_parameters": {"rope_type": "yarn"}},
      "rope type 'yarn'",
    ),
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias = True"),
    (
      {"model_type": "llama", "partial_rotary_factor": 0.5},
      "partial_rotary_factor = 0.5",
    ),
    (
      {"model_type": "llama", "quantization_config": {"bits": 4}},
      "quantization_config",
    ),
  ],
)
def test_unsupported_features_are_refused_by_name(config, named):
  with pytest.raises(ValueError, match="not supported") as error:
    Architecture.from_config(SIZES | config, row_length=64)

  assert named in str(error.value)


def test_unused_sliding_window_is_accepted():
  config = {"model_type": "qwen2", "use_sliding_window": False}

  read = Architecture.from_config(SIZES | config | {"sliding_window": 8})

  assert read.sliding_window == 0


def test_row_longer_than_the_window_is_refused():
  config = SIZES | {"model_type": "mistral", "sliding_window": 16}
  architecture = Architecture.from_config(config, row_length=16)
  model = RewardModel(architecture)
  params = jax.jit(model.init)(jax.random.key(0))

  jax.jit(model.apply)(params, rows.plain([[1] * 16]))
  with pytest.raises(ValueError, match="sliding_window = 16"):
    jax.jit(model.apply)(params, rows.plain([[1] * 17]))


@pytest.fixture(scope="module")
def tiny() -> Architecture:
  config = SIZES | {"model_type": "qwen3", "head_dim": 8}
  return Architecture.from_config(config)


def random_stack(architecture, layers):
  init = jax.jit(init_stack, static_argnums=(1, 2))
  return init(jax.random.key(0), architecture, layers)


def _grad(architecture, params, *, remat):
  batch = rows.plain([[3, 1, 4, 1, 5], [9, 2, 6]], padding=2)
  x = jax.random.normal(jax.random.key(1), (*batch.tokens.shape, 32))

  def loss(params):
    y = run_stack(
      architecture,
      params,
      x,
      batch.positions,
      batch.subtree_end,
      kind="dense",
      remat=remat,
    )
    return jnp.mean(y**2)

  return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_remat_keeps_the_gradient(tiny, remat):
  params = random_stack(tiny, 3)

  expected = _grad(tiny, params, remat="none")

  got = _grad(tiny, params, remat=remat)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
    got,
    expected,
  )
  assert all(np.any(leaf) for leaf in jax.tree.leaves(got))


def test_unknown_remat_is_refused(tiny):
  params = random_stack(tiny, 1)

  with pytest.raises(ValueError, match="remat 'full'"):
    _grad(tiny, params, remat="full")


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_lower_precision_stays_close(tiny, dtype):
  model = RewardModel(tiny, safe_ids=(3,), unsafe_ids=(5,))
  params = jax.jit(model.init)(jax.random.key(0))
  low = dataclasses.replace(model, dtype=dtype)
  batch = rows.plain([[3, 1, 4, 1, 5]])

  got, expected = (jax.jit(m.apply)(params, batch) for m in (low, model))

  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, atol=0.05 * np.ptp(expected))
  assert not np.array_equal(got, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_mixed_products_round_operands_alone(turned):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (48, 32))
  w = jax.random.normal(keys[1], (32, 64))
  dy = jax.random.normal(keys[2], (48, 64))
  a, b, c = (np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (x, w, dy))

  if turned:
    y, vjp = jax.vjp(mixed_logits, x, w.T)
    dx, dw = vjp(dy)
    dw = dw.T
  else:
    y, vjp = jax.vjp(mixed_matmul, x, w)
    dx, dw = vjp(dy)

  assert y.dtype == dx.dtype == dw.dtype == jnp.float32
  np.testing.assert_allclose(y, a @ b, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dx, c @ b.T, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dw, a.T @ c, rtol=1e-5, atol=1e-4)
