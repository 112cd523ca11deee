"""Scripts that start several hosts, against stand-ins for the clouds."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from csrm_jax import hosts
from csrm_jax.config import default

ROOT = Path(__file__).parent.parent
SCRIPTS = ("tpu_pod.sh", "xpk.sh", "slurm.sbatch")
POD = (
  "--name=pod",
  "--zone=z",
  "--accelerator=v5litepod-16",
  "--runtime=r",
  "--nfs=server:/share",
  "--wait=0",
)

# Stand-in for gcloud: answers from files in $FAKE, one answer a call.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/calls"
next() { head -n1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
case "$*" in
  *describe*) next states ;;
  *train.py*) echo "csrm_exit=$(next exits)" ;;
  *"test -f"*) exit "$(next finished)" ;;
esac
"""


def run(script, *flags, **environ):
  return subprocess.run(
    ["bash", f"launch/{script}", *flags],
    cwd=ROOT,
    env={**os.environ, **environ},
    capture_output=True,
    text=True,
    timeout=60,
  )


def stand_in(folder, name, text) -> str:
  """PATH with a program `name` of this text in front."""
  path = folder / name
  path.write_text(text)
  path.chmod(0o755)
  return f"{folder}:{os.environ['PATH']}"


def fake_cloud(folder, *, states, exits, finished):
  for name, lines in (
    ("states", states),
    ("exits", exits),
    ("finished", finished),
  ):
    (folder / name).write_text("".join(f"{x}\n" for x in lines))
  return {"PATH": stand_in(folder, "gcloud", GCLOUD), "FAKE": str(folder)}


def known(flag: str) -> bool:
  """Whether launch/train.py has this flag."""
  name = flag.removeprefix("--").split("=")[0]
  if name in ("config", "workdir", *hosts.FLAGS):
    return True
  keys = default()
  if not name.startswith("config."):
    return False
  for part in name.split(".")[1:]:
    if part not in keys:
      return False
    keys = keys[part]
  return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_explain_themselves(script):
  path = ROOT / "launch" / script
  subprocess.run(["bash", "-n", path], check=True)
  assert "set -euo pipefail" in path.read_text()
  done = run(script, "--help")
  assert done.returncode == 0 and "launch/train.py" in done.stdout


@pytest.mark.parametrize(
  "name", [*(f"launch/{s}" for s in SCRIPTS), "docs/multihost.md"]
)
def test_every_flag_of_train_that_is_shown_exists(name):
  text = (ROOT / name).read_text()
  shown = re.findall(r"--(?:config|workdir)[\w.]*(?==)", text)
  assert shown
  assert [flag for flag in shown if not known(flag)] == []
  for config in re.findall(r"configs/\w+\.py", text):
    assert (ROOT / config).is_file(), config


def test_manifest_starts_the_launcher_with_flags_that_it_has():
  manifest = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
  assert manifest["kind"] == "JobSet"
  (job,) = manifest["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"]
  (container,) = spec["template"]["spec"]["containers"]
  assert "launch/train.py" in container["command"][2]
  assert all(known(flag) for flag in container["args"])
  variables = {v["name"]: v.get("value", "0") for v in container["env"]}
  name = manifest["metadata"]["name"]
  count = job["replicas"] * spec["parallelism"]
  place = hosts.detect(variables | {"JOB_COMPLETION_INDEX": "3"})
  host = f"{name}-{job['name']}-0-0.{name}:8476"
  assert place == ("JobSet", count, 3, host, None)


def test_pod_is_awaited_replaced_and_deleted_when_the_run_is_over(tmp_path):
  environ = fake_cloud(
    tmp_path,
    states=[
      "ABSENT",
      "PROVISIONING",
      "ACTIVE",
      "SUSPENDED",
      "ABSENT",
      "ACTIVE",
    ],
    exits=[75, 0],
    finished=[1, 0],
  )
  flags = ("--config=configs/tiny.py", "--workdir=/mnt/csrm/a run")
  done = run("tpu_pod.sh", *POD, "--spot", "--", *flags, **environ)
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / "calls").read_text()
  assert calls.count("queued-resources create pod --zone=z --node-id=pod") == 2
  assert calls.count("--spot") == 2
  assert calls.count("queued-resources delete pod") == 2  # lost, then done
  (shown,) = set(re.findall(r"python launch/train.py (.*)", calls))
  assert tuple(shlex.split(shown)) == flags
  assert "--worker=all" in calls


def test_pod_stops_at_a_wrong_command(tmp_path):
  environ = fake_cloud(tmp_path, states=["ACTIVE"], exits=[2], finished=[1])
  flags = ("--config=configs/tiny.py", "--workdir=/mnt/csrm/run")
  done = run("tpu_pod.sh", *POD, "--", *flags, **environ)
  assert done.returncode == 2 and "command is wrong" in done.stderr
  assert "delete" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
  "flags, message",
  [
    (POD[1:], "--name is missing"),
    ((*POD, "--steps=3"), "--steps=3: no such option"),
    ((*POD, "--", "--workdir=runs/a"), "--workdir=runs/a: give one below"),
  ],
)
def test_pod_refuses_by_name(flags, message):
  done = run("tpu_pod.sh", *flags)
  assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
  "code, finishes, restarts, requeued, ends",
  [
    (0, True, "0", False, 0),
    (75, False, "0", True, 0),  # preempted
    (1, False, "3", True, 0),  # a node lost
    (2, False, "0", False, 2),  # a mistake
    (127, False, "0", False, 2),  # no such interpreter
    (1, False, "20", False, 1),  # too often
  ],
)
def test_slurm_job_goes_back_until_it_is_done(
  tmp_path, code, finishes, restarts, requeued, ends
):
  workdir = tmp_path / "a run"
  workdir.mkdir()
  write = f"touch {shlex.quote(str(workdir))}/result.json" if finishes else ":"
  srun = (
    f'#!/usr/bin/env bash\necho "$@" > "$FAKE/started"\n{write}\nexit {code}\n'
  )
  path = stand_in(tmp_path, "srun", srun)
  stand_in(
    tmp_path, "scontrol", '#!/usr/bin/env bash\necho "$@" > "$FAKE/back"\n'
  )
  done = run(
    "slurm.sbatch",
    "--config=configs/tiny.py",
    f"--workdir={workdir}",
    PATH=path,
    FAKE=str(tmp_path),
    SLURM_JOB_ID="7",
    SLURM_SUBMIT_DIR=str(ROOT),
    SLURM_RESTART_COUNT=restarts,
    CSRM_PYTHON="python",
  )
  assert done.returncode == ends, done.stderr
  assert (tmp_path / "back").is_file() == requeued
  started = (tmp_path / "started").read_text()
  assert "python launch/train.py --config=configs/tiny.py" in started


def test_slurm_asks_for_a_signal_ahead_and_for_requeueing():
  text = (ROOT / "launch" / "slurm.sbatch").read_text()
  assert "#SBATCH --signal=TERM@180" in text and "#SBATCH --requeue" in text


def test_slurm_outside_a_job_is_refused():
  environ = {"SLURM_JOB_ID": ""}
  done = run("slurm.sbatch", "--workdir=x", **environ)
  assert done.returncode == 2 and "submit with sbatch" in done.stderr
  assert "--workdir=DIR is missing" in run("slurm.sbatch", **environ).stderr


def test_xpk_gets_the_command(tmp_path):
  path = stand_in(
    tmp_path,
    "xpk",
    '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$FAKE/calls"\n',
  )
  flags = ("--config=configs/tiny.py", "--workdir=/mnt/csrm/a run")
  place = ("--cluster=c", "--workload=w", "--tpu-type=v5litepod-16")
  done = run(
    "xpk.sh",
    *place,
    "--image=i",
    "--slices=2",
    "--",
    *flags,
    PATH=path,
    FAKE=str(tmp_path),
  )
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / "calls").read_text().splitlines()
  assert {*place, "--docker-image=i", "--num-slices=2"} <= set(calls)
  command = calls[-1].partition("launch/train.py ")[2]
  assert tuple(shlex.split(command)) == flags
  assert "--image is missing" in run("xpk.sh", *place).stderr
