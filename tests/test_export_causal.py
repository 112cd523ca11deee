"""export/causal.py, and the chat template of data/prompt.py."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import checkpoint
from csrm_jax.align import agent as agents
from csrm_jax.align import rollout
from csrm_jax.align.run import align
from csrm_jax.data import prompt
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.export import causal
from csrm_jax.model import decode, lora, reward
from tests import tiny
from tests.test_align_offline import read, recipe, rows, said, user, write
from tests.test_data_template import HOSTILE, STYLES

pytestmark = pytest.mark.usefixtures("one_thread")


def policy(style="chatml", **choices):
  """A random policy with adapters that change it: (model, params, words)."""
  judge = tiny.judge(style, lora_rank=4, **choices)
  params = judge.model.with_adapters(judge.params, jax.random.key(3))
  return judge.model, tiny.with_noise(params, lora.LEAVES), judge.tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """By style: (folder, model, params, tokenizer)."""
  found = {}
  for style in STYLES:
    made = policy(style)
    folder = tmp_path_factory.mktemp(style) / "policy"
    causal.export_policy(*made, folder)
    found[style] = (folder, *made)
  return found


def test_transformers_gives_our_logits(written):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM

  folder, model, params, words = written["chatml"]
  theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
  assert type(theirs).__name__ == "LlamaForCausalLM"
  ids = prompt.encode(words, [user("How do I bake bread?")], "S1: Allowed: x.")
  batch = decode.chains(
    jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
  )
  ours = model.logits(params, batch)[0]
  with torch.no_grad():
    found = theirs(torch.tensor([ids])).logits[0].numpy()
  np.testing.assert_allclose(found, ours, atol=1e-4, rtol=1e-4)
  plain = model.logits(lora_free(params), batch)[0]
  assert np.abs(np.asarray(plain) - found).max() > 0.1  # adapters count


def lora_free(params):
  return {
    k: lora_free(v)
    if isinstance(v, dict)
    else jnp.zeros_like(v)
    if k in lora.LEAVES
    else v
    for k, v in params.items()
  }


@pytest.mark.parametrize("style", STYLES)
def test_chat_template_is_our_prompt(written, style):
  from transformers import AutoTokenizer

  folder, _, _, words = written[style]
  twin = AutoTokenizer.from_pretrained(folder)
  assert tokenizers.load(folder).fingerprint() == words.fingerprint()

  def ids(messages, **more):
    return twin.apply_chat_template(
      messages,
      tokenize=True,
      add_generation_prompt=True,
      sanitize_control_tokens=True,
      **more,
    )["input_ids"]

  for one, other in itertools.pairwise((*HOSTILE, HOSTILE[0])):
    for messages in (
      [user(one)],
      [{"role": "system", "content": one}, user(other)],
      [user(one), said(other), {"role": "tool", "content": one}, user(other)],
    ):
      assert ids(messages) == prompt.encode(words, messages)
      if one.strip() and words.mark(one).strip():
        expected = prompt.encode(words, messages, one)
        assert ids(messages, spec=one) == expected, (messages, one)
  with pytest.raises(Exception, match="spec= is empty"):
    ids([user("Hi")], spec=" ")
  with pytest.raises(Exception, match="nothing to answer"):
    ids([user("Hi"), said("Yo")])


@pytest.mark.parametrize("style", STYLES)
def test_all_tokens_that_stop_are_named(written, style):
  folder, _, _, words = written[style]
  for name in ("config.json", "generation_config.json"):
    found = json.loads((folder / name).read_text())
    assert found["eos_token_id"] == list(prompt.stop_ids(words))


def test_rollouts_from_the_folder_are_the_policys(written):
  folder, model, params, words = written["chatml"]
  config = recipe("")
  config.model.path = str(folder)
  again, load = reward.make(config.model, language_model=True)
  options = {
    "key": jax.random.key(5),
    "samples": 4,
    "prompt_length": 48,
    "response_length": 12,
  }
  asked = [[user("How do I bake bread at home?")], [user("Hello")]]
  ours = rollout.sample(model, params, words, asked, **options)
  found = rollout.sample(
    again, load(jax.random.key(0)), tokenizers.load(folder), asked, **options
  )
  np.testing.assert_array_equal(found.tokens, ours.tokens)
  assert found.texts == ours.texts and len(set(ours.texts)) > 1


def test_what_is_no_policy_is_not_replaced(written, tmp_path):
  folder, model, params, words = written["chatml"]
  causal.export_policy(model, params, words, folder)  # a policy is
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="no policy of ours"):
    causal.export_policy(model, params, words, tmp_path)


@pytest.mark.slow
def test_a_run_ends_in_a_policy_that_the_next_begins_with(tmp_path):
  pairs = write(tmp_path / "pairs.jsonl", rows())
  config = recipe(pairs, steps=2)
  align(config, tmp_path / "one")
  folder = tmp_path / "one" / "policy"

  # What was trained, put together again from the checkpoint.
  trained = checkpoint.restore_params(tmp_path / "one")["policy"]
  words = tokenizers.load("smollm2")
  model, load = reward.make(
    config.model, vocab_size=words.vocab_size, language_model=True
  )
  start = load(jax.random.split(jax.random.key(config.seed), 3)[0])
  params = agents.join(start, trained)  # the second wins
  ids = np.array([prompt.encode(words, [user("Hello")])], np.int32)
  length = np.array([ids.shape[1]], np.int32)
  expected, _ = decode.token_logprobs(model, params, ids, length)
  before, _ = decode.token_logprobs(model, start, ids, length)

  config.model.path = str(folder)
  again, load = reward.make(config.model, language_model=True)
  found, _ = decode.token_logprobs(again, load(jax.random.key(0)), ids, length)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert np.abs(np.asarray(found - before)).max() > 1e-3

  align(config, tmp_path / "two")
  first, second = (read(tmp_path / d / "metrics.jsonl") for d in ("one", "two"))
  assert second[0]["margin"] == 0  # its own reference
  # Each batch holds all pairs: the second run begins where the first got to.
  assert second[0]["logprob_chosen"] > first[0]["logprob_chosen"]
