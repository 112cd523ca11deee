import json

import jax
import numpy as np
import pytest

import csrm_jax as csrm
from csrm_jax import checkpoint
from csrm_jax.export import adapter
from csrm_jax.model.names import flatten
from csrm_jax.train import loop
from tests import runs, tiny


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
  logged = runs.lines(workdir)
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
  assert [x["step"] for x in runs.lines(tmp_path)] == [1, 2, 3, 4]


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


def test_batch_that_does_not_fit_the_mesh_is_refused(tmp_path):
  config = runs.tiny_config()
  config.microbatches = 3
  with pytest.raises(ValueError, match="batch_rows = 4 must be a multiple"):
    loop.fit(config, tmp_path)
