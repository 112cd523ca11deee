"""Where this process stands among those of a run: flags, Slurm, MPI, GKE, TPU.

Nothing here touches a JAX backend: `peers.joined` does, with what is found.
"""

import glob
import importlib.util
import zlib
from collections.abc import Mapping
from typing import NamedTuple

PORT = 8476  # of the coordinator, where only its host is given
ALONE = "--num_processes=1 if this process is meant to run alone"

# What every launcher that may run on several hosts takes, besides its own.
FLAGS: dict[str, tuple[type, str]] = {
  "coordinator": (str, "HOST:PORT of process 0; set all three or none"),
  "num_processes": (int, "processes in all; 1: alone, whatever is detected"),
  "process_id": (int, "number of this process, from 0"),
  "heartbeat_seconds": (int, "a process silent for so long is lost (60)"),
}


class Place(NamedTuple):
  """What `jax.distributed.initialize` has to know.

  Attributes:
    found: where it comes from, for messages.
    num_processes: in all; None: JAX asks the TPU metadata server.
    process_id: of this process, from 0; None likewise.
    coordinator: HOST:PORT of process 0; None: JAX derives it by `method`.
    method: JAX's `cluster_detection_method`; None: everything is given.
  """

  found: str
  num_processes: int | None
  process_id: int | None
  coordinator: str | None = None
  method: str | None = None


def detect(
  environ: Mapping[str, str],
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Place | None:
  """This process's place, or None if it runs alone.

  The first that is there counts: flags, Open MPI's variables, Slurm's (an
  `mpirun` inside a Slurm job is the inner launcher, and Slurm's variables then
  number the nodes, not the processes), those of TPUs on GKE, of a JobSet, the
  metadata of a TPU VM.

  Args:
    environ: environment variables.
    coordinator: the flag, HOST:PORT.
    num_processes: the flag; 1 alone turns detection off.
    process_id: the flag.

  Raises:
    ValueError: half of a set is there, or its values contradict each other;
      names the variable and the remedy.
  """
  given = (coordinator, num_processes, process_id)
  if any(x is not None for x in given):
    return _of_flags(*given)
  if any(name.startswith("OMPI_COMM_WORLD_") for name in environ):
    return _of_open_mpi(environ)
  if "SLURM_JOB_ID" in environ:
    return _of_slurm(environ)
  if "TPU_WORKER_HOSTNAMES" in environ or "TPU_WORKER_ID" in environ:
    return _of_gke_tpu(environ)
  if "JAX_PROCESS_COUNT" in environ or "JOB_COMPLETION_INDEX" in environ:
    return _of_jobset(environ)
  if _on_tpu_vm(environ):
    return Place("TPU metadata", None, None, method="gcetpu")
  return None


def _of_flags(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Place | None:
  if num_processes == 1 and process_id in (None, 0):
    return None
  values = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  missing = [name for name, value in values.items() if value is None]
  if missing or num_processes is None or process_id is None:
    there = ", ".join(f"{k}={v}" for k, v in values.items() if v is not None)
    raise ValueError(
      f"{there} without {' and '.join(missing)}: give all three to every "
      "process, or none where Slurm, Open MPI, GKE or a TPU VM tell"
    )
  _check(process_id, num_processes, "--process_id", "--num_processes")
  host, _, port = (coordinator or "").rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(
      f"--coordinator={coordinator}: write HOST:PORT, the same for every "
      f"process, for example 10.0.0.1:{PORT}; HOST runs process 0"
    )
  return Place("flags", num_processes, process_id, coordinator)


def _of_slurm(environ: Mapping[str, str]) -> Place | None:
  tasks = _whole(environ, "SLURM_NTASKS", 1)
  if "SLURM_STEP_NODELIST" not in environ:  # a batch script or a shell
    if tasks == 1:
      return None
    raise ValueError(
      f"SLURM_NTASKS={tasks}, but SLURM_STEP_NODELIST is not set, so srun did "
      f"not start this process: put srun before python, or give {ALONE}"
    )
  step = _whole(environ, "SLURM_STEP_NUM_TASKS", tasks)
  if step != tasks:
    raise ValueError(
      f"SLURM_STEP_NUM_TASKS={step} and SLURM_NTASKS={tasks} disagree: unset "
      "SLURM_NTASKS in the batch script, or give srun --ntasks"
    )
  if tasks == 1:
    return None
  for name in ("SLURM_PROCID", "SLURM_LOCALID"):
    _whole(environ, name)
  number = _whole(environ, "SLURM_PROCID")
  _check(number, tasks, "SLURM_PROCID", "SLURM_NTASKS")
  return Place("Slurm", tasks, number, method="slurm")


def _of_open_mpi(environ: Mapping[str, str]) -> Place | None:
  size = _whole(environ, "OMPI_COMM_WORLD_SIZE")
  rank = _whole(environ, "OMPI_COMM_WORLD_RANK")
  _check(rank, size, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
  if size == 1:
    return None
  if "OMPI_MCA_orte_hnp_uri" in environ:  # Open MPI up to 4
    _whole(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    return Place("Open MPI", size, rank, method="ompi")
  # Open MPI 5 names no host, which JAX then cannot derive either.
  if environ.get("JAX_COORDINATOR_ADDRESS"):
    return Place("Open MPI", size, rank, _address(environ))
  if _whole(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) == size:
    job = environ.get("PMIX_NAMESPACE", "").encode()
    port = 61440 + zlib.crc32(job) % 4096  # apart for each job on this host
    return Place("Open MPI", size, rank, f"127.0.0.1:{port}")
  raise ValueError(
    f"OMPI_COMM_WORLD_SIZE={size}, but JAX_COORDINATOR_ADDRESS is not set and "
    "Open MPI 5 does not tell which host runs rank 0: add -x "
    f"JAX_COORDINATOR_ADDRESS=HOST:{PORT} to mpirun"
  )


def _of_gke_tpu(environ: Mapping[str, str]) -> Place | None:
  names = environ.get("TPU_WORKER_HOSTNAMES", "")
  workers = len(names.split(",")) if names else 0
  number = _whole(environ, "TPU_WORKER_ID", -1)
  if not workers or number < 0:
    missing = "TPU_WORKER_ID" if workers else "TPU_WORKER_HOSTNAMES"
    raise ValueError(
      f"{missing} is not set, but its counterpart is: ask for google.com/tpu "
      f"in the pod's resources, so that GKE sets both, or give {ALONE}"
    )
  _check(number, workers, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
  slices, nth = 1, 0
  multi = [
    f"MEGASCALE_{x}" for x in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")
  ]
  missing = [name for name in multi if not environ.get(name)]
  if len(missing) < len(multi):
    if missing:
      raise ValueError(
        f"{missing[0]} is not set, but other MEGASCALE_ variables are: a run "
        "on several slices needs all three; JobSet sets them"
      )
    slices = _whole(environ, "MEGASCALE_NUM_SLICES")
    nth = _whole(environ, "MEGASCALE_SLICE_ID")
    _check(nth, slices, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES")
  count, place = workers * slices, number + nth * workers
  if count == 1:
    return None
  # JAX reads the variable too, but stumbles over one without a port.
  named = _address(environ) if environ.get("JAX_COORDINATOR_ADDRESS") else None
  return Place("TPU on GKE", count, place, named, method="gketpu")


def _of_jobset(environ: Mapping[str, str]) -> Place | None:
  """The variables of launch/jobset.yaml, which are those of xpk and MaxText."""
  count = _whole(environ, "JAX_PROCESS_COUNT")
  if count == 1:
    return None
  number = _whole(environ, "JOB_COMPLETION_INDEX")
  several = [x for x in ("JOB_INDEX", "PROCESSES_IN_JOB") if x in environ]
  if several:
    jobs = _whole(environ, "PROCESSES_IN_JOB")
    _check(number, jobs, "JOB_COMPLETION_INDEX", "PROCESSES_IN_JOB")
    number += _whole(environ, "JOB_INDEX") * jobs
  _check(number, count, "JOB_COMPLETION_INDEX", "JAX_PROCESS_COUNT")
  return Place("JobSet", count, number, _address(environ))


def _on_tpu_vm(environ: Mapping[str, str]) -> bool:
  """Whether JAX will run on TPU chips of this machine (Compute Engine)."""
  platforms = environ.get("JAX_PLATFORMS") or "tpu"
  if "tpu" not in platforms or environ.get("TPU_SKIP_MDS_QUERY"):
    return False
  if importlib.util.find_spec("libtpu") is None:
    return False
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _address(environ: Mapping[str, str]) -> str:
  """JAX_COORDINATOR_ADDRESS with a port."""
  address = environ.get("JAX_COORDINATOR_ADDRESS", "")
  if not address:
    raise ValueError(
      "JAX_COORDINATOR_ADDRESS is not set, but the number of processes is: "
      f"set it to HOST:{PORT}, HOST being that of process 0, or give {ALONE}"
    )
  if ":" in address:
    return address
  return f"{address}:{environ.get('JAX_COORDINATOR_PORT') or PORT}"


def _whole(
  environ: Mapping[str, str], name: str, absent: int | None = None
) -> int:
  """A variable as a number >= 0, or `absent`."""
  text = environ.get(name)
  if text is None and absent is not None:
    return absent
  if text is None:
    raise ValueError(
      f"{name} is not set, but others of its set are: start all processes by "
      f"the same launcher (docs/multihost.md), or give {ALONE}"
    )
  if not text.isdecimal():
    raise ValueError(
      f"{name}={text!r} is no number from 0: unset it, or give --coordinator, "
      "--num_processes and --process_id"
    )
  return int(text)


def _check(number: int, count: int, name: str, of: str) -> None:
  if not 0 <= number < count:
    raise ValueError(
      f"{name}={number} and {of} (of {count}) disagree: processes are "
      "numbered from 0 up to one less than their count"
    )
