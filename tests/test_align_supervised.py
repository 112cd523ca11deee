"""align/supervised.py: a policy imitates given responses."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny as recipes
from csrm_jax.align import descent, imitation, ppo, supervised
from csrm_jax.align.run import align
from tests import tiny

SAID = (("Is it open?", "Yes, until six."), ("Is it far?", "Two stops."))


def recipe(file, **changes):
  config = recipes.get_config()
  config.update_from_flattened_dict(
    {
      "steps": 12,
      "checkpoint_every": 6,
      "model.lora_rank": 4,
      "optimizer.lr": 3e-2,
      "align.method": "sft",
      "align.ptx": file,
      "align.ptx_rows": 2,
      "align.prompt_length": 80,
      "align.response_length": 32,
    }
    | changes
  )
  return config


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("sft") / "said.jsonl"
  lines = [
    {
      "messages": [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
      ]
    }
    for asked, answer in SAID
  ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def test_files_are_joined(file, tmp_path):
  tokenizer = tiny.tokenizer()
  more = tmp_path / "more.jsonl"
  more.write_text(Path(file).read_text().splitlines()[0] + "\n")
  one = imitation.read(file, tokenizer, room=120)
  both = imitation.read(f"{file},{more}", tokenizer, room=120)
  assert len(both.length) == len(one.length) + 1
  np.testing.assert_array_equal(both.tokens[-1], one.tokens[0])


def test_the_policy_learns_what_it_is_shown(file, tmp_path):
  result = align(recipe(file), tmp_path)
  lines = [
    json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines] == list(range(1, 13))
  assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
  assert {line["length"] for line in lines} == {lines[0]["length"]}
  assert result["skipped"] == 0 and (tmp_path / "policy").is_dir()
  assert result["tokens"] == 12 * 2 * lines[0]["length"]


def test_nothing_to_imitate_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"align\.method=sft without anything"):
    align(recipe(""), tmp_path)


def test_an_update_is_a_step_down_the_likelihood():
  """Against the gradient by hand; prompts and padding have no part in it."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(5, 7)).astype(np.float32)

  def logprobs(trained, frozen, tokens, length):
    del frozen, length
    each = jax.nn.log_softmax(trained["table"], axis=-1)
    return each[jnp.arange(tokens.shape[1]), tokens], jnp.zeros(tokens.shape)

  agent = ppo.Agent(logprobs, None, None)  # pyright: ignore
  tokens = jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32)
  mask = jnp.asarray([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]], float)
  optimizers = {"policy": optax.sgd(0.5)}
  state = descent.init_state({"policy": {"table": table}}, optimizers)
  run = jax.jit(
    functools.partial(supervised.update, agent=agent, optimizers=optimizers)
  )
  new, metrics = run(
    state, {"policy": {}}, (tokens, jnp.full(3, 5, jnp.int32), mask)
  )
  p = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
  slope, loss = np.zeros_like(table), 0.0
  for i, t in np.argwhere(np.asarray(mask) > 0):
    slope[t] += p[t] / 6
    slope[t, tokens[i, t]] -= 1 / 6
    loss -= np.log(p[t, tokens[i, t]]) / 6
  np.testing.assert_allclose(
    new.params["policy"]["table"], table - 0.5 * slope, atol=1e-6
  )
  assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
  assert float(new.tokens) == 6 and float(metrics["length"]) == 2

  # What is not finite changes nothing but the counters.
  broken = state._replace(
    params={"policy": {"table": jnp.full((5, 7), jnp.nan)}}
  )
  after, metrics = run(
    broken, {"policy": {}}, (tokens, jnp.full(3, 5, jnp.int32), mask)
  )
  assert int(metrics["skipped"]) == 1 and int(after.step) == 1
