"""align/offline.py, pairwise.py: DPO and IPO on rows of the data contract."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny as recipes
from csrm_jax import peers
from csrm_jax.align import descent, offline, order, pairwise
from csrm_jax.align.pairwise import Pairs
from csrm_jax.align.ppo import Agent
from csrm_jax.align.run import align
from csrm_jax.data import prompt
from tests import runs, tiny

ROOM = 80
SPECS = ("S1: Disallowed: prices.", "S1: Required: prices.")


def user(text):
  return {"role": "user", "content": text}


def said(text):
  return {"role": "assistant", "content": text}


def rows():
  """Four pairs; two specs turn the same answers round."""
  answers = [said("Twelve euros."), said("Ask at the desk.")]
  made = [
    {
      "id": f"{i}",
      "prompt": [user("What does it cost?")],
      "chosen": [answers[i % 2 - 1]],
      "rejected": [answers[i % 2]],
      "kind": "resp",
      "spec": SPECS[i % 2],
    }
    for i in range(2)
  ]
  plain = {
    "id": "plain",
    "prompt": [user("Hello")],
    "chosen": [said("Hi!"), user("And you?"), said("Well.")],
    "rejected": [said("No.")],
    "kind": "help",
    "weight": 2.0,
  }
  long = plain | {"id": "long", "rejected": [said("No. " * 200)]}
  lone = plain | {"id": "lone", "prompt": [], "chosen": [said("Hi!")]}
  return [*made, plain, long, lone]


def write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(pairs, **changes):
  config = recipes.get_config()
  config.update_from_flattened_dict(
    {
      "steps": 6,
      "checkpoint_every": 2,
      "model.lora_rank": 4,
      "optimizer.lr": 1e-2,
      "align.method": "dpo",
      "align.pairs": pairs,
      "align.pairs_per_step": 3,
      "align.prompt_length": ROOM - 20,
      "align.response_length": 20,
    }
    | changes
  )
  return config


def test_rows_become_prompt_spec_response_and_end(tmp_path):
  words = tiny.tokenizer()
  found, aside = offline.read(
    write(tmp_path / "pairs.jsonl", rows()), words, room=ROOM
  )

  assert [row["id"] for row in aside] == ["long", "lone"]
  assert f"room for {ROOM}" in aside[0]["reason"]
  assert "no message to answer" in aside[1]["reason"]
  assert found.weight.tolist() == [1.0, 1.0, 2.0]
  for i, side, answer, spec in (
    (0, 0, "Ask at the desk.", SPECS[0]),
    (0, 1, "Twelve euros.", SPECS[0]),
    (1, 0, "Twelve euros.", SPECS[1]),
  ):
    ids = found.tokens[i, side, : found.length[i, side]].tolist()
    before = prompt.encode(words, [user("What does it cost?")], spec)
    assert ids == [*before, *words.encode(answer), prompt.end_id(words)]
    assert found.start[i, side] == len(before)
  # Of several messages the last is the response.
  start, length = found.start[2, 0], found.length[2, 0]
  assert words.decode(found.tokens[2, 0, start : length - 1].tolist()) == (
    "Well."
  )

  batch = offline.batch(found, seed=0, step=0, count=3)
  chosen = order.turn(3, name="pairs", seed=0, step=0, count=3)
  assert sorted(chosen) == [0, 1, 2]
  for row, i in enumerate(chosen):
    for side in range(2):
      on = np.flatnonzero(batch.mask[row, side])
      assert (on[0], on[-1] + 1) == (
        found.start[i, side],
        found.length[i, side],
      )
      assert len(on) == on[-1] + 1 - on[0]


# A policy without context: each token has a probability of its own. Its log-
# probabilities, losses and gradients are worked out in NumPy.
TABLE = np.array([0.3, -0.7, 1.1, 0.2, -0.4])
START = np.array([0.1, 0.4, -0.2, 0.0, 0.5])


def _logprobs(trained, frozen, tokens, length):
  table = (trained or frozen)["table"]
  each = jax.nn.log_softmax(table)[tokens]
  return each, jnp.zeros_like(each)


def _no_critic(*_) -> jax.Array:
  raise AssertionError("no critic has a part in this")


def tabular(table=TABLE):
  optimizers = {"policy": optax.sgd(1.0)}
  params = {"policy": {"table": jnp.asarray(table, jnp.float32)}}
  state = descent.init_state(params, optimizers)
  frozen = {"policy": {"reference": {"table": jnp.asarray(START, jnp.float32)}}}
  agent = Agent(_logprobs, _no_critic, _no_critic)
  return state, frozen, {"agent": agent, "optimizers": optimizers}


def some_pairs(weight=(1.0, 2.0, 0.0)):
  tokens = np.array(
    [
      [[0, 1, 2, 3], [0, 4, 4, 0]],
      [[1, 1, 0, 2], [1, 3, 3, 3]],
      [[2, 2, 2, 2], [2, 0, 1, 4]],
    ]
  )
  mask = np.array([[[0, 1, 1, 0], [0, 1, 1, 1]]] * 3, np.float32)
  return Pairs(
    jnp.asarray(tokens, jnp.int32),
    jnp.asarray(np.array([[3, 4]] * 3), jnp.int32),
    jnp.asarray(mask),
    jnp.asarray(weight, jnp.float32),
    jnp.asarray([[-0.1, -1.3], [-0.4, -0.9], [-2.0, -2.0]], jnp.float32),
  )


def expected_loss(table, pairs, method, *, beta=0.3, smoothing=0.1):
  """The weighted mean loss in float64."""

  def sums(logits):
    each = (logits - np.log(np.exp(logits).sum()))[np.asarray(pairs.tokens)]
    return (each * np.asarray(pairs.mask)).sum(-1)

  ratio = sums(np.asarray(table, np.float64)) - sums(START)
  lead = ratio[:, 0] - ratio[:, 1]
  rewards = np.asarray(pairs.log_rewards, np.float64)
  u = beta * lead
  each = {
    "dpo": (1 - smoothing) * np.log1p(np.exp(-u))
    + smoothing * np.log1p(np.exp(u)),
    "ipo": (lead - 1 / (2 * beta)) ** 2,
    "distill": (rewards[:, 0] - rewards[:, 1] - u) ** 2,
  }[method]
  weight = np.asarray(pairs.weight, np.float64)
  return (weight * each).sum() / weight.sum()


@pytest.mark.parametrize("method", pairwise.METHODS)
def test_update_equals_numpy(method):
  state, frozen, keywords = tabular()
  pairs = some_pairs()

  new, metrics = jax.jit(
    lambda s: pairwise.update(
      s, frozen, pairs, method=method, beta=0.3, label_smoothing=0.1, **keywords
    )
  )(state)

  np.testing.assert_allclose(
    metrics["loss"], expected_loss(TABLE, pairs, method), rtol=1e-5
  )
  small = 1e-6
  slope = [
    expected_loss(TABLE + small * unit, pairs, method)
    - expected_loss(TABLE - small * unit, pairs, method)
    for unit in np.eye(len(TABLE))
  ]
  moved = np.asarray(new.params["policy"]["table"]) - TABLE
  np.testing.assert_allclose(
    moved, -np.array(slope) / (2 * small), rtol=1e-4, atol=1e-5
  )
  assert float(new.tokens) == 10  # of the two pairs that count


def test_padding_pairs_change_nothing():
  state, frozen, keywords = tabular()
  pairs = some_pairs()
  changed = pairs._replace(
    tokens=pairs.tokens.at[2].set(1),
    log_rewards=pairs.log_rewards.at[2].set(jnp.nan),
  )
  for method in pairwise.METHODS:
    a, b = (
      pairwise.update(state, frozen, p, method=method, beta=0.3, **keywords)
      for p in (pairs, changed)
    )
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      np.testing.assert_array_equal(x, y)


def test_nothing_counts_nothing_moves():
  state, frozen, keywords = tabular()
  pairs = some_pairs(weight=(0.0, 0.0, 0.0))
  new, metrics = pairwise.update(
    state, frozen, pairs, method="dpo", beta=0.3, **keywords
  )
  np.testing.assert_array_equal(
    new.params["policy"]["table"], state.params["policy"]["table"]
  )
  assert int(new.step) == 1 and int(metrics["skipped"]) == 0


def test_a_loss_that_is_not_finite_is_skipped_and_counted():
  state, frozen, keywords = tabular(np.full(5, np.nan))
  new, metrics = pairwise.update(
    state, frozen, some_pairs(), method="dpo", beta=0.3, **keywords
  )
  assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
  assert int(new.skipped) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A DPO run to its end: (pairs file, workdir, result)."""
  folder = tmp_path_factory.mktemp("dpo")
  pairs = write(folder / "pairs.jsonl", rows())
  return pairs, folder / "run", align(recipe(pairs), folder / "run")


def test_dpo_learns_which_spec_asks_for_what(whole):
  _, folder, result = whole
  lines = read(folder / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  # Before any update the policy is its own reference.
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert lines[0]["accuracy"] == 0.5 and lines[0]["margin"] == 0
  assert lines[-1]["loss"] < 0.6 and lines[-1]["accuracy"] == 1
  for line in lines:
    assert line["logprob_chosen"] < 0 and line["logprob_rejected"] < 0
    lead = line["log_ratio_chosen"] - line["log_ratio_rejected"]
    assert line["margin"] == pytest.approx(0.1 * lead, abs=1e-5)
  assert result["step"] == 6 and result["skipped"] == 0
  found = json.loads((folder / "pairs.json").read_text())
  assert (found["pairs"], found["left_out"]) == (3, 2)
  assert [x["id"] for x in read(folder / "left_out.jsonl")] == ["long", "lone"]
  assert not (folder / "evaluations.jsonl").exists()  # no specs were given


@pytest.mark.slow
def test_stopped_and_resumed_is_the_same_run(whole, tmp_path, monkeypatch):
  pairs, folder, expected = whole

  @contextlib.contextmanager
  def at_three():
    yield lambda step: step == 3

  monkeypatch.setattr(peers, "preempted", at_three)
  stopped = align(recipe(pairs), tmp_path)
  assert stopped["step"] == 3 and "params_sha256" not in stopped
  monkeypatch.undo()
  result = align(recipe(pairs), tmp_path)
  assert result["params_sha256"] == expected["params_sha256"]
  ours, theirs = (read(d / "metrics.jsonl") for d in (tmp_path, folder))
  for line in (*ours, *theirs):
    for key in ("seconds", "seconds_update"):
      line.pop(key)
  assert ours == theirs


def test_changed_pairs_are_refused(whole):
  pairs, folder, _ = whole
  before = Path(pairs).read_text()
  Path(pairs).write_text(before.replace("Twelve", "Thirteen"))
  try:
    with pytest.raises(ValueError, match="began with pairs of fingerprint"):
      align(recipe(pairs), folder)
  finally:
    Path(pairs).write_text(before)


@pytest.mark.slow
def test_ipo_with_specs_evaluates(tmp_path):
  judge = tiny.write_workdir(tmp_path / "judge", tiny.judge())
  pairs = write(tmp_path / "pairs.jsonl", rows())
  changes = {
    "steps": 2,
    "align.method": "ipo",
    "align.specs": "specs/align/shop_desk.yaml",
    "align.judge": str(judge),
    "align.prompts": "synthetic/alcohol",
    "align.evaluate_prompts": 2,
  }
  align(recipe(pairs, **changes), tmp_path / "run")
  lines = read(tmp_path / "run" / "metrics.jsonl")
  # (0 - 1 / (2 beta))^2 before any update.
  assert lines[0]["loss"] == pytest.approx(25.0, rel=1e-6)
  found = read(tmp_path / "run" / "evaluations.jsonl")
  assert [line["step"] for line in found] == [0, 2]
  assert 0 <= found[0]["violation/shop_desk"] <= 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"align.pairs": ""}, "align.pairs='': no such file"),
    ({"align.prompt_length": 1, "align.response_length": 1}, "put aside"),
    ({"align.pairs_per_step": 3, "mesh.fsdp": 2}, "does not cover"),
  ],
)
def test_mistakes_are_named(whole, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    align(recipe(whole[0], **change), tmp_path)


def test_bad_rows_stop_or_are_put_aside(tmp_path):
  bad = {"id": "bad", "messages": [said("Hi!")], "label": 1.0}
  path = write(tmp_path / "pairs.jsonl", [*rows(), bad])
  words = tiny.tokenizer()
  with pytest.raises(ValueError, match=r"pairs\.jsonl:6: a label row"):
    offline.read(path, words, room=ROOM)
  _, aside = offline.read(path, words, room=ROOM, on_bad_row="quarantine")
  assert aside[-1]["line"] == 6 and len(aside) == 3


@pytest.mark.slow
def test_eight_devices_equal_one(whole, tmp_path):
  """The same first updates on a mesh of eight, to 1e-4."""
  code = f"""
import jax
from tests.test_align_offline import recipe
from csrm_jax.align.run import align
assert jax.device_count() == 8
changes = {{"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
  "align.pairs_per_step": 4, "steps": 2}}
align(recipe({whole[0]!r}, **changes), {str(tmp_path / "eight")!r})
"""
  runs.on_devices(code)
  changes = {"align.pairs_per_step": 4, "steps": 2}
  align(recipe(whole[0], **changes), tmp_path / "one")
  ours, theirs = (
    read(tmp_path / name / "metrics.jsonl") for name in ("eight", "one")
  )
  for line, expected in zip(ours, theirs, strict=True):
    for key, value in expected.items():
      if not key.startswith("seconds"):
        assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
