"""Shapes of published backbones by name, for programs without their weights."""

from typing import Any

_LLAMA3: dict[str, Any] = {
  "model_type": "llama",
  "vocab_size": 128256,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  },
  "max_position_embeddings": 131072,
  "tie_word_embeddings": False,
}

# The contents of a Hugging Face config.json, as far as they are shapes.
SIZES: dict[str, dict[str, Any]] = {
  "smollm2_135m": {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
  },
  "qwen3_4b": {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
  },
  "llama3_8b": _LLAMA3
  | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 14336,
  },
  "llama3_70b": _LLAMA3
  | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
  },
}


def size(name: str) -> dict[str, Any]:
  """The config of a named size, as `Architecture.from_config` reads it.

  Raises:
    ValueError: no such size.
  """
  if name not in SIZES:
    raise ValueError(f"model.size {name!r}: use one of {', '.join(SIZES)}")
  return dict(SIZES[name])
