"""Real processes on this machine; collectives over gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from csrm_jax import checkpoint
from csrm_jax.model.names import flatten

ROOT = Path(__file__).parent.parent
STEPS = 20
SMALL = (  # configs/tiny.py, 20 steps of 8 rows
  f"--config.steps={STEPS}",
  "--config.data.examples=16",
  "--config.data.heldout=0.2",
)
PATIENCE = 900  # seconds; a bound on hangs, not on speed


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def start(command, count, *, devices=1, folder, **variables):
  """`command` in `count` processes of `devices` devices each."""
  port = free_port()
  flags = os.environ.get("XLA_FLAGS", "")
  environ = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    **variables,
  }
  made = []
  for i in range(count):
    place = [
      f"--coordinator=127.0.0.1:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
    ]
    with (folder / f"{i}.log").open("w") as log:
      made.append(
        subprocess.Popen(
          [sys.executable, *command, *place],
          cwd=ROOT,
          stdout=log,
          stderr=subprocess.STDOUT,
          env=environ,
        )
      )
  return made


def logs(folder) -> str:
  texts = sorted(folder.glob("*.log"))
  return "\n".join(f"{p.name}: {p.read_text()[-3000:]}" for p in texts)


def finish(processes, folder, *, code=0) -> None:
  try:
    for process in processes:
      process.wait(timeout=PATIENCE)
      assert process.returncode == code, logs(folder)
  finally:
    for process in processes:
      process.kill()


def train(workdir, count, *flags, devices=1, **variables):
  """The run of `SMALL` and these flags."""
  workdir.mkdir(exist_ok=True)
  command = [
    "launch/train.py",
    "--config=configs/tiny.py",
    f"--workdir={workdir}",
    *SMALL,
    *flags,
  ]
  return start(command, count, devices=devices, folder=workdir, **variables)


def logged(workdir) -> list[dict]:
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    return []
  return [json.loads(t) for t in path.read_text().split("\n")[:-1]]


def wait_for_step(processes, workdir, step) -> None:
  end = time.monotonic() + PATIENCE
  while time.monotonic() < end:
    assert all(p.poll() is None for p in processes), logs(workdir)
    if any(line["step"] >= step for line in logged(workdir)):
      return
    time.sleep(0.05)
  raise AssertionError(f"step {step} not reached\n{logs(workdir)}")


def assert_same_run(workdir, expected, *, first=1) -> None:
  """Same losses from step `first` on, same final parameters."""
  ours, theirs = logged(workdir), logged(expected)
  assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
  np.testing.assert_allclose(
    [line["loss"] for line in ours[first - 1 :]],
    [line["loss"] for line in theirs[first - 1 :]],
    atol=1e-5,
    rtol=0,
  )
  one = flatten(checkpoint.restore_params(expected))
  other = flatten(checkpoint.restore_params(workdir))
  assert one.keys() == other.keys()
  for name, leaf in one.items():
    np.testing.assert_allclose(other[name], leaf, atol=1e-4, err_msg=name)


def result(workdir) -> dict:
  return json.loads((workdir / "result.json").read_text())


WORDS = """
import sys
from csrm_jax import errors, peers
flags = dict(f[2:].split("=") for f in sys.argv[1:])
me = int(flags["process_id"])
with errors.told(), peers.joined(
  coordinator=flags["coordinator"],
  num_processes=int(flags["num_processes"]),
  process_id=me,
  heartbeat_seconds=30,
), errors.told():
  def work():
    print("worked", flush=True)
    return [me, "done"]
  assert peers.first("work", work) == [0, "done"]
  assert peers.first("work", lambda: me) == 0  # a name may come again
  peers.agree("value", "same")
  peers.agree("value", "same again")
  print("agreed", flush=True)
  peers.{last}
"""


@pytest.mark.parametrize(
  "last, code, told",
  [
    ("is_first()", 0, ("agreed", "agreed")),
    (
      'agree("data", f"rows {me}")',
      2,
      ("error: data: process 0 has rows 0, process 1 rows 1",) * 2,
    ),
    (
      'first("division", lambda: errors.sys.exit if me else int("x"))',
      2,
      ("error: invalid literal", "error: process 0, division: invalid literal"),
    ),
  ],
)
def test_processes_agree_or_all_end(tmp_path, last, code, told):
  script = tmp_path / "words.py"
  script.write_text(WORDS.replace("{last}", last))
  finish(start([str(script)], 2, folder=tmp_path), tmp_path, code=code)
  for i, text in enumerate(told):
    assert text in (tmp_path / f"{i}.log").read_text()
  assert (tmp_path / "0.log").read_text().count("worked") == 1
  assert "worked" not in (tmp_path / "1.log").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Workdir of an uninterrupted run: one process, one device."""
  workdir = tmp_path_factory.mktemp("alone")
  finish(train(workdir, 1), workdir)
  return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory):
  """Workdir of an uninterrupted run of four processes."""
  workdir = tmp_path_factory.mktemp("four")
  finish(train(workdir, 4), workdir)
  return workdir


@pytest.mark.slow
def test_four_processes_equal_one(alone, four):
  assert_same_run(four, alone)
  made = result(four)
  assert (made["processes"], result(alone)["processes"]) == (4, 1)
  assert made["calibration_rows"] == result(alone)["calibration_rows"] > 0
  assert made["temperature"] == pytest.approx(result(alone)["temperature"], 0.1)
  restored = checkpoint.restore_params(four)
  assert made["params_sha256"] == checkpoint.params_sha256(restored)
  for i in range(1, 4):  # process 0 alone writes and prints
    assert "params_sha256" not in (four / f"{i}.log").read_text()
    assert "train:" not in (four / f"{i}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_devices_of_one_process_equal_one(alone, tmp_path, devices):
  finish(train(tmp_path, 1, devices=devices), tmp_path)
  assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_checkpoint_of_four_goes_on_with_fewer(alone, four, tmp_path, count):
  workdir = tmp_path / "run"
  shutil.copytree(four, workdir)
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  (workdir / "result.json").unlink()
  finish(train(workdir, count), workdir)
  assert_same_run(workdir, alone)
  assert result(workdir)["step"] == STEPS


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_and_stops_both(tmp_path):
  flags = ("--config.steps=100000", "--config.checkpoint_every=100000")
  processes = train(tmp_path, 2, *flags)
  wait_for_step(processes, tmp_path, 2)
  processes[1].send_signal(signal.SIGTERM)
  finish(processes, tmp_path, code=75)
  (step,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert 2 <= step < 100_000
  assert f"stopped at step {step}; saved" in (tmp_path / "0.log").read_text()
  assert logged(tmp_path)[-1]["step"] == step
  assert checkpoint.restore_params(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_ends_the_other_in_bounded_time(tmp_path, lost):
  flags = ("--config.steps=100000", "--heartbeat_seconds=20")
  processes = train(tmp_path, 2, *flags)
  wait_for_step(processes, tmp_path, 2)
  processes[lost].kill()
  left = processes[1 - lost]
  try:
    left.wait(timeout=120)  # 20 s of silence, 10 s of roll call, ends
  finally:
    left.kill()
  assert left.returncode != 0
  text = (tmp_path / f"{1 - lost}.log").read_text()
  if lost == 1:
    assert left.returncode == 75
    assert "no answer from process 1" in text
    assert "start all processes again" in text
  else:
    assert "no answer from process 0" in text or "another task died" in text
