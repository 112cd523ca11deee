"""align/run.py, setup.py, evaluation.py: tiny runs, whole."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest

import csrm_jax
from configs import tiny
from csrm_jax import peers
from csrm_jax.align import feedback
from csrm_jax.align.crossed import crossed
from csrm_jax.align.report import report
from csrm_jax.align.run import align
from csrm_jax.train.loop import fit
from tests import runs

SPECS = "specs/align/shop_desk.yaml,specs/align/book_club.yaml"
CHANGES = {
  "steps": 4,
  "checkpoint_every": 2,
  "model.lora_rank": 4,
  "align.specs": SPECS,
  "align.prompts": "synthetic/alcohol",
  "align.prompts_per_step": 4,
  "align.samples": 2,
  "align.prompt_length": 48,
  "align.response_length": 6,
  "align.evaluate_every": 2,
  "align.evaluate_prompts": 3,
}


def length_reward(conversations):
  """No model of the repository: any function of conversations will do."""
  return np.array([len(c[-1]["content"]) for c in conversations]) / 50


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  """A workdir of configs/tiny.py after one step."""
  folder = tmp_path_factory.mktemp("judge")
  config = tiny.get_config()
  config.steps = 1
  config.batch_rows = 2
  config.data.examples = 8
  fit(config, folder)
  return folder


def recipe(judge, **changes):
  config = tiny.get_config()
  config.update_from_flattened_dict(
    CHANGES | {"align.judge": str(judge)} | changes
  )
  return config


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(judge, tmp_path_factory):
  """A run to its end: (workdir, result)."""
  folder = tmp_path_factory.mktemp("run")
  return folder, csrm_jax.align(recipe(judge), folder, reward=length_reward)


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(whole):
  folder, result = whole
  lines = read(folder / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  for line in lines:
    for name in ("shop_desk", "book_club"):
      assert 0 <= line[f"violation/{name}_low"] <= line[f"violation/{name}"]
      assert line[f"violation/{name}"] <= line[f"violation/{name}_high"] <= 1
      # An untrained judge is at one half, far above the limit of 0.1.
      assert line[f"gap/{name}"] > 0
    assert np.isfinite([v for v in line.values()]).all()
    assert 1 <= line["length"] <= 6
  lam = [line["lam/shop_desk"] for line in lines]
  assert lam == sorted(lam) and lam[-1] > lam[0] > 1.0
  found = read(folder / "evaluations.jsonl")
  assert [line["step"] for line in found] == [0, 2, 4]
  responses = read(folder / "responses.jsonl")
  assert len(responses) == 9
  assert responses[0]["messages"][-1]["role"] == "assistant"
  assert set(responses[0]["log_odds"]) == {"shop_desk", "book_club"}
  assert json.loads((folder / "result.json").read_text()) == result
  assert result["tokens"] == sum(8 * line["length"] for line in lines)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(whole, judge):
  folder, result = whole
  again = align(recipe(judge), folder, reward=length_reward)
  assert again["params_sha256"] == result["params_sha256"]
  assert len(read(folder / "metrics.jsonl")) == 4


@pytest.mark.slow
def test_stopped_and_resumed_is_the_same_run(
  whole, judge, tmp_path, monkeypatch
):
  @contextlib.contextmanager
  def at_three():
    yield lambda step: step == 3

  monkeypatch.setattr(peers, "preempted", at_three)
  stopped = align(recipe(judge), tmp_path, reward=length_reward)
  assert stopped["step"] == 3 and "params_sha256" not in stopped
  monkeypatch.undo()
  result = align(recipe(judge), tmp_path, reward=length_reward)
  folder, expected = whole
  assert result["params_sha256"] == expected["params_sha256"]
  times = ("seconds", "seconds_sample", "seconds_judge", "seconds_update")
  for name in ("metrics.jsonl", "evaluations.jsonl", "responses.jsonl"):
    ours, theirs = read(tmp_path / name), read(folder / name)
    for line in (*ours, *theirs):
      for key in times:
        line.pop(key, None)
    assert ours == theirs, name


@pytest.mark.slow
def test_another_recipe_is_refused(whole, judge):
  folder, _ = whole
  with pytest.raises(ValueError, match=r"made with align\.kl = 0\.05"):
    align(recipe(judge, **{"align.kl": 0.1}), folder, reward=length_reward)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"align.specs": ""}, "align.specs is empty"),
    ({"align.limits": "0.1,0.2,0.3"}, "one for each of the 2 constraints"),
    ({"align.limits": "1.5"}, "one rate in"),
    ({"align.method": "trpo"}, "align.method=trpo: use one of ppo"),
    ({"align.cost": "hinge"}, "align.cost=hinge: use one of rate"),
    ({"align.judge_dtype": "auto"}, "align.judge_dtype=auto: use one of float"),
    ({"align.prompts": "nowhere.jsonl"}, "no such file"),
    ({"align.prompts": "synthetic/moon"}, "no domain 'moon'"),
    ({"align.ptx_weight": 1.0}, "without anything to imitate"),
    ({"align.samples": 3, "mesh.fsdp": 2}, "does not cover"),
    ({"model.adapter": "some"}, "launch/train.py alone"),
    ({"align.temperature": 0.0}, "align.temperature=0.0: use one above 0"),
  ],
)
def test_mistakes_are_named(judge, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    align(recipe(judge, **changes), tmp_path, reward=length_reward)


def test_rewards_have_the_unit_that_is_asked_for():
  said = [[{"role": "assistant", "content": "a" * i}] for i in (1, 5)]
  found = feedback.scaled(length_reward, 0.25)(said)
  np.testing.assert_allclose(found, [0.005, 0.025])
  for wrong in (0.0, -1.0, float("nan"), float("inf")):
    with pytest.raises(ValueError, match=r"align\.reward_scale=.*above 0"):
      feedback.scaled(length_reward, wrong)


def test_a_spec_can_be_the_reward(judge):
  """The log-odds under it, whatever else is asked."""
  loaded = csrm_jax.load(judge)
  asked = [
    [
      {"role": "user", "content": "A clue for exercise 3?"},
      {"role": "assistant", "content": text},
    ]
    for text in ("Draw it first.", "It is 12.", "")
  ]
  found = feedback.reward_of(loaded, spec="specs/align/book_club.yaml")(asked)
  spec = csrm_jax.Spec.read("specs/align/book_club.yaml")
  expected = [s.log_odds for s in csrm_jax.score(loaded, spec, asked)]
  np.testing.assert_allclose(found, expected, atol=1e-4)
  # Computed otherwise it is the same but for rounding.
  mixed = loaded.computing("mixed")
  near = feedback.reward_of(mixed, spec="specs/align/book_club.yaml")(asked)
  np.testing.assert_allclose(near, expected, atol=0.1)
  assert not np.array_equal(near, found)


def test_no_helpfulness_no_reward(judge, tmp_path):
  with pytest.raises(ValueError, match="no trained helpfulness head"):
    align(recipe(judge), tmp_path)


@pytest.mark.slow
def test_eight_devices_equal_one(whole, judge, tmp_path):
  """The same first update on a mesh of eight, to 1e-4."""
  code = f"""
import jax
from tests.test_align_run import length_reward, recipe
from csrm_jax.align.run import align
assert jax.device_count() == 8
config = recipe({str(judge)!r}, **{{"mesh.replica": 2, "mesh.fsdp": 2,
  "mesh.tensor": 2, "align.evaluate_every": 0}})
align(config, {str(tmp_path)!r}, reward=length_reward)
"""
  runs.on_devices(code)
  first, _ = (read(d / "metrics.jsonl") for d in (tmp_path, whole[0]))
  expected = read(whole[0] / "metrics.jsonl")
  for key, value in expected[0].items():
    if not key.startswith("seconds"):
      assert first[0][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


@pytest.mark.slow
def test_report(whole, tmp_path):
  folder, _ = whole
  found = report({"a": folder, "b": folder}, tmp_path)
  assert json.loads((tmp_path / "align.json").read_text()) == found
  for name in ("a.png", "b.png", "front.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
  lines = read(folder / "metrics.jsonl")
  desk = found["a"]["constraints"]["shop_desk"]
  pooled = np.mean([line["violation/shop_desk"] for line in lines])
  assert desk["last"] == pytest.approx(pooled)
  assert desk["last_low"] < desk["last"] <= desk["last_high"]
  assert desk["lam"] == lines[-1]["lam/shop_desk"]
  ends = read(folder / "evaluations.jsonl")
  assert found["a"]["reward_end"] == ends[-1]["reward"]
  with pytest.raises(ValueError, match=r"metrics\.jsonl: missing"):
    report({"a": tmp_path}, tmp_path)
  settled = desk["settled"]  # those of updates 2 and 4, without the start
  assert settled == pytest.approx(
    np.mean([line["violation/shop_desk"] for line in ends[1:]])
  )
  assert desk["settled_low"] < settled <= desk["settled_high"]


@pytest.mark.slow
def test_every_run_under_every_spec(whole, judge):
  folder, _ = whole
  loaded = csrm_jax.load(judge)
  specs = SPECS.split(",")
  table = crossed({"a": folder}, specs, {"own": loaded}, last=3)
  assert [line["spec"] for line in table] == ["shop_desk", "book_club"]
  said = read(folder / "responses.jsonl")
  for line, file in zip(table, specs, strict=True):
    spec = csrm_jax.Spec.read(file)
    for side, steps in (("start", {0}), ("end", {2, 4})):
      rows = [x["messages"] for x in said if x["step"] in steps]
      verdicts = [s.verdict for s in csrm_jax.score(loaded, spec, rows)]
      share = verdicts.count("violate") / len(rows)
      assert line[side] == pytest.approx(share)
      assert line[f"{side}_low"] <= share <= line[f"{side}_high"]
  with pytest.raises(ValueError, match=r"responses\.jsonl: missing"):
    crossed({"a": folder / "policy"}, specs, {}, last=3)


@pytest.mark.slow
def test_a_run_is_audited(judge, tmp_path):
  asked = tmp_path / "prompts.jsonl"
  rows = [
    {"prompt": f"Number {i}?", "topic": "odd" if i % 2 else "even"}
    for i in range(8)
  ]
  asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = recipe(
    judge,
    **{
      "align.prompts": str(asked),
      "align.heldout": 0.5,
      "align.monitor": str(judge),
      "align.specs": SPECS.split(",")[0],
    },
  )
  csrm_jax.align(config, tmp_path / "run", reward=length_reward)
  called = [
    sys.executable,
    "launch/audit.py",
    f"--workdir={tmp_path / 'run'}",
    "--allowed=topic=odd",
  ]
  done = subprocess.run(called, cwd=runs.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  folder = tmp_path / "run" / "audit" / "shop_desk"
  found = json.loads((folder / "audit.json").read_text())
  assert (folder / "audit.html").is_file()
  # Every second one is held out, and these are the odd ones.
  assert (found["samples"], found["allowed"], found["disallowed"]) == (3, 3, 0)
  names = [point["name"] for point in found["over_kl"]["points"]]
  assert set(names) == {"before", "update 2", "after"}
  # Gold is the judge itself, so nothing lies between the two.
  for phase in ("before", "after"):
    assert found[phase]["gap"]["value"] == pytest.approx(0, abs=1e-6)
    assert f"shop_desk {phase} gap: " in done.stdout

  def complain(*flags):
    wrong = subprocess.run(
      [*called[:3], *flags], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert wrong.returncode != 0
    return wrong.stderr

  assert "prompts.jsonl:1: field 'kind': missing" in complain(
    "--allowed=kind=odd"
  )
  assert "write FIELD=VALUE" in complain("--allowed=odd")
