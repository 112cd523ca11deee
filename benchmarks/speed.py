"""Speed against plain transformers + PyTorch, on the same pairs, in one run.

python benchmarks/speed.py train --rows=PAIRS.jsonl.gz --output=FILE.json
python benchmarks/speed.py decode --output=FILE.json

Ours packs the pairs into rows in which shared prefixes are computed once;
PyTorch takes length-grouped batches of separate sequences. The model, its
weights, the token ids, the loss, the optimizer and the machine are the same.
"""

import argparse
import collections
import gzip
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import machine
import numpy as np
import speed_rollouts

from csrm_jax import config as configs
from csrm_jax import errors
from csrm_jax.data import template, tokenizer, trie
from csrm_jax.model import names, reward
from csrm_jax.spec import Spec
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import step as steps
from csrm_jax.types import Batch, Example, Pair, Segment

_SPECS = Path(__file__).parent.parent / "specs"
_SPEC_FILES = ("social_network.yaml", "kids_tutor.yaml")  # 300 tokens together
_LR, _DECAY, _CLIP, _BETAS = 1e-6, 0.01, 1.0, (0.9, 0.98)
_TOLERANCE = 1e-3  # of gradients, relative
PACKAGES = ("jax", "jaxlib", "torch", "transformers")
_WEIGHTS = {"resp": 1.0}  # the loss: mean Bradley-Terry nats over the pairs

Ids = tuple[int, ...]


class Side(NamedTuple):
  """One of the two programs.

  Attributes:
    run: does the work of one repetition and returns the tokens it computed,
      padding included.
    check: loss and gradients of a few pairs, under Hugging Face names.
  """

  run: Callable[[Any], int]
  check: Callable[[Any], tuple[float, dict[str, np.ndarray]]]


def read_families(path: str) -> dict[str, list[tuple[str, str]]]:
  """Distinct (chosen, rejected) by prompt, in the order of the file."""
  families: dict[str, dict[tuple[str, str], None]] = {}
  opened = gzip.open if path.endswith(".gz") else open
  with opened(path, "rt", encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      try:
        row = json.loads(line)
        pair = (row["chosen"], row["rejected"])
        families.setdefault(row["prompt"], {})[pair] = None
      except (ValueError, KeyError) as error:
        raise ValueError(
          f"{path}, line {number}: {error!r}; every line is a JSON object with"
          " prompt, chosen and rejected"
        ) from error
  if not families:
    raise ValueError(f"{path}: no rows; name a file of preference pairs")
  return {prompt: list(pairs) for prompt, pairs in families.items()}


def spec_text() -> str:
  """A spec of about 300 tokens from two of our files."""
  specs = [Spec.read(_SPECS / name) for name in _SPEC_FILES]
  return Spec(rules=tuple(r for s in specs for r in s.rules)).render()


def to_examples(
  families: dict[str, list[tuple[str, str]]],
  words: tokenizer.Tokenizer,
  *,
  longest: int,
) -> tuple[list[Example], int]:
  """Families as token sequences, and the pairs left out as too long."""
  spec, out, dropped = spec_text(), [], 0
  for number, (prompt, pairs) in enumerate(families.items()):
    slots: dict[Ids, int] = {}
    kept: list[Pair] = []
    for texts in pairs:
      ids = []
      for text in texts:
        messages = [
          {"role": "user", "content": prompt},
          {"role": "assistant", "content": text},
        ]
        ids.append(tuple(template.encode(words, messages, spec)))
      if max(map(len, ids)) > longest or ids[0] == ids[1]:
        dropped += 1
        continue
      win, lose = (slots.setdefault(i, len(slots)) for i in ids)
      kept.append(Pair(win, lose, "resp"))
    if kept:
      segments = tuple(Segment(i) for i in slots)
      out.append(Example(str(number), segments, tuple(kept)))
  return out, dropped


def pack(examples: Sequence[Example], args: argparse.Namespace) -> trie.Packed:
  return trie.pack(
    examples, row_length=args.row_length, slots=args.slots, pairs=args.pairs
  )


def row(packed: trie.Packed, index: int) -> Batch:
  return jax.tree.map(lambda x: jnp.asarray(x[index : index + 1]), packed.batch)


def pairs_of(
  packed: trie.Packed, index: int, examples: Sequence[Example]
) -> list[tuple[Ids, Ids]]:
  """The (preferred, rejected) token ids of one packed row."""
  slots = [examples[e].segments[s].tokens for e, s in packed.where[index]]
  used = packed.batch.pair_weight[index] > 0
  return [
    (slots[win], slots[lose]) for win, lose in packed.batch.pair[index][used]
  ]


def padded_batches(
  pairs: Sequence[tuple[Ids, Ids]], size: int, pad: int
) -> list[np.ndarray]:
  """Length-grouped batches [2 n, l] of `size` sequences, preferred ones first.

  Both sequences of a pair stay in one batch: their loss needs both.
  """
  ordered = sorted(pairs, key=lambda p: max(map(len, p)))
  out = []
  for start in range(0, len(ordered), size // 2):
    some = ordered[start : start + size // 2]
    sequences = [p[0] for p in some] + [p[1] for p in some]
    ids = np.full((len(sequences), max(map(len, sequences))), pad, np.int64)
    for i, s in enumerate(sequences):
      ids[i, : len(s)] = s
    out.append(ids)
  random.Random(0).shuffle(out)
  return out


def ours(
  model: reward.RewardModel, params: Any, task: str, args: argparse.Namespace
) -> Side:
  """Our step on packed rows, one row each."""
  optimizer = optimizers.make_optimizer(
    lr=_LR, steps=10**6, b1=_BETAS[0], b2=_BETAS[1],
    weight_decay=_DECAY, clip=_CLIP,
  )  # fmt: skip
  gradients = jax.jit(
    lambda params, batch: steps.loss_and_gradients(
      model, params, batch, weights=_WEIGHTS
    )
  )
  forward = jax.jit(model.apply)
  step = jax.jit(
    lambda state, batch: steps.train_step(
      state, batch, model=model, optimizer=optimizer, weights=_WEIGHTS
    ),
    donate_argnums=0,
  )
  held = {}
  if task == "train":  # a copy: the step consumes its buffers
    copied = jax.tree.map(jnp.copy, params)
    held["state"] = steps.init_state(copied, model, optimizer)

  def run(batches: Sequence[Batch]) -> int:
    for batch in batches:
      if task == "score":
        jax.block_until_ready(forward(params, batch))
        continue
      held["state"], metrics = step(held["state"], batch)
      if not np.isfinite(float(metrics["loss"])):
        raise FloatingPointError(f"our loss is {metrics['loss']}")
    return len(batches) * args.row_length

  def check(batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    loss, _, tree = gradients(params, batch)
    named = dict(names.to_hf(tree, model.architecture))
    named[names.SCORE] = np.asarray(tree["head"]["kernel"][:1])
    return float(loss), named

  return Side(run, check)


def plain_torch(
  model: reward.RewardModel, params: Any, task: str, pad: int
) -> Side:
  """`LlamaForSequenceClassification`, as transformers builds it."""
  import torch
  from transformers import LlamaConfig, LlamaForSequenceClassification

  torch.set_num_threads(os.cpu_count() or 1)
  described = model.architecture.to_config()
  described |= {"num_labels": 1, "pad_token_id": pad, "use_cache": False}
  described["bos_token_id"] = described["eos_token_id"] = None
  net = LlamaForSequenceClassification(LlamaConfig(**described)).float()
  weights = {
    name: torch.tensor(tensor)
    for name, tensor in names.to_hf(params, model.architecture)
  }
  weights[names.SCORE] = torch.tensor(np.asarray(params["head"]["kernel"][:1]))
  net.load_state_dict(weights, strict=True)
  net.train()  # SmolLM2 has no dropout
  optimizer = torch.optim.AdamW(
    net.parameters(), lr=_LR, betas=_BETAS, weight_decay=_DECAY, fused=True
  )

  def bradley_terry(ids: np.ndarray):
    # No mask: padding is on the right, where a causal model does not look,
    # and without one PyTorch takes its faster causal kernel.
    scores = net(input_ids=torch.from_numpy(ids)).logits[:, 0]
    win, lose = scores.chunk(2)
    return torch.nn.functional.softplus(lose - win).mean()

  def run(batches: Sequence[np.ndarray]) -> int:
    for ids in batches:
      if task == "score":
        with torch.inference_mode():
          net(input_ids=torch.from_numpy(ids))
        continue
      optimizer.zero_grad(set_to_none=True)
      loss = bradley_terry(ids)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(net.parameters(), _CLIP)
      optimizer.step()
      if not np.isfinite(loss.item()):
        raise FloatingPointError(f"torch's loss is {loss.item()}")
    return sum(ids.size for ids in batches)

  def check(ids: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    net.zero_grad(set_to_none=True)
    loss = bradley_terry(ids)
    loss.backward()
    named = {
      name: p.grad.numpy().copy()
      for name, p in net.named_parameters()
      if p.grad is not None
    }
    return loss.item(), named

  return Side(run, check)


def compare_gradients(
  mine: tuple[float, dict[str, np.ndarray]],
  theirs: tuple[float, dict[str, np.ndarray]],
) -> dict[str, Any]:
  """Relative difference |ours - torch| / |torch| of every tensor.

  Raises:
    RuntimeError: where tensors are missing or differ by more than 1e-3.
  """
  if mine[1].keys() != theirs[1].keys():
    odd = sorted(mine[1].keys() ^ theirs[1].keys())
    raise RuntimeError(f"only one side has a gradient of {odd[0]}")
  errors_of = {
    name: float(np.linalg.norm(mine[1][name] - g) / np.linalg.norm(g))
    for name, g in theirs[1].items()
  }
  worst = max(errors_of, key=lambda name: errors_of[name])
  loss_error = abs(mine[0] - theirs[0]) / abs(theirs[0])
  if not max(errors_of[worst], loss_error) <= _TOLERANCE:
    raise RuntimeError(
      f"the two sides compute different things: loss {mine[0]} and "
      f"{theirs[0]}, gradient of {worst} off by {errors_of[worst]:.2g}"
    )
  return {
    "tensors": len(errors_of),
    "max_relative_error": errors_of[worst],
    "worst_tensor": worst,
    "loss_ours": mine[0],
    "loss_torch": theirs[0],
  }


def choose_batch(
  torch_side: Side,
  pairs: Sequence[tuple[Ids, Ids]],
  sizes: Sequence[int],
  pad: int,
) -> tuple[int, dict[str, float]]:
  """The fastest batch size, and pairs/s of each if there are several."""
  # Every size sees the same pairs, so many that all divide them.
  pairs = list(pairs)[: max(sizes) // 2]
  torch_side.run(padded_batches(pairs[:1], 2, pad))
  speeds: dict[str, float] = {}
  for size in sizes if len(sizes) > 1 else ():
    batches = padded_batches(pairs, size, pad)
    start = time.perf_counter()
    torch_side.run(batches)
    speeds[str(size)] = len(pairs) / (time.perf_counter() - start)
    say(f"torch, {size} sequences: {speeds[str(size)]:.3f} pairs/s")
  best = max(sizes, key=lambda size: speeds.get(str(size), 0.0))
  return best, speeds


def say(text: str) -> None:
  print(text, flush=True)


def summary(values: Iterable[float]) -> dict[str, float]:
  values = list(values)
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Both sides, interleaved; the content of the output file."""
  words = tokenizer.load("smollm2")
  families = read_families(args.rows)
  examples, dropped = to_examples(families, words, longest=args.max_tokens)
  packed = pack(examples, args)
  count = len(packed.where)
  order = list(range(count))
  random.Random(args.seed).shuffle(order)
  need = args.rows_per_repetition * args.repetitions + 1
  if count < need:
    raise ValueError(
      f"{args.rows} fills {count} rows of {args.row_length} tokens, {need} are"
      " needed; lower --rows_per_repetition or --repetitions"
    )

  config = configs.default().model
  config.train_embedding = True
  config.remat = "dots"
  safe, unsafe = template.verdict_ids(words)
  model, load = reward.make(
    config, safe_ids=safe, unsafe_ids=unsafe, row_length=args.row_length
  )
  params = load(jax.random.key(0))
  pad = words.special(template.pad_token(words))
  sides = {
    "ours": ours(model, params, args.task, args),
    "torch": plain_torch(model, params, args.task, pad),
  }

  # Two small families together: a trie with branches at two depths.
  small = sorted(
    (e for e in examples if len(e.pairs) > 1),
    key=lambda e: sum(len(s.tokens) for s in e.segments),
  )[:2]
  few = pack(small, args)
  some = pairs_of(few, 0, small)
  agreement = compare_gradients(
    sides["ours"].check(row(few, 0)),
    sides["torch"].check(padded_batches(some, 2 * len(some), pad)[0]),
  )
  say(f"gradients agree: {agreement}")

  warm = pairs_of(packed, order[0], examples)
  sides["ours"].run([row(packed, order[0])])  # compiles
  best, speeds = choose_batch(sides["torch"], warm, args.batches, pad)

  rates = collections.defaultdict(list)
  tokens = collections.Counter()
  measured = 0
  for repetition in range(args.repetitions):
    first = 1 + repetition * args.rows_per_repetition
    chosen = order[first : first + args.rows_per_repetition]
    pairs = [p for i in chosen for p in pairs_of(packed, i, examples)]
    measured += len(pairs)
    work = {
      "ours": [row(packed, i) for i in chosen],
      "torch": padded_batches(pairs, best, pad),
    }
    for side in ("ours", "torch"):
      start = time.perf_counter()
      tokens[side] += sides[side].run(work[side])
      rates[side].append(len(pairs) / (time.perf_counter() - start))
      say(f"{side}: {rates[side][-1]:.3f} pairs/s ({len(pairs)} pairs)")

  ratios = [a / b for a, b in zip(rates["ours"], rates["torch"], strict=True)]
  everything = [p for i in range(count) for p in pairs_of(packed, i, examples)]
  result = {
    "task": args.task,
    "ratio": statistics.median(rates["ours"])
    / statistics.median(rates["torch"]),
    "ratio_by_repetition": summary(ratios),
    **{s: {"pairs_per_s": summary(r), "all": r} for s, r in rates.items()},
    "tokens_ours": tokens["ours"],
    "tokens_torch": tokens["torch"],
    "pairs_measured": measured,
    "gradients": agreement,
    "torch_batch": {"sequences": best, "pairs_per_s_by_sequences": speeds},
    "whole_set": {
      "pairs": len(everything),
      "families": len(examples),
      "pairs_left_out": dropped,  # longer than max_tokens, or equal twice
      "rows": count,
      "tokens_ours": count * args.row_length,
      "tokens_torch_unpadded": sum(len(s) for p in everything for s in p),
      "tokens_torch": sum(
        b.size for b in padded_batches(everything, best, pad)
      ),
    },
    "row_length": args.row_length,
    "spec_tokens": len(words.encode(spec_text())),
    "dtype": "float32",
  }
  return result | machine.describe(PACKAGES)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "task", choices=("train", "score", "decode", "judge_cache")
  )
  parser.add_argument(
    "--rows", default="", help="train, score: pairs, JSON lines (.gz)"
  )
  parser.add_argument("--output", required=True)
  parser.add_argument("--row_length", type=int, default=2048, help="tokens")
  parser.add_argument("--slots", type=int, default=64)
  parser.add_argument("--pairs", type=int, default=64)
  parser.add_argument("--max_tokens", type=int, default=1024, help="a sequence")
  parser.add_argument("--repetitions", type=int, default=4)
  parser.add_argument("--rows_per_repetition", type=int, default=1)
  parser.add_argument(
    "--batches",
    type=lambda text: [int(x) for x in text.split(",")],
    default=[4, 8, 16],
    help="sequences in a batch of torch; of several the fastest is used",
  )
  parser.add_argument("--seed", type=int, default=0)
  for name, default, what in (
    ("rows_per_batch", 8, "decode, judge_cache: prompts or responses"),
    ("prompt_length", 32, "decode: room for a prompt, tokens"),
    ("new_tokens", 64, "decode: tokens of each response"),
    ("specs", 50, "judge_cache: specs of about 200 tokens"),
  ):
    parser.add_argument(f"--{name}", type=int, default=default, help=what)
  args = parser.parse_args()
  with errors.told():
    if any(size < 2 or size % 2 for size in args.batches):
      raise ValueError(f"--batches={args.batches}: use even numbers from 2")
    if args.task in ("train", "score") and not args.rows:
      raise ValueError(f"{args.task} needs --rows: a file of preference pairs")
    result = {
      "decode": speed_rollouts.decode,
      "judge_cache": speed_rollouts.judge_cache,
    }.get(args.task, measure)(args)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
  shown = ("ours", "torch", "ratio")
  print(json.dumps({k: result[k] for k in shown if k in result}))


if __name__ == "__main__":
  main()
