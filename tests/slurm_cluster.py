"""A Slurm cluster on this machine alone: munge, a controller, two nodes."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
INSTALL = (
  "apt-get install -y --no-install-recommends munge slurm-client slurmctld "
  "slurmd"
)
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}z")  # Slurm sorts them; JAX looks up the first
GRACE = 120  # seconds from SIGTERM to SIGKILL, generous for busy machines
REQUEUED = 15  # seconds that a requeued job waits at least

# cred_expire is also how long a requeued job waits. Nodes that share a machine
# can have neither cgroups nor bound tasks.
CONFIG = """
ClusterName=csrm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeued}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={grace}
ReturnToService=2
FirstJobId={first}
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=2
"""


class Cluster(NamedTuple):
  """A running cluster: its files, and the environment of its commands."""

  folder: Path
  environ: dict[str, str]

  def call(self, *command: str) -> str:
    """What a Slurm command prints.

    Raises:
      AssertionError: it failed; has its complaint.
    """
    done = subprocess.run(
      command, env=self.environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout

  def logs(self) -> str:
    """Ends of all logs, those of the daemons and those of the jobs."""
    paths = sorted(self.folder.glob("*.log"))
    return "\n".join(f"{p.name}:\n{p.read_text()[-4000:]}" for p in paths)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
  """A cluster whose every file lies in `folder`; it ends with the block.

  Skips the test where Slurm is not installed.
  """
  path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
  missing = [x for x in PROGRAMS if not shutil.which(x, path=path)]
  if missing:
    pytest.skip(f"no {missing[0]} here; as root: {INSTALL}")
  outer = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SCANCEL", "SQUEUE")
  environ = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
  environ |= {"PATH": path, "SLURM_CONF": f"{folder}/slurm.conf"}
  cluster = Cluster(folder, environ)
  _configure(folder)
  daemons: list[subprocess.Popen[bytes]] = []
  # Whatever ends this process, the pipe to the guard closes.
  guard = subprocess.Popen(
    [sys.executable, __file__, folder],
    stdin=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    _start(daemons, cluster, _munged(folder), "munged")
    munge = folder / "munge.socket"
    _wait(cluster, daemons, munge.exists, "munge does not answer")
    _start(daemons, cluster, ["slurmctld", "-D", "-i"], "slurmctld")
    for node in NODES:
      command = ["slurmd", "-D", "-N", node]
      _start(daemons, cluster, command, f"slurmd.{node}.start")
    _wait(cluster, daemons, lambda: _idle(cluster), "nodes are not idle")
    yield cluster
  finally:
    guard.communicate()
    for daemon in daemons:
      daemon.wait(timeout=60)
  assert guard.returncode == 0, "processes of the cluster are still there"


def _configure(folder: Path) -> None:
  with contextlib.ExitStack() as held:  # so that no port comes twice
    sockets = [held.enter_context(socket.socket()) for _ in range(3)]
    for each in sockets:
      each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
  for name in ("state", *NODES):
    (folder / name).mkdir()
  (folder / "munge.key").write_bytes(os.urandom(128))
  (folder / "munge.key").chmod(0o600)
  (folder / "slurm.conf").write_text(
    CONFIG.format(
      folder=folder,
      host=HOST,
      user=getpass.getuser(),
      nodes=NODES,
      ports=ports,
      grace=GRACE,
      requeued=REQUEUED,
      # JAX derives its port from it: apart from other clusters here.
      first=1 + os.getpid() % 3000,
    )
  )


def _munged(folder: Path) -> list[str]:
  return [
    "munged",
    "--foreground",
    "--force",  # its socket may lie in a folder that others cannot enter
    f"--socket={folder}/munge.socket",
    f"--key-file={folder}/munge.key",
    f"--pid-file={folder}/munged.pid",
    f"--seed-file={folder}/munged.seed",
    f"--log-file={folder}/munged.file",
  ]


def _start(daemons, cluster: Cluster, command: list[str], name: str) -> None:
  with (cluster.folder / f"{name}.log").open("w") as log:
    daemons.append(
      subprocess.Popen(
        command,
        env=cluster.environ,
        cwd=cluster.folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is not for them
      )
    )


def _wait(cluster: Cluster, daemons, ready, complaint: str) -> None:
  end = time.monotonic() + 120
  while not ready():
    ended = [d.args for d in daemons if d.poll() is not None]
    late = time.monotonic() > end
    assert not ended and not late, f"{complaint}; {ended}\n{cluster.logs()}"
    time.sleep(0.2)


def _idle(cluster: Cluster) -> bool:
  command = ["sinfo", "--noheader", "--Node", "--format=%N %T"]
  done = subprocess.run(
    command, env=cluster.environ, capture_output=True, text=True
  )
  states = dict(line.split() for line in done.stdout.splitlines())
  return states == dict.fromkeys(NODES, "idle")


def tasks(cluster: Cluster, job: str, *, rank: int) -> list[int]:
  """Process ids of this task of the job's steps."""
  return _with_environ(
    {
      "SLURM_CONF": f"{cluster.folder}/slurm.conf",
      "SLURM_JOB_ID": job,
      "SLURM_STEP_ID": "0",
      "SLURM_PROCID": str(rank),
    }
  )


def _with_environ(variables: dict[str, str]) -> list[int]:
  """Processes that began with these variables in their environment."""
  wanted = {f"{k}={v}".encode() for k, v in variables.items()}
  found = []
  for process in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):  # it ended, or is another user's
      held = (process / "environ").read_bytes().split(b"\0")
      if wanted.issubset(held):
        found.append(int(process.name))
  return found


def _guard(folder: str) -> int:
  """Waits for the end of stdin, then kills all that knows this cluster.

  Returns:
    How many processes are left, 0 unless something is badly wrong.
  """
  sys.stdin.read()
  end = time.monotonic() + 30
  ours = {"SLURM_CONF": f"{folder}/slurm.conf"}
  while (left := _with_environ(ours)) and time.monotonic() < end:
    for process in left:
      with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    time.sleep(0.2)
  return len(left)


if __name__ == "__main__":
  sys.exit(_guard(sys.argv[1]))
