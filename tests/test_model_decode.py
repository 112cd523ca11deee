"""Decoding with a cache says what full passes say; log-probabilities too."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from csrm_jax.model import decode, lora, pretrained
from csrm_jax.model.backbone import Architecture
from csrm_jax.model.reward import RewardModel
from tests import rows, runs, tiny
from tests.test_model_backbone import FAMILIES, SIZES, torch_model

LENGTHS = (3, 9, 5, 1)


@functools.cache
def made(vocab: int = 50, **changes):
  """A random model with clear preferences, and its parameters."""
  small = {"vocab_size": vocab, "model_type": "llama", "num_hidden_layers": 2}
  config = SIZES | small | changes
  model = RewardModel(Architecture.from_config(config), keep_lm_head=True)
  params = jax.jit(model.init)(jax.random.key(0))
  params["embed"] = jax.tree.map(lambda x: 50 * x, params["embed"])
  if not model.architecture.tied:
    params["lm_head"] = jax.tree.map(lambda x: 30 * x, params["lm_head"])
  return model, params


def prompts_of(lengths=LENGTHS, vocab: int = 50, width: int = 10):
  """Random prompts; behind them stand tokens that must not matter."""
  rng = np.random.default_rng(0)
  lengths = np.array(lengths, np.int32)
  return rng.integers(0, vocab, (len(lengths), width)).astype(np.int32), lengths


@functools.cache
def compiled(model, **options):
  return jax.jit(functools.partial(decode.generate, model, **options))


def run(model, params, prompts, lengths, *, seed=0, ids=None, **options):
  ids = np.arange(len(lengths)) if ids is None else np.array(ids)
  keys = decode.row_keys(jax.random.key(seed), ids)
  call = compiled(model, **{"max_new": 6, "temperature": 0.0} | options)
  return jax.tree.map(np.asarray, call(params, prompts, lengths, keys))


@functools.cache
def full_pass(model):
  return jax.jit(model.logits)


def next_logits(model, params, sequences) -> list[np.ndarray]:
  """Logits after each sequence, by a full pass over it."""
  lists = [[int(i) for i in s] for s in sequences]
  batch = rows.plain(lists, padding=16 - max(map(len, lists)))
  logits = np.asarray(full_pass(model)(params, batch))
  return [logits[i, len(s) - 1] for i, s in enumerate(lists)]


@pytest.mark.parametrize(
  "change",
  [{}, {"model_type": "qwen3", "head_dim": 8}, {"tie_word_embeddings": True}],
  ids=str,
)
def test_greedy_is_the_argmax_of_full_passes(change):
  model, params = made(**change)
  prompts, lengths = prompts_of()

  out = run(model, params, prompts, lengths)

  assert not out.stopped.any()
  np.testing.assert_array_equal(out.length, lengths + 6)
  for t in range(6):
    said = [row[: n + t] for row, n in zip(out.tokens, lengths, strict=True)]
    for i, logits in enumerate(next_logits(model, params, said)):
      assert out.tokens[i, lengths[i] + t] == logits.argmax(), (i, t)
  for row, prompt, n in zip(out.tokens, prompts, lengths, strict=True):
    np.testing.assert_array_equal(row[:n], prompt[:n])
    np.testing.assert_array_equal(row[n + 6 :], 0)
  # It did not just repeat one token.
  if not model.architecture.tied:
    assert len(np.unique(out.tokens[1, 9:15])) > 2


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_other_precisions_decode(dtype):
  model, params = made()
  low = dataclasses.replace(model, dtype=dtype)
  prompts, lengths = prompts_of()

  ours, full = (run(m, params, prompts, lengths) for m in (low, model))

  assert (ours.tokens == full.tokens).mean() > 0.8


@pytest.mark.parametrize("train_layers", [-1, 1])
def test_adapters_and_both_stacks(train_layers):
  plain, _ = made()
  model = dataclasses.replace(plain, lora_rank=2, train_layers=train_layers)
  params = jax.jit(model.init)(jax.random.key(0))
  params = tiny.with_noise(params, ("lora_b",))
  params["lm_head"] = jax.tree.map(lambda x: 30 * x, params["lm_head"])
  prompts, lengths = prompts_of()

  out = run(model, params, prompts, lengths)

  said = [row[: n + 5] for row, n in zip(out.tokens, lengths, strict=True)]
  for i, logits in enumerate(next_logits(model, params, said)):
    assert out.tokens[i, lengths[i] + 5] == logits.argmax()
  zero = jax.tree_util.tree_map_with_path(
    lambda path, x: 0 * x if path[-1].key in lora.LEAVES else x, params
  )
  without = run(model, zero, prompts, lengths)
  assert (without.tokens != out.tokens).any()


def test_rows_equal_rows_alone():
  model, params = made()
  prompts, lengths = prompts_of()
  options = {"temperature": 0.8, "top_p": 0.9, "stop_ids": (7, 8), "max_new": 9}

  together = run(model, params, prompts, lengths, ids=[4, 9, 2, 7], **options)

  for i, name in enumerate([4, 9, 2, 7]):
    one = run(
      model,
      params,
      prompts[i : i + 1],
      lengths[i : i + 1],
      ids=[name],
      **options,
    )
    for a, b in zip(one, together, strict=True):
      np.testing.assert_array_equal(a[0], b[i])
  # A shorter padding of the prompts changes nothing either.
  short = run(
    model, params, prompts[:, :9], lengths, ids=[4, 9, 2, 7], **options
  )
  np.testing.assert_array_equal(short.tokens, together.tokens[:, :-1])
  other = run(model, params, prompts, lengths, ids=[5, 9, 2, 7], **options)
  assert (other.tokens[0] != together.tokens[0]).any()
  np.testing.assert_array_equal(other.tokens[1:], together.tokens[1:])


def test_stop_tokens_end_a_row():
  model, params = made()
  prompts, lengths = prompts_of()
  free = run(model, params, prompts, lengths, max_new=8)
  # What row 1 says third and row 2 says first.
  stops = (int(free.tokens[1, 9 + 2]), int(free.tokens[2, 5]))

  out = run(
    model, params, prompts, lengths, max_new=8, stop_ids=stops, pad_id=49
  )

  for i, n in enumerate(lengths):
    said = free.tokens[i, n : n + 8]
    found = np.flatnonzero(np.isin(said, stops))
    count = found[0] + 1 if len(found) else 8
    assert out.length[i] == n + count
    assert out.stopped[i] == bool(len(found))
    np.testing.assert_array_equal(out.tokens[i, n : n + count], said[:count])
    np.testing.assert_array_equal(out.tokens[i, n + count :], 49)
  assert out.length[1] <= 9 + 3 and out.length[2] == 5 + 1


def test_the_loop_ends_once_all_rows_have_stopped(monkeypatch):
  model, params = made()
  prompts, lengths = prompts_of()
  steps = []
  choose = decode.choose

  def counting(logits, keys, **options):
    jax.debug.callback(lambda: steps.append(1))
    return choose(logits, keys, **options)

  monkeypatch.setattr(decode, "choose", counting)
  run(model, params, prompts, lengths, max_new=19, stop_ids=tuple(range(50)))
  jax.effects_barrier()
  assert len(steps) == 1
  run(model, params, prompts, lengths, max_new=20)
  jax.effects_barrier()
  assert len(steps) == 1 + 20


@pytest.mark.parametrize(
  "temperature, top_p", [(1.0, 1.0), (1.6, 1.0), (1.0, 0.7)]
)
def test_samples_follow_the_probabilities(temperature, top_p):
  model, params = made(vocab=6)
  params = params | {
    "lm_head": jax.tree.map(lambda x: x / 15, params["lm_head"])
  }
  count = 4000
  prompt = np.array([1, 4, 2], np.int32)
  options = {"max_new": 2, "temperature": temperature, "top_p": top_p}

  out = run(
    model, params, np.tile(prompt, (count, 1)), np.full(count, 3, np.int32),
    **options,
  )  # fmt: skip

  def expected(prefix):
    (logits,) = next_logits(model, params, [prefix])
    p = scipy.special.softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    return q / q.sum()

  first = out.tokens[:, 3]
  cases = [(first, expected(prompt))]
  likely = int(np.bincount(first).argmax())
  second = out.tokens[first == likely, 4]
  cases.append((second, expected([*prompt, likely])))
  for drawn, p in cases:
    seen = np.bincount(drawn, minlength=6)
    assert not seen[p == 0].any()
    assert (p > 0).sum() > 1
    result = scipy.stats.chisquare(seen[p > 0], len(drawn) * p[p > 0])
    assert result.pvalue > 1e-3
  if top_p < 1:
    assert (cases[0][1] == 0).any()
  # Successive draws of a row are apart, not one draw used twice.
  assert (first != out.tokens[:, 4]).any()


def test_nucleus_is_the_least_set():
  p = np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], np.float32)

  def kept(top_p):
    return np.asarray(decode.nucleus(jnp.asarray(p), top_p)).tolist()

  assert kept(0.3)[0] == [False, True, False, False]
  assert kept(0.41)[0] == [False, True, False, True]
  assert kept(0.85)[0] == [False, True, True, True]
  assert kept(0.9999)[0] == [True] * 4
  assert kept(0.3)[1] == [True] * 4  # ties stay together
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.full(500, 0.05), 20).astype(np.float32)
  got = np.asarray(decode.nucleus(jnp.asarray(p), 0.9))
  for row, chosen in zip(p, got, strict=True):
    order = np.argsort(-row)
    need = np.searchsorted(np.cumsum(row[order]), 0.9) + 1
    assert chosen.sum() == need and chosen[order[:need]].all()


@pytest.mark.parametrize(
  "options, named",
  [
    ({"max_new": 0}, "max_new = 0"),
    ({"temperature": -1.0}, "temperature = -1.0"),
    ({"top_p": 0.0}, "top_p = 0.0"),
    ({"max_new": 300}, "exceed the context of the backbone, 256"),
  ],
)
def test_bad_options_are_refused_by_name(options, named):
  model, params = made()
  with pytest.raises(ValueError, match=named):
    run(model, params, *prompts_of(), **options)


def test_no_output_embedding_is_refused():
  model, params = made()
  bare = dataclasses.replace(model, keep_lm_head=False)
  with pytest.raises(ValueError, match="keep_lm_head"):
    run(bare, params, *prompts_of())


# -- Log-probabilities -----------------------------------------------------


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[] if n == "llama" else [pytest.mark.slow])
    for n in FAMILIES
  ],
)
def test_logprobs_equal_transformers(name, tmp_path):
  theirs = torch_model(FAMILIES[name])
  import torch

  theirs.save_pretrained(tmp_path)
  weights = pretrained.open_weights(str(tmp_path))
  architecture = Architecture.from_config(weights.config, row_length=64)
  model = RewardModel(architecture, keep_lm_head=True)
  params = pretrained.load_params(weights, architecture, lm_head=True)
  tokens, length = prompts_of((23, 11), vocab=97, width=30)

  logprobs, entropy = jax.jit(
    functools.partial(decode.token_logprobs, model, chunk=8)
  )(params, tokens, length)

  for i, n in enumerate(length):
    with torch.no_grad():
      logits = theirs(torch.tensor(tokens[i : i + 1, :n].astype(int))).logits[0]
    expected = torch.log_softmax(logits, -1).double().numpy()
    said = expected[np.arange(n - 1), tokens[i, 1:n]]
    spread = -(np.exp(expected) * expected).sum(-1)[:-1]
    np.testing.assert_allclose(logprobs[i, 1:n], said, atol=1e-4)
    np.testing.assert_allclose(entropy[i, 1:n], spread, atol=1e-4)
    for x in (logprobs, entropy):
      assert x.dtype == jnp.float32 and x[i, 0] == 0
      np.testing.assert_array_equal(x[i, n:], 0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_of_what_was_sampled(temperature):
  """Each response is as likely as the distribution that it came from says."""
  model, params = made()
  prompts, lengths = prompts_of()
  out = run(model, params, prompts, lengths, temperature=temperature)

  logprobs, _ = decode.token_logprobs(
    model, params, out.tokens, out.length, temperature=temperature
  )

  for t in range(6):
    said = [row[: n + t] for row, n in zip(out.tokens, lengths, strict=True)]
    for i, logits in enumerate(next_logits(model, params, said)):
      at = lengths[i] + t
      expected = scipy.special.log_softmax(logits / temperature)
      said = out.tokens[i, at]
      np.testing.assert_allclose(logprobs[i, at], expected[said], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_logprob_gradients_do_not_depend_on_chunks_or_padding(chunk):
  model, params = made()
  tokens, length = prompts_of((9, 4), width=12)
  weight = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)

  def loss(params, tokens, chunk):
    logprobs, entropy = decode.token_logprobs(
      model, params, tokens, length, chunk=chunk
    )
    return jnp.sum(weight[:, : tokens.shape[1]] * (logprobs + 0.1 * entropy))

  def plain(params):
    total = 0.0
    for i, n in enumerate(length):
      logits = model.logits(params, rows.plain([tokens[i, :n].tolist()]))[0]
      logp = jax.nn.log_softmax(logits[:-1])
      said = logp[jnp.arange(n - 1), tokens[i, 1:n]]
      spread = -jnp.sum(jnp.exp(logp) * logp, -1)
      total += jnp.sum(weight[i, 1:n] * (said + 0.1 * spread))
    return total

  expected, slopes = jax.jit(jax.value_and_grad(plain))(params)
  grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
  # What stands in the padding, even no token at all, has no part in it.
  for padded in (tokens, np.where(np.arange(12) < length[:, None], tokens, -7)):
    value, got = grad(params, padded, chunk)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      got,
      slopes,
    )


def test_one_token_has_no_logprob():
  model, params = made()
  both = decode.token_logprobs(
    model, params, np.array([[3]], np.int32), np.array([1], np.int32)
  )
  for x in both:
    np.testing.assert_array_equal(x, [[0.0]])
  with pytest.raises(ValueError, match="chunk = 0"):
    decode.token_logprobs(
      model, params, np.array([[3]], np.int32), np.array([1], np.int32), chunk=0
    )


def test_the_whole_vocabulary_is_never_held():
  """Neither forward nor backward has an array [n l v], or anything near."""
  model, params = made(vocab=20_000)
  tokens, length = prompts_of((64, 64), vocab=20_000, width=64)

  def loss(params):
    return decode.token_logprobs(model, params, tokens, length, chunk=4)[
      0
    ].sum()

  def inner_of(params):
    for value in jax.tree.leaves(
      params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield inner

  def largest(jaxpr):
    sizes = [0]
    for eqn in jaxpr.eqns:
      sizes += [v.aval.size for v in eqn.outvars if hasattr(v.aval, "size")]
      for inner in inner_of(eqn.params):
        sizes.append(largest(inner))
    return max(sizes)

  jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
  kernel = 20_000 * 32
  assert largest(jaxpr) == kernel < 64 * 20_000 * 2


# -- Devices, the real model ----------------------------------------------

_SEVERAL = """
import sys
import jax, numpy as np
from csrm_jax import sharding
from csrm_jax.model import decode
from tests.test_model_decode import made, prompts_of

model, params = made(vocab=64)
prompts, lengths = prompts_of((3, 9, 5, 1, 2, 8, 7, 4), vocab=64)
keys = decode.row_keys(jax.random.key(5), np.arange(8))
mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
places = sharding.shardings(jax.eval_shape(lambda: params), mesh)
put = jax.device_put(params, places)
rows = sharding.batch_sharding(mesh)
inputs = jax.device_put((prompts, lengths, keys), rows)

def generate(temperature):
  def call(params, prompts, lengths, keys):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return decode.generate(
        model, params, prompts, lengths, keys, max_new=8,
        temperature=temperature, top_p=0.95, stop_ids=(7, 9),
      )
  return jax.jit(call, in_shardings=(places, rows, rows, rows))

def logprobs(params, tokens, length):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return decode.token_logprobs(model, params, tokens, length, chunk=4)

greedy = generate(0.0)(put, *inputs)
out = generate(1.0)(put, *inputs)
assert len(out.tokens.sharding.device_set) == 8
logp, entropy = jax.jit(logprobs)(put, out.tokens, out.length)
np.savez(
  sys.argv[1], greedy=greedy.tokens, tokens=out.tokens, length=out.length,
  stopped=out.stopped, logp=logp, entropy=entropy,
)
"""


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
  file = tmp_path / "out.npz"

  runs.on_devices(_SEVERAL, file)

  several = np.load(file)
  model, params = made(vocab=64)
  prompts, lengths = prompts_of((3, 9, 5, 1, 2, 8, 7, 4), vocab=64)
  again = functools.partial(
    run, model, params, prompts, lengths,
    seed=5, max_new=8, top_p=0.95, stop_ids=(7, 9),
  )  # fmt: skip
  greedy, out = again(), again(temperature=1.0)
  np.testing.assert_array_equal(several["greedy"], greedy.tokens)
  for name in ("tokens", "length", "stopped"):
    np.testing.assert_array_equal(several[name], getattr(out, name))
  logp, entropy = decode.token_logprobs(
    model, params, out.tokens, out.length, chunk=4
  )
  np.testing.assert_allclose(several["logp"], logp, atol=1e-4)
  np.testing.assert_allclose(several["entropy"], entropy, atol=1e-4)


@pytest.mark.slow
def test_greedy_equals_transformers_on_smollm2():
  torch = pytest.importorskip("torch")
  import transformers

  from csrm_jax.data import tokenizer as tokenizers

  path = pretrained.smollm2_path()
  theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  words = tokenizers.load("smollm2")
  end = words.special("<|im_end|>")
  asked = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea and the people who live beside it.",
    "Say hello.",
  )
  ids = [
    words.encode_marked(
      f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    for text in asked
  ]
  weights = pretrained.open_weights("smollm2")
  architecture = Architecture.from_config(weights.config)
  model = RewardModel(architecture)
  params = pretrained.load_params(weights, architecture)
  lengths = np.array([len(i) for i in ids], np.int32)
  prompts = np.zeros((4, 32), np.int32)
  for row, i in zip(prompts, ids, strict=True):
    row[: len(i)] = i

  out = run(model, params, prompts, lengths, max_new=24, stop_ids=(end,))

  for i, prompt in enumerate(ids):
    with torch.no_grad():
      (expected,) = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False, max_new_tokens=24, eos_token_id=end, pad_token_id=end,
      ).tolist()  # fmt: skip
    assert out.tokens[i, : out.length[i]].tolist() == expected, asked[i]
    assert out.stopped[i] == (expected[-1] == end)
  assert out.stopped.any() and not out.stopped.all()
