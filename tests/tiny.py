"""Small stand-ins that tests share: tokenizers of every chat format."""

import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from csrm_jax.data import tokenizer as tokenizer_lib

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
