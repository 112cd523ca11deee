"""Faults that a run survives: docs/faults.md is the table of this file.

The first line of each docstring says what is injected, then what survives.
"""

import contextlib
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

import csrm_jax as csrm
from csrm_jax import checkpoint, manifest
from csrm_jax.data import loader, sources, template
from csrm_jax.model.names import flatten
from csrm_jax.train import loop
from csrm_jax.train import workdir as workdirs
from tests import runs, test_peers

pytestmark = pytest.mark.slow
STEPS = 6
# Tests elsewhere that belong into the table.
ELSEWHERE = {
  test_peers.test_sigterm_to_one_of_two_saves_and_stops_both: (
    "SIGTERM to one of two processes",
    "both save and stop at the same step",
  ),
  test_peers.test_lost_process_ends_the_other_in_bounded_time: (
    "kill -9 of one of two processes",
    "the other ends within two minutes and says who is lost; the last "
    "checkpoint stays",
  ),
}


def recipe(rows, **changes):
  """Six steps on rows of a file, a checkpoint every second step."""
  return runs.tiny_config(
    **{
      "steps": STEPS,
      "checkpoint_every": 2,
      "keep_checkpoints": 3,
      "data.source": "jsonl",
      "data.path": str(rows),
      "data.heldout": 0.2,
      "data.examples": 0,
      **changes,
    }
  )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """A file of 16 families."""
  path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
  made = sources.load("synthetic", path=None, seed=0, limit=16)
  path.write_text("".join(json.dumps(row) + "\n" for row in made))
  return path


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
  """Workdir and result of an undisturbed run."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, loop.fit(recipe(rows), workdir)


@pytest.fixture
def stopped(whole, tmp_path):
  """A run that has its checkpoints of steps 2 and 4, and was killed at 5."""
  workdir = tmp_path / "run"
  shutil.copytree(whole[0], workdir)
  shutil.rmtree(workdir / "checkpoints" / "6")
  (workdir / "result.json").unlink()
  log = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
  (workdir / "metrics.jsonl").write_text("".join(log[:5]))
  return workdir


def assert_nothing_lost(workdir, rows, whole) -> None:
  """The run goes on and ends as if it had never been disturbed."""
  result, expected = loop.fit(recipe(rows), workdir), whole[1]
  for key in ("params_sha256", "loss", "tokens", "skipped", "temperature"):
    assert result[key] == expected[key], key
  steps = [line["step"] for line in runs.lines(workdir)]
  assert steps == list(range(1, STEPS + 1))
  left = [p.name for p in (workdir / "checkpoints").iterdir()]
  assert all(name.isdigit() for name in left), left


def content(folder) -> dict[str, bytes]:
  found = (p for p in folder.rglob("*") if p.is_file())
  return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@contextlib.contextmanager
def unchanged(workdir):
  """No file is written, so the run can go on as it could before."""
  before = content(workdir)
  yield
  after = content(workdir)
  assert after.keys() == before.keys()
  assert [name for name in after if after[name] != before[name]] == []


# -- Killed ------------------------------------------------------------------

KILLED = """
import os, signal, sys
from csrm_jax import manifest
from csrm_jax.train import loop
from csrm_jax.train import workdir as workdirs
from tests import test_faults

rows, folder, moment = sys.argv[1:]
def kill():
  os.kill(os.getpid(), signal.SIGKILL)
calls = []
write, opened = manifest.write, workdirs.open_log
def writing(step):
  calls.append(step)
  if len(calls) == 2 and moment == "files":
    kill()
  write(step)
  if len(calls) == 2 and moment == "whole":
    kill()
manifest.write = writing
class Log:
  def __init__(self, log):
    self.log = log
  def keep(self):
    self.log.keep()
  def add(self, line):
    self.log.add(line)
    if line["step"] == 3 and moment == "between":
      kill()
loop.workdirs.open_log = test_faults.changed(opened, Log)
loop.fit(test_faults.recipe(rows), folder)
"""


def changed(manager, change):
  """A context manager whose value goes through `change`."""

  @contextlib.contextmanager
  def opened(*args):
    with manager(*args) as value:
      yield change(value)

  return opened


def killed(rows, workdir, moment) -> None:
  process = runs.process("-c", KILLED, str(rows), str(workdir), moment)
  _, err = process.communicate(timeout=900)
  assert process.returncode == -signal.SIGKILL, err[-3000:]
  assert not (workdir / "result.json").exists()


def test_kill_between_checkpoints(rows, whole, tmp_path):
  """kill -9 between two checkpoints | the run ends with the same parameters,
  loss and log"""
  killed(rows, tmp_path, "between")
  assert_nothing_lost(tmp_path, rows, whole)


@pytest.mark.parametrize("moment", ["files", "whole"])
def test_kill_during_a_checkpoint(rows, whole, tmp_path, moment):
  """kill -9 while a checkpoint is written, before and after its manifest |
  the one before counts, the half one is cleared away; same parameters,
  loss and log"""
  killed(rows, tmp_path, moment)
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert "2" in names and "4" not in names
  assert any(name.startswith("4.") for name in names)
  half = next(p for p in (tmp_path / "checkpoints").iterdir() if "." in p.name)
  assert (half / "manifest.json").exists() == (moment == "whole")
  assert_nothing_lost(tmp_path, rows, whole)


def test_kill_at_random_moments(tmp_path):
  """kill -9 at random moments, five times, of configs/tiny.py | same
  parameters and loss"""
  once, often = tmp_path / "once", tmp_path / "often"
  began = time.monotonic()
  _, err = (process := runs.launch(once)).communicate()
  assert process.returncode == 0, err[-2000:]
  seconds = time.monotonic() - began
  # The first as soon as a step is logged; later ones from before the first
  # step to beyond several checkpoints, or to the end of a quick run.
  process = runs.launch(often)
  runs.wait_for_step(process, often, 1)
  process.kill()
  process.communicate()
  assert not (often / "result.json").is_file()
  random = np.random.default_rng()
  for _ in range(4):
    process = runs.launch(often)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.communicate(timeout=random.uniform(0.3, 1) * seconds)
    process.kill()
    process.communicate()
  process = runs.launch(often)
  _, err = process.communicate()
  assert process.returncode == 0, err[-2000:]
  results = [
    json.loads((folder / "result.json").read_text()) for folder in (once, often)
  ]
  assert results[0]["params_sha256"] == results[1]["params_sha256"]
  assert results[0]["loss"] == results[1]["loss"]


def test_sigterm(rows, whole, tmp_path):
  """SIGTERM (preemption) between two checkpoints | a checkpoint of that very
  step; same parameters, loss and log"""
  flags = {"steps": STEPS, "batch_rows": 4, "data.heldout": 0.2}
  flags |= {"data.source": "jsonl", "data.path": rows, "data.examples": 0}
  flags |= {"checkpoint_every": 1000}
  process = runs.launch(
    tmp_path, *(f"--config.{k}={v}" for k, v in flags.items())
  )
  runs.wait_for_step(process, tmp_path, 2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0, err[-2000:]
  if "run again to go on" in out:  # else it was done before it heard
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert 2 <= int(saved.name) < STEPS
    assert runs.lines(tmp_path)[-1]["step"] == int(saved.name)
  assert_nothing_lost(tmp_path, rows, whole)


# -- Disks -------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, mebibytes):
  """A file system of that size at `folder`; yields a function that grows it."""
  folder.mkdir(exist_ok=True)

  def mount(*options) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs"]
    done = subprocess.run([*command, str(folder)], capture_output=True)
    return done.returncode == 0

  if os.geteuid() or not mount(f"size={mebibytes}m"):
    pytest.skip("needs the right to mount a tmpfs (the other case does not)")
  try:
    yield lambda: mount("remount", "size=1g")
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def short_files(mebibytes):
  """No file of this process may be longer; yields a function that ends it."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (mebibytes << 20, before[1]))
  end = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)  # noqa: E731
  try:
    yield end
  finally:
    end()


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_full_disk_at_a_checkpoint(rows, whole, stopped, tmp_path, kind):
  """a disk that is full when a checkpoint is written | the message names the
  folder; earlier checkpoints stay whole; with room, same parameters, loss
  and log"""
  if kind == "tmpfs":
    size = sum(len(data) for data in content(stopped).values()) >> 20
    fault, workdir = small_disk(tmp_path / "disk", size + 6), tmp_path / "disk"
  else:
    fault, workdir = short_files(6), stopped
  with fault as end:
    if kind == "tmpfs":
      shutil.copytree(stopped, workdir, dirs_exist_ok=True)
    before = content(workdir / "checkpoints" / "4")
    with pytest.raises(
      ValueError, match=rf"{workdir}/checkpoints: .*make room.*from step 4"
    ):
      loop.fit(recipe(rows), workdir)
    assert content(workdir / "checkpoints" / "4") == before
    end()
    assert_nothing_lost(workdir, rows, whole)


def test_full_disk_at_the_log(rows, whole, stopped):
  """a disk that is full when a step is logged | the message names
  metrics.jsonl; same parameters and loss"""
  if not Path("/dev/full").exists():
    pytest.skip("no /dev/full here")
  log, aside = stopped / "metrics.jsonl", stopped / "aside"
  log.rename(aside)
  log.symlink_to("/dev/full")
  with pytest.raises(ValueError, match=r"metrics\.jsonl: No space.*make room"):
    loop.fit(recipe(rows), stopped)
  aside.replace(log)
  assert_nothing_lost(stopped, rows, whole)


# -- Bad batches and rows ----------------------------------------------------


def poison(monkeypatch, *steps) -> None:
  """Batches of these steps, from 0, get NaN for a weight."""
  batch_at = loader.batch_at

  def poisoned(rows, step, **options):
    batch = batch_at(rows, step, **options)
    if step not in steps:
      return batch
    return batch._replace(label_weight=batch.label_weight * np.float32("nan"))

  monkeypatch.setattr(loop.loader, "batch_at", poisoned)


def test_nan_batch(rows, tmp_path, monkeypatch):
  """a batch that gives NaN | the step is left out and counted; parameters
  and moments stay, later steps learn"""
  poison(monkeypatch, 1)
  config = recipe(rows, steps=3, checkpoint_every=1)
  result = loop.fit(config, tmp_path)
  found = [line["skipped"] for line in runs.lines(tmp_path)]
  assert found == [0, 1, 1] and result["skipped"] == 1
  one, two, three = (
    flatten(checkpoint.restore_params(tmp_path, step=step))
    for step in (1, 2, 3)
  )
  assert all(np.array_equal(one[name], two[name]) for name in one)
  assert any(not np.array_equal(two[name], three[name]) for name in one)
  assert np.isfinite(result["loss"])


def test_nan_batches_in_a_row(rows, whole, stopped, monkeypatch):
  """NaN from two batches in a row, `skips_allowed` = 2 | the run stops,
  names step and records; with good rows, same parameters, loss and log"""
  poison(monkeypatch, 4, 5)
  with pytest.raises(FloatingPointError) as told:
    loop.fit(recipe(rows, skips_allowed=2), stopped)
  assert "step 6: loss or gradient not finite 2 times in a row" in str(
    told.value
  )
  numbers = loader.record_numbers(stopped / "data", seed=0)
  records = ", ".join(str(numbers(i)) for i in range(4 * 4, 6 * 4))
  assert f"records {records} of" in str(told.value)
  monkeypatch.undo()
  assert_nothing_lost(stopped, rows, whole)


def test_learning_rate_that_explodes(rows, tmp_path):
  """a learning rate of 1e30 | the run stops after three steps in a row and
  names the rate"""
  changes = {"lr": 1e30, "clip": 1e30, "warmup": 0.0, "head_lr": 1.0}
  config = recipe(rows, **{f"optimizer.{k}": v for k, v in changes.items()})
  with pytest.raises(
    FloatingPointError, match=r"3 times in a row.*lr \(now 1e"
  ):
    loop.fit(config, tmp_path)


def damage_a_record(file, wanted) -> int:
  """Changes one byte of the file so that one of these records is unreadable."""
  held = file.read_bytes()
  for at in range(1000, len(held), 331):
    file.write_bytes(held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :])
    try:
      source = grain.sources.ArrayRecordDataSource(str(file))
    except RuntimeError:  # a header
      continue
    for record in wanted:
      try:
        source[record]
      except RuntimeError:
        return record
  raise AssertionError("no byte of these records found")


def test_changed_record(rows, whole, stopped):
  """a record changed in one bit on the disk | refused by file and record;
  rows made again, same parameters, loss and log"""
  file = stopped / "data" / "train.array_record"
  numbers = loader.record_numbers(file.parent, seed=0)
  record = damage_a_record(file, {numbers(i) for i in range(4 * 4, 6 * 4)})
  with pytest.raises(
    ValueError,
    match=rf"{file}: record {record}: .*delete {file.parent} to prep",
  ):
    loop.fit(recipe(rows), stopped)
  shutil.rmtree(file.parent)
  assert_nothing_lost(stopped, rows, whole)


def test_cut_records(rows, stopped):
  """the file of records cut in half | refused by file; checkpoints and log
  stay"""
  file = stopped / "data" / "train.array_record"
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  before = content(stopped / "checkpoints")
  with pytest.raises(
    ValueError, match=rf"{file}: .*delete {file.parent} to prep"
  ):
    loop.fit(recipe(rows), stopped)
  assert content(stopped / "checkpoints") == before
  assert len(runs.lines(stopped)) >= 4


def test_corrupted_rows_file(rows, stopped, tmp_path):
  """a rows file (jsonl) with a broken line on resume | refused by file and
  line; no file of the run changes"""
  broken = tmp_path / "broken.jsonl"
  lines = rows.read_text().splitlines(keepends=True)
  broken.write_text("".join([*lines[:2], lines[2][:40] + "\n", *lines[3:]]))
  with (
    unchanged(stopped),
    pytest.raises(ValueError, match=r"broken\.jsonl:3: not"),
  ):
    loop.fit(recipe(broken), stopped)


def test_broken_heldout_line(rows, whole, tmp_path):
  """a broken line in heldout.jsonl when the temperature is fitted | refused
  by file and line after everything is saved; mended, nothing is trained
  again"""
  workdir = tmp_path / "run"
  shutil.copytree(whole[0], workdir)
  (workdir / "result.json").unlink()
  file = workdir / "data" / "heldout.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  file.write_text("".join([lines[0], lines[1][:30] + "\n", *lines[2:]]))
  with pytest.raises(ValueError, match=r"heldout\.jsonl:2: not JSON"):
    loop.fit(recipe(rows), workdir)
  file.write_text("".join(lines))
  before = (workdir / "metrics.jsonl").read_text()
  assert_nothing_lost(workdir, rows, whole)
  assert (workdir / "metrics.jsonl").read_text() == before


# -- Checkpoints -------------------------------------------------------------


def largest(folder) -> Path:
  found = (p for p in (folder / "params").rglob("*") if p.is_file())
  return max(found, key=lambda p: p.stat().st_size)


def cut(file) -> None:
  file.write_bytes(file.read_bytes()[:-100])


def tamper(file) -> None:
  held = bytearray(file.read_bytes())
  held[len(held) // 2] ^= 1
  file.write_bytes(held)


@pytest.mark.parametrize(
  "which, damage, told",
  [
    ("params", cut, r": has \d+ bytes, was saved with \d+"),
    ("params", tamper, r": has sha256 \w+, was saved with \w+"),
    ("params", Path.unlink, ": missing"),
    ("manifest.json", Path.unlink, ": missing"),
    ("manifest.json", cut, ": no whole JSON"),
    ("_CHECKPOINT_METADATA", cut, ": no whole JSON"),
  ],
)
def test_damaged_checkpoint(stopped, which, damage, told):
  """a file of the newest checkpoint cut, changed in one bit, or missing |
  refused by file; nothing is deleted, older ones stay"""
  newest = stopped / "checkpoints" / "4"
  file = largest(newest) if which == "params" else newest / which
  damage(file)
  with (
    unchanged(stopped),
    pytest.raises(ValueError, match=re.escape(str(file)) + told) as error,
  ):
    checkpoint.restore_params(stopped)
  assert f"delete the folder {newest} to go on from step 2" in str(error.value)
  assert manifest.check(stopped / "checkpoints" / "2")


def test_damaged_checkpoint_deleted(rows, whole, stopped):
  """a damaged checkpoint that training and scoring refuse, deleted as its
  message says | the run goes on from the one before; same parameters,
  loss and log"""
  tamper(largest(stopped / "checkpoints" / "4"))
  for use in (
    lambda: loop.fit(recipe(rows), stopped),
    lambda: csrm.load(stopped),
  ):
    with pytest.raises(ValueError, match="to go on from step 2"):
      use()
  shutil.rmtree(stopped / "checkpoints" / "4")
  assert_nothing_lost(stopped, rows, whole)


def test_checkpoint_of_an_earlier_version(rows, whole, stopped, capsys):
  """a checkpoint without manifest, from before there were any | it is used,
  and called unchecked"""
  for step in (stopped / "checkpoints").iterdir():
    (step / "manifest.json").unlink()
    file = step / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text()) | {"custom_metadata": {}}
    file.write_text(json.dumps(about))
  assert_nothing_lost(stopped, rows, whole)
  assert "checkpoints/4: saved by an earlier version" in capsys.readouterr().err


# -- Resuming with something else --------------------------------------------


def test_changed_config(rows, stopped):
  """another value in the config on resume | refused by key, with both
  values; no file of the run changes"""
  with (
    unchanged(stopped),
    pytest.raises(ValueError, match=r"optimizer.lr = .*now 0\.5.*workdir"),
  ):
    loop.fit(recipe(rows, **{"optimizer.lr": 0.5}), stopped)


def test_changed_template(rows, stopped, monkeypatch):
  """another prompt template on resume | refused with both fingerprints; no
  file of the run changes"""
  was = json.loads((stopped / "model.json").read_text())["template_fingerprint"]
  monkeypatch.setattr(template, "INSTRUCTION", "Judge, judge.")
  with unchanged(stopped), pytest.raises(ValueError) as told:
    loop.fit(recipe(rows), stopped)
  now = template.fingerprint(loop.load_tokenizer(recipe(rows)))
  assert f"template_fingerprint was {was}, now {now};" in str(told.value)


@pytest.mark.parametrize("what", ["spec", "messages"])
def test_changed_data(rows, stopped, tmp_path, what):
  """a spec or a text of the data changed on resume | refused with both
  fingerprints; no file of the run changes"""
  other = tmp_path / "other.jsonl"
  changed = [json.loads(line) for line in rows.open()]
  for row in changed:
    if what == "spec" and isinstance(row.get("spec"), str):
      row["spec"] += "\nS9: Poems. Disallowed: verse."
    elif what == "messages" and "messages" in row:
      row["messages"][-1]["content"] += " Indeed."
  other.write_text("".join(json.dumps(row) + "\n" for row in changed))
  was = json.loads((stopped / "data" / "meta.json").read_text())["fingerprint"]
  with (
    unchanged(stopped),
    pytest.raises(
      ValueError, match=rf"data_fingerprint {was}, .* now give sha256:\w+;"
    ),
  ):
    loop.fit(recipe(other), stopped)


def test_same_data_elsewhere(rows, stopped, tmp_path):
  """the data moved to another path on resume | no complaint; the run keeps
  its rows"""
  moved = tmp_path / "moved.jsonl"
  shutil.copy(rows, moved)
  config = recipe(moved)
  with unchanged(stopped):
    workdirs.check_recipe(config, stopped)
    workdirs.ensure_rows(config, stopped, loop.load_tokenizer(config))


# -- Half-written files ------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["config.json", "model.json", "data/meta.json"]
)
def test_half_written_file(rows, whole, stopped, name):
  """config.json, model.json or data/meta.json cut in half | refused by file,
  with the remedy, and nothing is written; rows made again, same
  parameters, loss and log"""
  file = stopped / name
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with (
    unchanged(stopped),
    pytest.raises(ValueError, match=rf"{file}: no whole JSON .*cut off"),
  ):
    loop.fit(recipe(rows), stopped)
  if name == "data/meta.json":  # as the message says
    shutil.rmtree(file.parent)
    assert_nothing_lost(stopped, rows, whole)


def test_torn_log(rows, whole, stopped, capsys):
  """a torn last line and one of noise in metrics.jsonl | both are counted;
  every step stands there once"""
  with (stopped / "metrics.jsonl").open("a") as log:
    log.write('\x00\x00\n{"step": 6, "lo')
  assert_nothing_lost(stopped, rows, whole)
  assert "dropped 2 unreadable lines" in capsys.readouterr().out


# -- The table ---------------------------------------------------------------


def table() -> str:
  """docs/faults.md between its markers."""
  here = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
  rows = []
  for name, test in here:
    if name.startswith("test_") and name != "test_docs_hold_this_table":
      told = " ".join((test.__doc__ or "").split())
      injected, _, survives = told.partition(" | ")
      assert injected and survives, name
      rows.append((test.__code__.co_firstlineno, injected, survives, name))
  for test, (injected, survives) in ELSEWHERE.items():
    name = f"{test.__module__.removeprefix('tests.')}.{test.__name__}"
    rows.append((sys.maxsize, injected, survives, name))
  lines = ["| injected | what survives | test |", "|---|---|---|"]
  lines += [f"| {a} | {b} | `{name}` |" for _, a, b, name in sorted(rows)]
  return "\n".join(lines) + "\n"


def test_docs_hold_this_table():
  text = (runs.ROOT / "docs" / "faults.md").read_text()
  assert table() in text, table()
  assert table().count("\n") >= 12
