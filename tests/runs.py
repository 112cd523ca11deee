"""The smallest training run that is whole: shared by slow-ish tests."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from configs import tiny

ROOT = Path(__file__).parent.parent
SMALL = {
  "steps": 8,
  "batch_rows": 4,
  "checkpoint_every": 3,
  "data.examples": 8,
}


def tiny_config(**changes):
  """configs/tiny.py, smaller still."""
  config = tiny.get_config()
  config.update_from_flattened_dict(SMALL | changes)
  return config


def process(*command) -> subprocess.Popen:
  """A Python process in the root of the repository."""
  return subprocess.Popen(
    [sys.executable, *command],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )


def on_devices(code, *arguments, devices=8) -> str:
  """What `code` prints, in a process with so many simulated devices.

  Fails, too, where XLA says that it gathers an array whole to lay it out anew.
  """
  done = subprocess.run(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    },
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "Involuntary full rematerialization" not in done.stderr
  return done.stdout


def launch(workdir, *flags) -> subprocess.Popen:
  """configs/tiny.py in a process of its own."""
  recipe = ("--config=configs/tiny.py", f"--workdir={workdir}")
  return process("launch/train.py", *recipe, *flags)


def lines(workdir) -> list[dict]:
  """Whole lines of metrics.jsonl."""
  path = Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    return []
  whole = [t for t in path.read_text().split("\n")[:-1] if t]
  return [json.loads(t) for t in whole]


def wait_for_step(process, workdir, step) -> None:
  end = time.monotonic() + 900
  while time.monotonic() < end:
    assert process.poll() is None, process.communicate()[1][-2000:]
    if any(line["step"] >= step for line in lines(workdir)):
      return
    time.sleep(0.02)
  raise AssertionError(f"step {step} not reached")
