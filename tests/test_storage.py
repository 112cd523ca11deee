"""Local folders, and a bucket that tests/bucket.py stands in for."""

import json
import shutil
import sys

import pytest

import csrm_jax as csrm
from csrm_jax import checkpoint, storage
from csrm_jax.data import prepare
from csrm_jax.eval import run
from csrm_jax.export import huggingface
from csrm_jax.score_file import score_file
from csrm_jax.train import loop
from tests import bucket, runs, tiny
from tests.test_checkpoint import some_state

CHANGES = {"steps": 4, "checkpoint_every": 2, "data.heldout": 0.2}
CHANGES |= {"data.examples": 16}


@pytest.fixture
def cloud(tmp_path):
  """A bucket; the folder that holds it."""
  with bucket.served(tmp_path / "cloud") as root:
    yield root


def test_schemes_that_nothing_serves_are_refused(monkeypatch):
  with pytest.raises(ValueError, match=r"--output=s3://b/x: s3:// is not serv"):
    storage.path("s3://b/x", flag="--output")
  # As where it is not installed.
  monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
  with pytest.raises(ValueError, match=r"--workdir=gs://b/x: .*jax\[gcs\]"):
    storage.path("gs://b/x")


@pytest.mark.parametrize("where", ["here", "cloud"])
def test_files_are_the_same_here_and_in_a_bucket(cloud, tmp_path, where):
  folder = storage.path(
    "gs://bucket/run" if where == "cloud" else tmp_path / "run"
  )
  assert storage.is_remote(folder) == (where == "cloud")
  folder.mkdir(parents=True, exist_ok=True)
  storage.write_json(folder / "a.json", {"ä": 1})
  assert storage.read_json(folder / "a.json", remedy="") == {"ä": 1}
  storage.write_text(folder / "a.json", '{"cut')
  with pytest.raises(ValueError, match=r"run/a\.json: no whole JSON .*; mend"):
    storage.read_json(folder / "a.json", remedy="mend it")
  for text in ("first", "second"):
    with storage.writing(folder / "export") as partial:
      (partial / "sub").mkdir()
      (partial / "sub" / f"{text}.txt").write_text(text)
  with pytest.raises(KeyError), storage.writing(folder / "export") as partial:
    (partial / "half").write_text("")
    raise KeyError
  with storage.writing_beside(folder / "out" / "report.json") as local:
    local.parent.mkdir(exist_ok=True)
    local.write_text("{}")
    (local.parent / "rows.jsonl").write_text("row")
  assert storage.files(folder) == {
    "a.json": 5,
    "export/sub/second.txt": 6,
    "out/report.json": 2,
    "out/rows.jsonl": 3,
  }
  copy = storage.fetch(folder, "out", "a.json", "absent")
  assert (copy / "out" / "rows.jsonl").read_text() == "row"
  assert copy == folder if where == "here" else not (copy / "export").exists()
  storage.remove(folder / "out")
  assert list(storage.files(folder)) == ["a.json", "export/sub/second.txt"]


def test_only_full_and_broken_disks_are_renamed(tmp_path):
  with (
    pytest.raises(ValueError, match="run: No space left on device; make room"),
    storage.naming(tmp_path / "run"),
  ):
    raise OSError(28, "No space left on device")
  with pytest.raises(FileNotFoundError), storage.naming(tmp_path):
    (tmp_path / "none").read_text()


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_one_here(cloud, tmp_path, monkeypatch):
  """Prepared by its launcher, trained, broken off and gone on, scored."""
  uri = "gs://bucket/runs/first"
  flags = {**runs.SMALL, **CHANGES}
  process = runs.process(
    "-m",
    "tests.bucket",
    str(cloud),
    "launch/prepare.py",
    "--config=configs/tiny.py",
    f"--workdir={uri}",
    *(f"--config.{k}={v}" for k, v in flags.items()),
  )
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0 and f"rows in {uri}/data" in out, err[-3000:]

  with monkeypatch.context() as here:
    here.setattr(prepare, "prepare", None)  # the rows are there
    result = loop.fit(runs.tiny_config(**CHANGES), uri)

  expected = loop.fit(runs.tiny_config(**CHANGES), tmp_path / "local")
  for key in ("params_sha256", "loss", "tokens", "temperature"):
    assert result[key] == expected[key]
  folder = storage.path(uri)
  assert storage.read_json(folder / "result.json", remedy="") == result
  names = storage.files(folder)
  assert any(name.startswith("tensorboard/") for name in names)
  steps = cloud / "bucket" / "runs" / "first" / "checkpoints"
  listed = json.loads((steps / "4" / "manifest.json").read_text())["files"]
  assert all(set(about) == {"bytes"} for about in listed.values())

  largest = max((steps / "4").rglob("*"), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"gs://.*/4/params/.* bytes, was saved"):
    loop.fit(runs.tiny_config(**CHANGES), uri)
  shutil.rmtree(steps / "4")  # as the message says
  (folder / "result.json").unlink()
  again = loop.fit(runs.tiny_config(**CHANGES), uri)
  assert again["params_sha256"] == expected["params_sha256"]
  text = (folder / "metrics.jsonl").read_text()
  assert [json.loads(t)["step"] for t in text.splitlines()] == [1, 2, 3, 4]


def test_models_and_results_in_a_bucket(cloud, tmp_path):
  made = tiny.judge(temperature=2.0)
  workdir = tiny.write_workdir(tmp_path / "run", made)
  rows = tmp_path / "rows.jsonl"
  messages = [{"role": "assistant", "content": "Damn!"}]
  row = {"messages": messages, "spec": "S1: Disallowed: swearing.", "label": 0}
  rows.write_text(
    "".join(
      json.dumps({**row, "id": str(i), "label": i % 2}) + "\n" for i in range(4)
    )
  )
  shutil.copytree(workdir, cloud / "bucket" / "run")
  (
    cloud / "bucket" / "run" / "checkpoints" / "7" / "commit_success.txt"
  ).touch()
  judge = csrm.load("gs://bucket/run")
  assert judge.fingerprint == made.fingerprint and judge.path[:5] == "gs://"
  assert csrm.load("gs://bucket/run/checkpoints/7").temperature == 2.0

  done = huggingface.export("gs://bucket/run", "gs://bucket/run/export")
  assert done["output"] == "gs://bucket/run/export"
  read = csrm.load("gs://bucket/run/export")
  one, two = (
    csrm.score(j, row["spec"], [messages])[0].log_odds for j in (judge, read)
  )
  assert one == pytest.approx(two, abs=1e-4)

  report = run.evaluate(
    "gs://bucket/run",
    str(rows),
    output="gs://bucket/run/eval/report.json",
    judge_names=["csrm", "always_unsafe"],
    bootstrap=0,
  )
  found = storage.files(storage.path("gs://bucket/run/eval"))
  assert {"report.json", "rows.jsonl", "report.html"} <= set(found)
  written = storage.path("gs://bucket/run/eval/report.json").read_text()
  assert json.loads(written)["suites"] == report["suites"]

  score_file(judge, rows, "gs://bucket/scores.jsonl")
  lines = storage.path("gs://bucket/scores.jsonl").read_text().splitlines()
  assert [json.loads(t)["id"] for t in lines] == ["0", "1", "2", "3"]
  with pytest.raises(ValueError, match="--model=gs://bucket/none: no such"):
    csrm.load("gs://bucket/none")


@pytest.mark.slow
def test_other_processes_take_the_rows_from_the_bucket(cloud, monkeypatch):
  from csrm_jax.train import workdir as workdirs

  uri = storage.path("gs://bucket/run")
  config = runs.tiny_config(**CHANGES)
  tokenizer = loop.load_tokenizer(config)
  place = workdirs.ensure_rows(config, uri, tokenizer)
  assert place == "gs://bucket/run/data"
  meta = prepare.read_meta(workdirs.local_rows(place))
  shutil.rmtree(storage.here(uri))  # as on another machine
  monkeypatch.setattr(workdirs.peers, "is_first", lambda: False)
  local = workdirs.local_rows(place)
  assert prepare.read_meta(local) == meta
  assert storage.files(local) == storage.files(uri / "data")


def test_checkpoints_of_a_bucket_are_kept_and_cleared(cloud):
  state = some_state()
  with checkpoint.open_manager("gs://bucket/run", keep=2) as manager:
    for step in (1, 2, 3):
      checkpoint.save(manager, step, state)
    checkpoint.finish(manager)
  steps = cloud / "bucket" / "run" / "checkpoints"
  (steps / "3" / "commit_success.txt").unlink()  # as if killed before it
  with checkpoint.open_manager("gs://bucket/run") as manager:
    assert manager.latest_step() == 2
