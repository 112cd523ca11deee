"""The five commands of the README, one after the other, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

ROOT = Path(__file__).parent.parent


def launch(script: str, *flags: str) -> subprocess.CompletedProcess:
  done = subprocess.run(
    [sys.executable, f"launch/{script}.py", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
  return done


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """A workdir after prepare, train, evaluate and export."""
  folder = tmp_path_factory.mktemp("work")
  recipe = ["--config=configs/tiny.py", f"--workdir={folder}"]
  recipe += [f"--config.{k}={v}" for k, v in runs.SMALL.items()]
  told = launch("prepare", *recipe).stdout
  assert "shared prefixes save" in told
  launch("train", *recipe)
  table = launch(
    "evaluate",
    f"--model={folder}",
    "--suite=synthetic_seen,synthetic_unseen",
    "--rows=40",
    "--bootstrap=20",
    f"--output={folder}/report.json",
  ).stdout
  assert "synthetic_unseen" in table and "spec_shuffled" in table
  launch("export", f"--model={folder}", f"--output={folder}/export")
  return folder


def test_report_has_every_suite_judge_and_metric(work):
  report = json.loads((work / "report.json").read_text())
  assert set(report["suites"]) == {"synthetic_seen", "synthetic_unseen"}
  for suite in report["suites"].values():
    assert {"rows", "base_rate"} <= set(suite)
    judges = suite["judges"]
    assert {"csrm", "spec_shuffled", "always_unsafe", "tfidf"} <= set(judges)
    for name in ("auroc", "flip_recall", "spurious_flips", "smece", "ece"):
      low, high = judges["csrm"]["intervals"][name]
      assert low <= high and 0 <= judges["csrm"][name] <= 1
  for name in ("reliability.png", "flips.png", "training.png", "rows.jsonl"):
    assert (work / name).stat().st_size > 1000


def test_export_and_workdir_give_the_same_scores(work, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text(
    "".join(
      json.dumps(
        {
          "id": str(i),
          "messages": [
            {"role": "user", "content": "May I return these shoes?"},
            {"role": "assistant", "content": text},
          ],
        }
      )
      + "\n"
      for i, text in enumerate(("Yes, within a month.", "No way.", "Ask us."))
    )
  )
  spec = ROOT / "specs" / "customer_support.yaml"
  scored = {}
  for model in (work, work / "export"):
    output = tmp_path / f"{model.name}.jsonl"
    launch(
      "score",
      f"--model={model}",
      f"--spec={spec}",
      f"--input={rows}",
      f"--output={output}",
    )
    lines = [json.loads(t) for t in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    assert {line["verdict"] for line in lines} <= {"comply", "violate"}
    scored[model] = [line["log_odds"] for line in lines]
  first, second = scored.values()
  assert len(set(first)) == 3
  assert first == pytest.approx(second, abs=1e-4)
