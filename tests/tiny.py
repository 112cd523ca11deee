"""Small stand-ins that tests share: tokenizers, a judge, its workdir."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from csrm_jax import checkpoint
from csrm_jax.data import template
from csrm_jax.data import tokenizer as tokenizer_lib
from csrm_jax.judge import Judge
from csrm_jax.model import lora, names, reward
from csrm_jax.model.backbone import Architecture
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Params, TrainState

TEXTS = (
  "Judge the last assistant message by this policy.",
  "Judge how helpful the last assistant message is.",
  "Disallowed: swearing; spoilers. Allowed: mild jokes. Required: sources.",
  "It was safe to answer. It was unsafe to answer. Verdict: safe, unsafe",
  "system user assistant tool Verdict? How do I bake bread at home?",
)


@functools.cache
def tokenizer(style: str = "chatml") -> tokenizer_lib.Tokenizer:
  """A byte-level BPE of about 600 ids in which " safe" is one token."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=["<|endoftext|>", *tokenizer_lib.STYLES[style], "<unused>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator([" ".join(TEXTS)] * 3, trainer)
  # As Qwen has them: control tokens that are not flagged as special.
  backend.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
  names = {"eos_token": tokenizer_lib.STYLES[style][-1]}
  return tokenizer_lib.Tokenizer(backend, names, f"tiny {style}")


def judge(
  style: str = "chatml", *, temperature: float = 1.0, **choices: Any
) -> Judge:
  """A random two-layer Llama whose scores are well away from zero.

  Args:
    style: chat format of its tokenizer.
    temperature: of the judge.
    choices: fields of `RewardModel` that differ.
  """
  words = tokenizer(style)
  safe, unsafe = template.verdict_ids(words)
  architecture = Architecture.from_config(
    {
      "model_type": "llama",
      "vocab_size": words.vocab_size,
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "intermediate_size": 64,
      "tie_word_embeddings": True,
      "max_position_embeddings": 2048,
    }
  )
  model = RewardModel(architecture, safe_ids=safe, unsafe_ids=unsafe, **choices)
  params = jax.jit(model.init)(jax.random.key(0))
  noise = jax.random.normal(jax.random.key(1), (2, 32))
  params["head"]["kernel"] = params["head"]["kernel"] + 0.3 * noise
  params["embed"]["embedding"] = 20 * params["embed"]["embedding"]
  return Judge(model, params, words, temperature, "compliance", "tiny")


def write_workdir(folder: Path, made: Judge) -> Path:
  """The parts of a trained workdir that scoring reads."""
  made.tokenizer.save(folder)
  described = reward.describe(made.model) | {
    "template_fingerprint": template.fingerprint(made.tokenizer),
    "tokenizer_fingerprint": made.tokenizer.fingerprint(),
    "temperature": made.temperature,
  }
  (folder / "model.json").write_text(json.dumps(described))
  state = TrainState(
    jnp.int32(7), made.params, {}, jnp.int32(0), jnp.int32(0), jnp.float32(0)
  )
  with checkpoint.open_manager(folder) as manager:
    checkpoint.save(manager, 7, state)
    manager.wait_until_finished()
  return folder


def write_base(folder: Path, made: Judge) -> Path:
  """The judge's backbone as a causal model in a Hugging Face folder."""
  made.tokenizer.save(folder)
  architecture = made.model.architecture
  config = architecture.to_config() | {"architectures": ["LlamaForCausalLM"]}
  (folder / "config.json").write_text(json.dumps(config))
  bare = lora.merge(made.params, made.model.lora_alpha)
  tensors = dict(names.to_hf(bare, architecture))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return folder


def with_noise(params: Params, leaves: tuple[str, ...]) -> Params:
  """Parameters in which the leaves of these names are random."""
  return {
    name: with_noise(child, leaves)
    if isinstance(child, dict)
    else jax.random.normal(jax.random.key(2), child.shape)
    if name in leaves
    else child
    for name, child in params.items()
  }
