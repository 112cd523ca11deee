"""What the processes of a run do together: start, wait, agree, stop.

Messages go through JAX's coordination service, a key-value store in process 0:
no device takes part, so they work before, between and after collectives.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from csrm_jax import hosts

# Seconds. A lost process is noticed by its heartbeats (or at once, by its
# closed connection), so waiting for a living one may take long.
HEARTBEAT_SECONDS = 60  # silent for so long: lost, and all others end
START_SECONDS = 300  # until every process has come
WAIT_SECONDS = 24 * 3600  # for the work of process 0: preparation above all
ANSWER_SECONDS = 10  # for the roll call after a failure
LINGER_SECONDS = 5  # that process 0 outlives a failure by

AGAIN = 75  # exit code (EX_TEMPFAIL): not finished, start all processes again


@contextmanager
def joined(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int | None = None,
) -> Iterator[None]:
  """Makes this process one of a run's; must enclose all use of JAX.

  A process that fails ends without waiting for the others (process 0 after
  LINGER_SECONDS); they notice within `heartbeat_seconds`, and end too. Leaving
  by `sys.exit(AGAIN)`, as all do after SIGTERM, is no failure.

  Args:
    coordinator: see `hosts.detect`, as for the next two.
    num_processes: in all.
    process_id: of this process.
    heartbeat_seconds: silence after which a process counts as lost.

  Raises:
    ValueError: of `hosts.detect`, or the others cannot be reached.
  """
  place = hosts.detect(
    os.environ,
    coordinator=coordinator,
    num_processes=num_processes,
    process_id=process_id,
  )
  if place is None:
    yield
    return
  _start(place, heartbeat_seconds or HEARTBEAT_SECONDS)
  import jax

  code = 0
  try:
    yield
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 1
    if code != AGAIN:
      _leave(code)
  except BaseException as error:
    traceback.print_exc()
    if isinstance(error, jax.errors.JaxRuntimeError):
      code, others = _roll_call(str(error))
      _leave(code, wait=others)
    _leave(1)
  jax.distributed.shutdown()  # waits for the others, so that all end well
  if code:
    sys.exit(code)


def _start(place: hosts.Place, heartbeat_seconds: int) -> None:
  import jax

  # Without it, CPU processes see each other's devices but cannot reduce.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.num_processes,
      place.process_id,
      cluster_detection_method=place.method or "deactivate",
      initialization_timeout=START_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=heartbeat_seconds,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"{place.found}: process {place.process_id} of {place.num_processes} "
      f"cannot join the others: {error}; is process 0 up, and its port open? "
      "--coordinator=HOST:PORT --num_processes --process_id set it by hand"
    ) from error
  from jax._src import distributed  # asking JAX itself would start devices

  made = distributed.global_state
  if made.process_id == 0:
    where = f"the first at {made.coordinator_address}"
    print(f"{place.found}: {made.num_processes} processes, {where}", flush=True)


def _leave(code: int, *, wait: bool = True) -> None:
  """Ends this process; an orderly exit would wait for the lost ones.

  With process 0 goes the service, and JAX then aborts whoever is left: it stays
  until the others have had time to say why they end. It does not where nobody
  is left: JAX aborts it, too, once the lost ones' heartbeats are overdue.

  Args:
    code: of the exit.
    wait: whether others are left.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if wait and is_first():
    time.sleep(LINGER_SECONDS)
  os._exit(code)


def _roll_call(failure: str) -> tuple[int, bool]:
  """Says who does not answer after a failure.

  Returns:
    The exit code, and whether any other process is left.
  """
  import jax

  me, count = jax.process_index(), jax.process_count()
  head = f"error: process {me} of {count}: {failure.splitlines()[0][:200]}"
  client = _client()
  try:
    client.key_value_set(f"csrm/alive/{me}", "")
    end = time.monotonic() + ANSWER_SECONDS
    silent = set(range(count))
    while silent and time.monotonic() < end:
      time.sleep(0.2)
      keys = [key for key, _ in client.key_value_dir_get("csrm/alive/")]
      silent -= {int(key.rpartition("/")[2]) for key in keys}
  except jax.errors.JaxRuntimeError:
    silent = {0}
  if not silent:
    print(f"{head}; every process answers: see above", file=sys.stderr)
    return 1, True
  names = ", ".join(map(str, sorted(silent)))
  print(
    f"{head}\nerror: no answer from process {names}: lost, if its log does not "
    "tell; start all processes again, they go on from the last checkpoint",
    file=sys.stderr,
  )
  return AGAIN, len(silent) < count - 1


def _client() -> Any:
  """The key-value store of the run. JAX has no public name for it."""
  from jax._src import distributed

  client = distributed.global_state.client
  if client is None:
    raise ValueError(
      "several processes, but jax.distributed was not started: run inside "
      "csrm_jax.peers.joined(), as the launchers do"
    )
  return client


def several() -> bool:
  """Whether this process is one of several."""
  import jax

  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this is process 0, which writes and prints."""
  import jax

  return jax.process_index() == 0


def first(name: str, work: Callable[[], Any]) -> Any:
  """Process 0 does `work`, the others wait; all return its result.

  Args:
    name: of the work, for messages; every process must call alike.
    work: returns what JSON can hold.

  Raises:
    ValueError: in every process, if `work` raised one in process 0, or did
      not end within WAIT_SECONDS.
  """
  if not several():
    return work()
  client, key = _client(), f"csrm/first/{name}"
  if not is_first():
    told = json.loads(_await(client, key, name))
    client.wait_at_barrier(f"{key}/read", START_SECONDS * 1000)
    client.wait_at_barrier(f"{key}/freed", START_SECONDS * 1000)
    if "error" in told:
      raise ValueError(f"process 0, {name}: {told['error']}")
    return told["result"]
  try:
    result = work()
    text = json.dumps({"result": result})
  except Exception as error:
    _tell(client, key, json.dumps({"error": str(error)}))
    raise
  _tell(client, key, text)
  return result


def _tell(client: Any, key: str, text: str) -> None:
  """Puts `text` there for all others, and frees the key once they have it."""
  client.key_value_set(key, text)
  client.wait_at_barrier(f"{key}/read", START_SECONDS * 1000)
  client.key_value_delete(key)
  client.wait_at_barrier(f"{key}/freed", START_SECONDS * 1000)


def _await(client: Any, key: str, name: str) -> str:
  import jax

  end = time.monotonic() + WAIT_SECONDS
  while True:
    try:  # in short turns, so that signals are heard
      return client.blocking_key_value_get(key, 5000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
    if time.monotonic() > end:
      raise ValueError(
        f"process {jax.process_index()}: process 0 lives, but did not end "
        f"{name!r} within {WAIT_SECONDS} s: look at its log"
      )


def agree(name: str, value: str) -> None:
  """Checks that all processes hold the same value.

  Raises:
    ValueError: in every process, if one differs; has that value and the first.
  """
  import jax

  count = jax.process_count()
  if count == 1:
    return
  client, key = _client(), f"csrm/agree/{name}"
  ours = f"{key}/{jax.process_index()}"
  client.key_value_set(ours, value)
  client.wait_at_barrier(f"{key}/set", START_SECONDS * 1000)
  said = dict(client.key_value_dir_get(f"{key}/"))
  client.wait_at_barrier(f"{key}/read", START_SECONDS * 1000)
  client.key_value_delete(ours)
  values = [said[f"{key}/{i}"] for i in range(count)]
  for i, other in enumerate(values):
    if other != values[0]:
      raise ValueError(
        f"{name}: process 0 has {values[0]}, process {i} {other}; start all "
        "with the same command, on a workdir that all of them see"
      )


@contextmanager
def preempted() -> Iterator[Callable[[int], bool]]:
  """A function of the step: whether SIGTERM came, so that all stop after it.

  One process looks at its own flag. Several ask JAX's preemption service, which
  has them all stop at the same step, the first that none has passed yet; each
  must ask at each step.
  """
  from jax.experimental import multihost_utils

  if several():  # JAX's own handler is in place
    yield lambda step: bool(multihost_utils.reached_preemption_sync_point(step))
    return
  came: list[int] = []
  try:
    before = signal.signal(signal.SIGTERM, lambda n, _: came.append(n))
  except ValueError:  # not in the main thread, so signals go elsewhere
    yield lambda step: False
    return
  try:
    yield lambda step: bool(came)
  finally:
    signal.signal(signal.SIGTERM, before)
