"""Speed of rollouts: decoding against transformers, a judge that caches.

Called by `speed.py decode` and `speed.py judge_cache`.
"""

import argparse
import collections
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np

from csrm_jax import score
from csrm_jax.align import rollout
from csrm_jax.data import tokenizer
from csrm_jax.judge import SHIPPED, load
from csrm_jax.model import names, pretrained
from csrm_jax.model.backbone import Architecture
from csrm_jax.model.reward import RewardModel
from csrm_jax.score_cached import SpecCache
from csrm_jax.spec import Spec

PACKAGES = ("jax", "jaxlib", "torch", "transformers")
_SPECS = Path(__file__).parent.parent / "specs"
_SPEC_TOKENS = 200
_TOPICS = (
  "the tides", "a bicycle chain", "old maps", "bread without yeast", "a choir",
  "the night train", "garden snails", "a broken clock",
)  # fmt: skip


def _asked(count: int) -> list[list[dict[str, str]]]:
  forms = ("Tell me about {}.", "Write a long story about {} and a small town.")
  return [
    [{"role": "user", "content": forms[i % 2].format(_TOPICS[i % 8])}]
    for i in range(count)
  ]


def _summary(values: list[float]) -> dict[str, float]:
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def decode(args: argparse.Namespace) -> dict[str, Any]:
  """Greedy decoding of SmolLM2, float32, both sides by turns.

  Neither side stops early, so both compute the same number of tokens; what
  they say is compared.
  """
  words = tokenizer.load("smollm2")
  weights = pretrained.open_weights("smollm2")
  architecture = Architecture.from_config(weights.config)
  params = pretrained.load_params(weights, architecture)
  asked, lengths, _ = rollout.encode(
    words, _asked(args.rows_per_batch), spec=None, room=args.prompt_length,
    on_long="error",
  )  # fmt: skip
  run = rollout._compiled(
    RewardModel(architecture), args.new_tokens, 0.0, 1.0, (), None
  )
  keys = rollout.decode.row_keys(jax.random.key(0), np.arange(len(asked)))
  theirs = _torch_side(architecture, params, asked, lengths, args.new_tokens)

  def ours() -> list[list[int]]:
    out = jax.tree.map(np.asarray, run(params, asked, lengths, keys))
    return [
      row[n : n + args.new_tokens].tolist()
      for row, n in zip(out.tokens, lengths, strict=True)
    ]

  sides = {"ours": ours, "torch": theirs}
  start = time.perf_counter()
  first = ours()
  compiled = time.perf_counter() - start
  said = {"ours": first, "torch": theirs()}
  same = np.mean(np.array(said["ours"]) == np.array(said["torch"]))
  rates = collections.defaultdict(list)
  for _ in range(args.repetitions):
    for side, call in sides.items():
      start = time.perf_counter()
      call()
      seconds = time.perf_counter() - start
      rates[side].append(len(asked) * args.new_tokens / seconds)
      print(f"{side}: {rates[side][-1]:.1f} tokens/s", flush=True)
  return {
    "task": "decode",
    "ratio": statistics.median(rates["ours"])
    / statistics.median(rates["torch"]),
    **{
      side: {"tokens_per_s": _summary(values), "all": values}
      for side, values in rates.items()
    },
    "share_of_equal_tokens": float(same),
    "first_call_s": compiled,  # compilation included
    "batch": len(asked),
    "new_tokens": args.new_tokens,
    "prompt_tokens": lengths.tolist(),
    "dtype": "float32",
  } | machine.describe(PACKAGES)


def _torch_side(
  architecture: Architecture,
  params: Any,
  asked: np.ndarray,
  lengths: np.ndarray,
  new_tokens: int,
) -> Any:
  """`generate` of transformers on the same prompts, padded on the left."""
  import os

  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.set_num_threads(os.cpu_count() or 1)
  described = architecture.to_config()
  described["bos_token_id"] = described["eos_token_id"] = None
  net: Any = LlamaForCausalLM(LlamaConfig(**described)).float().eval()
  tensors = {
    name: torch.tensor(value)
    for name, value in names.to_hf(params, architecture)
  }
  net.load_state_dict(tensors, strict=False)  # the tied output is no tensor
  longest = int(lengths.max())
  ids = torch.zeros(len(asked), longest, dtype=torch.long)
  mask = torch.zeros_like(ids)
  for i, n in enumerate(lengths.tolist()):
    ids[i, longest - n :] = torch.tensor(asked[i, :n])
    mask[i, longest - n :] = 1

  def run() -> list[list[int]]:
    with torch.inference_mode():
      out = net.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens,
        min_new_tokens=new_tokens, pad_token_id=0,
      )  # fmt: skip
    return out[:, longest:].tolist()

  return run


def _specs(words: tokenizer.Tokenizer, count: int) -> list[str]:
  """Different specs of about 200 tokens out of the rules of `specs/`."""
  rules = [
    line.split(": ", 1)[1]
    for file in sorted(_SPECS.glob("*.yaml"))
    for line in Spec.read(file).lines()
  ]
  specs = []
  for i in range(count):
    lines: list[str] = []
    while len(words.encode("\n".join(lines))) < _SPEC_TOKENS:
      rule = rules[(7 * i + len(lines)) % len(rules)]
      lines.append(f"S{len(lines) + 1}: {rule}")
    specs.append("\n".join(lines))
  return specs


def judge_cache(args: argparse.Namespace) -> dict[str, Any]:
  """Seconds a response and spec, `csrm_jax.score` and `SpecCache` by turns.

  `all` scores every response under every spec; `few` as a run with many
  constraints does, every response under two of them.
  """
  judge = load(SHIPPED)
  words = judge.tokenizer
  texts = [
    [
      *chat,
      {"role": "assistant", "content": " ".join(_TOPICS[: 2 + i % 6] * 2)},
    ]
    for i, chat in enumerate(_asked(args.rows_per_batch))
  ]
  result: dict[str, Any] = {"task": "judge_cache"}
  for count, case in ((1, "all"), (args.specs, "all"), (args.specs, "few")):
    specs = _specs(words, count)
    start = time.perf_counter()
    cache = SpecCache(judge, specs)
    jax.block_until_ready(cache._stores)
    built = time.perf_counter() - start
    observed = np.ones((len(texts), count), bool)
    if case == "few":
      observed = np.zeros_like(observed)
      for i in range(len(texts)):
        observed[i, [(5 * i) % count, (5 * i + 2) % count]] = True
    rows = [
      {"id": f"{i} {j}", "messages": texts[i], "spec": specs[j]}
      for i, j in zip(*np.nonzero(observed), strict=True)
    ]

    def plain(rows: Any = rows) -> np.ndarray:
      found = score.score_rows(judge, rows)
      return np.array([s.log_odds for s in found])

    def cached(cache: Any = cache, observed: Any = observed) -> np.ndarray:
      return cache.scores(texts, observed).log_odds[observed]

    apart = float(np.abs(plain() - cached()).max())  # compiles, too
    seconds = collections.defaultdict(list)
    for _ in range(args.repetitions):
      for name, call in (("score", plain), ("cached", cached)):
        start = time.perf_counter()
        call()
        seconds[name].append((time.perf_counter() - start) / len(texts))
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    entry = {
      "specs": count,
      "scored": int(observed.sum()),
      "seconds_a_response": {k: _summary(v) for k, v in seconds.items()},
      "ratio": medians["score"] / medians["cached"],
      "largest_difference": apart,
      "seconds_to_build": built,
      "spec_tokens": [len(words.encode(s)) for s in specs[:3]],
    }
    print(entry, flush=True)
    result[f"{count}_{case}"] = entry
  return result | {"responses": len(texts)} | machine.describe(PACKAGES)
