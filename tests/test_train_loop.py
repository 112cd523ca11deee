import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import csrm_jax as csrm
from csrm_jax import checkpoint
from csrm_jax.export import adapter
from csrm_jax.model.names import flatten
from csrm_jax.train import loop
from tests import runs, tiny

ROOT = Path(__file__).parent.parent


def launch_recipe(workdir, *flags) -> subprocess.Popen:
  """configs/tiny.py in a process of its own."""
  return subprocess.Popen(
    [
      sys.executable,
      "launch/train.py",
      "--config=configs/tiny.py",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


def launch(workdir, *flags) -> subprocess.Popen:
  small = (f"--config.{k}={v}" for k, v in runs.SMALL.items())
  return launch_recipe(workdir, *small, *flags)


def lines(workdir) -> list[dict]:
  path = Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    return []
  whole = [t for t in path.read_text().split("\n")[:-1] if t]
  return [json.loads(t) for t in whole]


def wait_for_step(process, workdir, step) -> None:
  end = time.monotonic() + 300
  while time.monotonic() < end:
    assert process.poll() is None, process.communicate()[1][-2000:]
    if any(line["step"] >= step for line in lines(workdir)):
      return
    time.sleep(0.02)
  raise AssertionError(f"step {step} not reached")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """Workdir and result of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole")
  result = loop.fit(runs.tiny_config(), workdir)
  return workdir, result


def test_workdir_holds_what_a_run_promises(whole_run):
  workdir, result = whole_run
  steps = runs.SMALL["steps"]
  assert json.loads((workdir / "result.json").read_text()) == result
  logged = lines(workdir)
  assert [line["step"] for line in logged] == list(range(1, steps + 1))
  for key in ("loss", "loss_calibration", "loss_spec", "tokens_per_second"):
    assert all(np.isfinite(line[key]) for line in logged)
  expected = np.mean([line["loss"] for line in logged[-10:]])
  assert result["loss"] == pytest.approx(expected)
  assert result["step"] == steps and len(result["params_sha256"]) == 64
  assert result["tokens"] == logged[-1]["tokens"] > 0
  for name in ("config.json", "model.json", "tokenizer.json"):
    assert (workdir / name).is_file()
  assert list((workdir / "tensorboard").iterdir())
  temperature = json.loads((workdir / "model.json").read_text())["temperature"]
  assert temperature > 0


def test_finished_run_is_not_repeated(whole_run):
  workdir, result = whole_run
  before = (workdir / "metrics.jsonl").read_text()
  again = loop.fit(runs.tiny_config(), workdir)
  assert again["params_sha256"] == result["params_sha256"]
  assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("step", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_run_ends_as_if_nothing_had_happened(whole_run, tmp_path, step):
  _, expected = whole_run
  process = launch(tmp_path)
  wait_for_step(process, tmp_path, step)
  process.kill()
  process.wait()
  assert not (tmp_path / "result.json").exists()
  result = loop.fit(runs.tiny_config(), tmp_path)
  assert result["params_sha256"] == expected["params_sha256"]
  assert result["tokens"] == expected["tokens"]
  logged = [line["step"] for line in lines(tmp_path)]
  assert logged == list(range(1, runs.SMALL["steps"] + 1))


@pytest.fixture(scope="module")
def lora_recipe(tmp_path_factory):
  """Four steps of adapters on a tiny base in a Hugging Face folder."""
  base = tiny.write_base(tmp_path_factory.mktemp("base"), tiny.judge())
  changes = {
    "steps": 4,
    "batch_rows": 2,
    "checkpoint_every": 2,
    "optimizer.lr": 1e-2,
    "model.path": str(base),
    "model.lora_rank": 2,
    "model.train_layers": 1,
    "data.row_length": 2048,  # the tiny tokenizer spells most words out
  }
  return lambda: runs.tiny_config(**changes)


@pytest.fixture(scope="module")
def lora_run(lora_recipe, tmp_path_factory):
  """Workdir and result of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("lora")
  return workdir, loop.fit(lora_recipe(), workdir)


def test_lora_moves_adapters_and_head_alone(lora_recipe, lora_run):
  config, (workdir, _) = lora_recipe(), lora_run
  _, load_params = loop.make_model(config, loop.load_tokenizer(config))
  before = flatten(load_params(jax.random.key(config.seed)))
  after = flatten(checkpoint.restore_params(workdir))

  assert after.keys() == before.keys()
  moved = {k for k in after if not np.array_equal(after[k], before[k])}
  assert moved == {k for k in after if "/lora_" in k} | {"head/kernel"}
  assert len(moved) == 15


@pytest.mark.slow
def test_lora_run_resumes_as_if_nothing_had_happened(
  lora_recipe, lora_run, tmp_path, monkeypatch
):
  whole = loop.steps.compile_step

  def breaking(*args, **kwargs):
    step, calls = whole(*args, **kwargs), []

    def take(state, batch):
      if len(calls) == 3:
        raise KeyboardInterrupt
      calls.append(1)
      return step(state, batch)

    return take

  monkeypatch.setattr(loop.steps, "compile_step", breaking)
  with pytest.raises(KeyboardInterrupt):
    loop.fit(lora_recipe(), tmp_path)
  monkeypatch.undo()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]

  result = loop.fit(lora_recipe(), tmp_path)

  assert result["params_sha256"] == lora_run[1]["params_sha256"]
  assert [x["step"] for x in lines(tmp_path)] == [1, 2, 3, 4]


def test_trained_adapter_scores_alike_once_exported(lora_run, tmp_path):
  workdir, _ = lora_run
  done = adapter.export(workdir, tmp_path / "out")
  messages = [{"role": "assistant", "content": "Twelve euros, promised."}]
  exact, read = (
    csrm.score(csrm.load(folder), "S1: Disallowed: prices.", [messages])[0]
    for folder in (workdir, done["output"])
  )

  assert done["difference"] <= 1e-4 and done["rounding"] <= 0.05
  assert read.log_odds == pytest.approx(exact.log_odds, abs=0.05)


def test_sigterm_saves_and_the_run_goes_on(whole_run, tmp_path):
  _, expected = whole_run
  process = launch(tmp_path, "--config.checkpoint_every=1000")
  wait_for_step(process, tmp_path, 2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-2000:]
  assert "run again to go on" in out
  assert list((tmp_path / "checkpoints").iterdir())
  result = loop.fit(runs.tiny_config(), tmp_path)
  assert result["params_sha256"] == expected["params_sha256"]


def test_another_recipe_is_refused_by_key(whole_run):
  workdir, _ = whole_run
  config = runs.tiny_config()
  config.optimizer.lr = 0.5
  with pytest.raises(ValueError, match=r"optimizer.lr = .*now 0\.5.*workdir"):
    loop.fit(config, workdir)


def test_another_template_is_refused_with_both_fingerprints(
  whole_run, tmp_path
):
  import shutil

  workdir, _ = whole_run
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  described = json.loads((copy / "model.json").read_text())
  described["template_fingerprint"] = "sha256:other"
  (copy / "model.json").write_text(json.dumps(described))
  with pytest.raises(ValueError, match=r"sha256:other, now sha256:[0-9a-f]"):
    loop.fit(runs.tiny_config(), copy)


def test_three_bad_steps_in_a_row_stop_the_run(tmp_path):
  config = runs.tiny_config()
  config.optimizer.lr = 1e30
  config.optimizer.clip = 1e30
  config.optimizer.warmup = 0.0
  config.optimizer.head_lr = 1.0
  with pytest.raises(FloatingPointError, match=r"3 times in a row.*lr"):
    loop.fit(config, tmp_path)


def test_batch_that_does_not_fit_the_mesh_is_refused(tmp_path):
  config = runs.tiny_config()
  config.microbatches = 3
  with pytest.raises(ValueError, match="batch_rows = 4 must be a multiple"):
    loop.fit(config, tmp_path)


@pytest.mark.slow
def test_tiny_recipe_killed_at_random_moments(tmp_path):
  """configs/tiny.py as it is, killed with -9 until it ends by itself."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  process = launch_recipe(whole)
  _, err = process.communicate()
  assert process.returncode == 0, err[-2000:]
  seconds = json.loads((whole / "result.json").read_text())["seconds"]
  random = np.random.default_rng()
  kills = 0
  while not (killed / "result.json").is_file():
    process = launch_recipe(killed)
    try:
      # From before the first step to beyond several checkpoints.
      patience = 8 + random.uniform(0, seconds) if kills < 5 else None
      _, err = process.communicate(timeout=patience)
      assert process.returncode == 0, err[-2000:]
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      kills += 1
  results = [
    json.loads((folder / "result.json").read_text())
    for folder in (whole, killed)
  ]
  assert kills > 0
  assert results[0]["params_sha256"] == results[1]["params_sha256"]
  assert results[0]["loss"] == results[1]["loss"]
