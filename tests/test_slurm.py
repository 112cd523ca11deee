"""launch/slurm.sbatch under a real Slurm, two tasks on two virtual nodes."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from csrm_jax import checkpoint
from tests import slurm_cluster
from tests.test_peers import (
  PATIENCE,
  ROOT,
  SMALL,
  STEPS,
  assert_same_run,
  finish,
  logged,
  result,
  train,
)

SAVED = 3  # steps from one checkpoint to the next
FLAGS = (*SMALL, f"--config.checkpoint_every={SAVED}")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
    yield cluster


@pytest.fixture(scope="module")
def alone(slurm, tmp_path_factory):
  """Workdir of an uninterrupted run of one process, without Slurm."""
  workdir = tmp_path_factory.mktemp("alone")
  finish(train(workdir, 1), workdir)
  return workdir


class Job:
  """`sbatch --wait launch/slurm.sbatch`, and what Slurm says of it."""

  def __init__(self, cluster, workdir, *flags, python=sys.executable):
    self.cluster, self.workdir = cluster, workdir
    self.log = cluster.folder / f"{workdir.name}.job.log"
    environ = cluster.environ | {
      "CSRM_PYTHON": str(python),
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(ROOT),
    }
    self.sbatch = subprocess.Popen(
      [
        "sbatch",
        "--wait",
        "--parsable",
        f"--output={self.log}",
        "launch/slurm.sbatch",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        *flags,
      ],
      cwd=ROOT,
      env=environ,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.id = self.sbatch.stdout.readline().strip()

  def code(self) -> int:
    """Exit code of the job, once it has ended for good."""
    return self.sbatch.wait(timeout=PATIENCE)

  def restarts(self) -> int:
    shown = self.cluster.call("scontrol", "show", "job", self.id)
    return int(re.search(r"Restarts=(\d+)", shown)[1])

  def tasks(self) -> list[list[int]]:
    """Process ids of either task."""
    return [
      slurm_cluster.tasks(self.cluster, self.id, rank=i) for i in range(2)
    ]

  def wait_for_step(self, step) -> None:
    end = time.monotonic() + PATIENCE
    while not any(line["step"] >= step for line in logged(self.workdir)):
      there = self.sbatch.poll() is None and time.monotonic() < end
      assert there, f"step {step} not reached\n{self}"
      time.sleep(0.05)

  def __str__(self):
    text = self.log.read_text() if self.log.is_file() else "no log"
    return f"job {self.id}: {text[-6000:]}\n{self.cluster.logs()}"


@pytest.fixture(scope="module")
def submit(slurm, tmp_path_factory):
  """Makes a `Job`; none outlives the module."""
  jobs = []

  def make(name, *flags, **settings):
    jobs.append(Job(slurm, tmp_path_factory.mktemp(name), *flags, **settings))
    return jobs[-1]

  yield make
  for job in jobs:
    if job.sbatch.poll() is None:
      slurm.call("scancel", job.id)
      job.sbatch.kill()


@pytest.fixture(scope="module")
def two(submit):
  """The job of an uninterrupted run of two tasks."""
  job = submit("two", *FLAGS)
  assert job.code() == 0, job
  return job


def test_two_tasks_equal_one_process(two, alone):
  assert two.restarts() == 0
  assert "Slurm: 2 processes" in two.log.read_text()
  assert_same_run(two.workdir, alone)
  made = result(two.workdir)
  assert made["processes"] == 2
  restored = checkpoint.restore_params(two.workdir)
  assert made["params_sha256"] == checkpoint.params_sha256(restored)
  newest = two.workdir / "checkpoints" / str(STEPS) / "params"
  writers = {p.name for p in newest.glob("ocdbt.process_*")}
  assert writers == {"ocdbt.process_0", "ocdbt.process_1"}, writers


def preempt(job) -> None:
  """A job of a higher partition takes both nodes."""
  command = ("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null")
  job.cluster.call(*command, "--wrap=sleep 1")


def requeue(job) -> None:
  job.cluster.call("scontrol", "requeue", job.id)


def kill_a_task(job) -> None:
  (first,), (second,) = job.tasks()
  os.kill(second, signal.SIGKILL)
  os.kill(first, signal.SIGCONT)


@pytest.mark.parametrize("interrupt", [preempt, requeue, kill_a_task])
def test_an_interrupted_job_goes_on_from_its_checkpoint(submit, two, interrupt):
  job = submit(interrupt.__name__, *FLAGS)
  job.wait_for_step(SAVED + 2)
  for (task,) in job.tasks():  # else it may end before Slurm comes around;
    os.kill(task, signal.SIGSTOP)  # Slurm wakes whom it tells to end
  before = logged(job.workdir)
  interrupt(job)
  assert job.code() == 0, job
  assert job.restarts() == 1, job
  same = ("params_sha256", "loss", "tokens")
  assert [result(job.workdir)[k] for k in same] == [
    result(two.workdir)[k] for k in same
  ]
  kept = SAVED
  if interrupt is not kill_a_task:  # nothing is lost
    (kept,) = map(int, re.findall(r"at step (\d+); saved", job.log.read_text()))
    assert len(before) <= kept < STEPS
  # Lines tell the seconds since the start: these steps were not taken again.
  both = min(kept, len(before))
  assert logged(job.workdir)[:both] == before[:both]


def test_a_mistake_is_not_put_back_in_the_queue(submit):
  job = submit("mistake", "--config.data.source=jsonl")
  assert job.code() == 2, job
  assert job.restarts() == 0
  text = job.log.read_text()
  assert (
    "error: --config.data.path" in text and "not put back in the queue" in text
  )


def test_one_task_sees_a_mistake_before_the_other(submit, tmp_path):
  slow = tmp_path / "python"
  slow.write_text('#!/bin/sh\n[ "$SLURM_PROCID" = 1 ] || sleep 4\nexit 2\n')
  slow.chmod(0o755)
  job = submit("slow", python=slow)
  assert job.code() == 2, job
  assert job.restarts() == 0
