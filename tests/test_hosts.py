import pytest

from csrm_jax import hosts

SLURM = {
  "SLURM_JOB_ID": "4711",
  "SLURM_STEP_NODELIST": "node[001-002]",
  "SLURM_NTASKS": "2",
  "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
MPI4 = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI5 = {k: v for k, v in MPI4.items() if "orte" not in k}
GKE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}
SLICES = {
  "MEGASCALE_COORDINATOR_ADDRESS": "run-0-0.run",
  "MEGASCALE_NUM_SLICES": "3",
  "MEGASCALE_SLICE_ID": "1",
}
JOBSET = {
  "JAX_PROCESS_COUNT": "6",
  "JAX_COORDINATOR_ADDRESS": "run-hosts-0-0.run",
  "JOB_COMPLETION_INDEX": "1",
  "JOB_INDEX": "2",
  "PROCESSES_IN_JOB": "2",
}


def without(variables, *names):
  return {k: v for k, v in variables.items() if k not in names}


def test_a_machine_on_its_own_has_nothing_to_start():
  assert hosts.detect({"HOME": "/root"}) is None


@pytest.mark.parametrize(
  "environ, expected",
  [
    (SLURM, ("Slurm", 2, 1, None, "slurm")),
    (MPI4, ("Open MPI", 4, 3, None, "ompi")),
    (GKE, ("TPU on GKE", 4, 2, None, "gketpu")),
    (GKE | SLICES, ("TPU on GKE", 12, 6, None, "gketpu")),
    (
      GKE | {"JAX_COORDINATOR_ADDRESS": "a"},
      ("TPU on GKE", 4, 2, "a:8476", "gketpu"),
    ),
    (JOBSET, ("JobSet", 6, 5, "run-hosts-0-0.run:8476", None)),
    (
      MPI5 | {"JAX_COORDINATOR_ADDRESS": "n1:99"},
      ("Open MPI", 4, 3, "n1:99", None),
    ),
  ],
)
def test_launchers_are_told_by_their_variables(environ, expected):
  assert hosts.detect(environ) == hosts.Place(*expected)


def test_open_mpi_5_on_one_host_agrees_on_a_port():
  one = MPI5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "job@1"}
  places = [
    hosts.detect(one | {"OMPI_COMM_WORLD_RANK": str(i)}) for i in range(4)
  ]
  assert {p.coordinator for p in places if p} == {places[0].coordinator}
  host, port = places[0].coordinator.split(":")
  assert host == "127.0.0.1" and 61440 <= int(port) < 65536


def test_flags_come_first_and_mpirun_before_slurm():
  flags = {"coordinator": "h:1", "num_processes": 3, "process_id": 0}
  assert hosts.detect(SLURM, **flags) == ("flags", 3, 0, "h:1", None)
  both = hosts.detect(SLURM | MPI4)
  assert both is not None and both.found == "Open MPI"
  assert hosts.detect(SLURM | JOBSET).found == "Slurm"
  assert hosts.detect(GKE | JOBSET).found == "TPU on GKE"


@pytest.mark.parametrize(
  "environ",
  [
    SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    MPI4 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
    {"JAX_PROCESS_COUNT": "1", "JOB_COMPLETION_INDEX": "0"},
  ],
)
def test_one_process_of_a_launcher_runs_alone(environ):
  assert hosts.detect(environ) is None


def test_num_processes_1_turns_detection_off():
  assert hosts.detect(SLURM, num_processes=1) is None


@pytest.mark.parametrize(
  "environ, message",
  [
    (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_NTASKS=2.*put srun before"),
    (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set.*same laun"),
    (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID is not set"),
    (SLURM | {"SLURM_PROCID": "2"}, "SLURM_PROCID=2 and SLURM_NTASKS.*disagr"),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "TASKS=4 and SLURM_NTASKS=2 dis"),
    (SLURM | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two' is no number"),
    (without(MPI4, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set"),
    (without(MPI4, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
    (MPI5, "JAX_COORDINATOR_ADDRESS is not set.*add -x"),
    (without(GKE, "TPU_WORKER_ID"), "TPU_WORKER_ID is not set"),
    (without(GKE, "TPU_WORKER_HOSTNAMES"), "TPU_WORKER_HOSTNAMES is not set"),
    (GKE | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4 .*of 4. disagree"),
    (
      GKE | without(SLICES, "MEGASCALE_SLICE_ID"),
      "MEGASCALE_SLICE_ID is not set.*all three",
    ),
    (GKE | SLICES | {"MEGASCALE_SLICE_ID": "3"}, "MEGASCALE_SLICE_ID=3 and"),
    (without(JOBSET, "JAX_PROCESS_COUNT"), "JAX_PROCESS_COUNT is not set"),
    (without(JOBSET, "JOB_COMPLETION_INDEX"), "COMPLETION_INDEX is not set"),
    (without(JOBSET, "JAX_COORDINATOR_ADDRESS"), "COORDINATOR_ADDRESS is not"),
    (without(JOBSET, "PROCESSES_IN_JOB"), "PROCESSES_IN_JOB is not set"),
    (JOBSET | {"JAX_PROCESS_COUNT": "5"}, "INDEX=5 and JAX_PROCESS_COUNT"),
  ],
)
def test_half_a_set_or_a_contradiction_is_refused_by_name(environ, message):
  with pytest.raises(ValueError, match=message):
    hosts.detect(environ)


@pytest.mark.parametrize(
  "flags, message",
  [
    ({"coordinator": "h:1"}, "coordinator=h:1 without --num_processes and --p"),
    ({"num_processes": 2, "process_id": 0}, "without --coordinator: give all"),
    (
      {"coordinator": "h", "num_processes": 2, "process_id": 0},
      "--coordinator=h: write HOST:PORT",
    ),
    (
      {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
      "--process_id=2 and --num_processes .of 2. disagree",
    ),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
  with pytest.raises(ValueError, match=message):
    hosts.detect({}, **flags)


def test_tpu_vm_is_left_to_jax(monkeypatch):
  monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda _: object())
  monkeypatch.setattr(hosts.glob, "glob", lambda _: ["/dev/accel0"])
  place = hosts.detect({})
  assert place == ("TPU metadata", None, None, None, "gcetpu")
  assert hosts.detect({"JAX_PLATFORMS": "cpu"}) is None


def test_jax_derives_what_is_left_to_it(monkeypatch):
  """The same fake variables, read by JAX's own detection."""
  from jax._src.clusters import ClusterEnv

  for environ, address in (
    (SLURM, f"node001:{4711 % 4096 + 61440}"),
    (MPI4, f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}"),
  ):
    place = hosts.detect(environ)
    with monkeypatch.context() as patch:
      for name, value in environ.items():
        patch.setenv(name, value)
      found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, place.method, 1
      )
    assert found[:3] == (address, place.num_processes, place.process_id)
