"""The table of ablations: two rows end to end, interrupted and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csrm_jax.config import default
from csrm_jax.data import prepare
from csrm_jax.train import loop

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import ablation_table  # noqa: E402

STEPS = 4
RECIPE = f"""
from configs import tiny

def get_config():
  c = tiny.get_config()
  c.batch_rows = 2
  c.checkpoint_every = 2
  c.data.examples = 8
  c.data.source = "synthetic,synthetic_augmented"
  c.data.stages = "synthetic/presence:2"
  c.data.heldout = 0.2
  c.steps = {STEPS}
  c.model.attention = "dense"  # compiles faster
  c.model.remat = "none"
  return c
"""


def flags(folder: Path, *more: str) -> list[str]:
  recipe = folder / "recipe.py"
  recipe.parent.mkdir(parents=True, exist_ok=True)
  recipe.write_text(RECIPE)
  return [
    f"--config={recipe}",
    f"--workdir={folder}/runs",
    f"--output={folder}/table.json",
    f"--table={folder}/table.md",
    "--rows=12",
    "--bootstrap=10",
    "--only=full,spec_blind",
    *more,
  ]


def told(result):
  """What must not depend on time, machine and folder."""
  timed = ("command", "machine", "config")
  rest = {k: v for k, v in result.items() if k not in timed}
  for row in rest["rows"]:
    row.pop("seconds")
    row.pop("evaluation_seconds")
  return rest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Two rows in one go, and their folder."""
  folder = tmp_path_factory.mktemp("whole")
  ablation.ablate(ablation.parse(flags(folder)))
  return folder, json.loads((folder / "table.json").read_text())


@pytest.mark.slow
def test_rows_share_budget_and_evaluation(whole):
  folder, result = whole
  full, blind = result["rows"]
  assert (full["row"], blind["row"]) == ("full", "spec_blind")
  assert full["steps"] == STEPS
  assert full["tokens"] == full["budget_tokens"] == blind["budget_tokens"]
  a_step = full["tokens"] / STEPS
  assert abs(blind["tokens"] - full["tokens"]) <= a_step
  assert full["params_sha256"] != blind["params_sha256"]
  of = [row["suites"]["synthetic_unseen"] for row in result["rows"]]
  assert of[0]["rows"] == of[1]["rows"] > 0
  assert of[0]["base_rate"] == of[1]["base_rate"]
  for suite in of:
    low, high = suite["metrics"]["intervals"]["auroc"]
    assert low <= high and 0 <= suite["metrics"]["auroc"] <= 1
  assert {"python", "jax"} <= set(result["versions"])
  meta = prepare.read_meta(folder / "runs" / "spec_blind-seed0" / "data")
  assert meta["shuffle_specs"] and meta["counts"]["shuffled_specs"] > 0
  table = (folder / "table.md").read_text()
  assert "| spec_blind |" in table and "`synthetic_unseen`" in table


@pytest.mark.slow
def test_interrupted_table_ends_the_same(whole, tmp_path, monkeypatch):
  args = ablation.parse(flags(tmp_path))
  read = loop.loader.batch_at

  def terminated(rows, step, **how):
    if step == STEPS - 2 and "sharding" in how:  # not where tokens are counted
      os.kill(os.getpid(), signal.SIGTERM)
    return read(rows, step, **how)

  with monkeypatch.context() as patched:  # in the first training
    patched.setattr(loop.loader, "batch_at", terminated)
    assert ablation.ablate(args)["rows"] == []

  def refuse(*_, **__):
    raise RuntimeError("killed before the second evaluation")

  evaluate, calls = ablation.run.evaluate, []

  def once(*some, **how):
    calls.append(some)
    return evaluate(*some, **how) if len(calls) == 1 else refuse()

  with monkeypatch.context() as patched:  # between training and evaluation
    patched.setattr(ablation.run, "evaluate", once)
    with pytest.raises(RuntimeError, match="killed"):
      ablation.ablate(args)
  between = json.loads((tmp_path / "table.json").read_text())
  assert [row["row"] for row in between["rows"]] == ["full"]
  with monkeypatch.context() as patched:  # both rows are trained by now
    patched.setattr(ablation.loop, "fit", refuse)
    again = ablation.ablate(args)
  assert told(json.loads((tmp_path / "table.json").read_text())) == told(
    whole[1]
  )
  with monkeypatch.context() as patched:  # and evaluated
    patched.setattr(ablation.run, "evaluate", refuse)
    assert ablation.ablate(args)["rows"] == again["rows"]
    shutil.rmtree(tmp_path / "runs")  # the output is enough
    assert ablation.ablate(args)["rows"] == again["rows"]


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused(whole):
  folder, _ = whole
  args = ablation.parse(flags(folder, "--steps=5"))
  with pytest.raises(ValueError, match=r"made with steps = 4, now 5"):
    ablation.ablate(args)


def test_every_row_is_a_recipe_of_its_own(tmp_path):
  args = ablation.parse(["--workdir=w", "--output=o.json", "--data=d"])
  assert args.suites == "synthetic_unseen,beavertails,polyguard"
  made = {n: ablation.recipe(n, 0, args) for n in ablation.VARIANTS}
  assert len(made) >= 8
  plain = [json.dumps(c.to_dict(), sort_keys=True) for c in made.values()]
  assert len(set(plain)) == len(plain)
  assert made["full"].data.source.endswith(",beavertails_augmented")
  bare = made["no_augmentation"]
  assert bare.data.source == "synthetic_augmented,beavertails_augmented"
  assert bare.data.stages == "" and bare.data.operators == "none"
  args.source = "synthetic"
  with pytest.raises(ValueError, match="row 'ladders_only' needs one of"):
    ablation.recipe("ladders_only", 0, args)


@pytest.mark.parametrize("budget", [1, 5, 24, 25, 26, 47, 1000])
def test_steps_come_as_near_to_the_budget_as_can_be(monkeypatch, budget):
  sizes = [10, 30, 7, 4, 21] * 20
  monkeypatch.setattr(ablation.loader, "open_rows", lambda *_, **__: None)
  monkeypatch.setattr(ablation, "_tokens", lambda c, r, k: sizes[k])
  config = default()
  steps = ablation.steps_for(config, Path(), budget)
  apart = [abs(sum(sizes[:n]) - budget) for n in range(1, 100)]
  assert abs(sum(sizes[:steps]) - budget) == min(apart)


def test_spread_is_over_seeds():
  def row(seed, auroc):
    metrics = {"auroc": auroc, "intervals": {"auroc": [0.1, 0.9]}}
    suite = {"rows": 3, "pairs": 1, "metrics": metrics}
    return {
      "row": "full", "seed": seed, "says": "as it is", "steps": 4,
      "tokens": 10.0, "seconds": 60.0, "suites": {"s": suite},
    }  # fmt: skip

  def made(rows):
    return {
      "rows": rows, "spread": ablation_table.spread(rows), "command": "x",
      "versions": {"jax": "1"}, "machine": {"cores": 2, "cpu": "y"},
    }  # fmt: skip

  three = made([row(0, 0.5), row(1, 0.8), row(2, 0.65)])
  found = three["spread"]["full"]["s"]["auroc"]
  assert found == {
    "mean": pytest.approx(0.65), "min": 0.5, "max": 0.8, "seeds": 3
  }  # fmt: skip
  assert "| full | 0.650 (0.500 to 0.800) |" in ablation_table.markdown(three)
  one = ablation_table.markdown(made([row(0, 0.5)]))
  assert "| full | 0.500 (0.100 to 0.900) |" in one


def test_unknown_row_is_told_without_traceback(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "benchmarks/ablation.py",
      f"--workdir={tmp_path}",
      f"--output={tmp_path}/o.json",
      "--only=ful",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert "'ful' is no row; choose from full, spec_blind" in done.stderr
