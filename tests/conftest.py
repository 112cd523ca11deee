"""Settings that every test shares."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Most of the suite's time went into compiling tiny programs: they are compiled
# without LLVM's optimizations, and once for all workers and processes of a
# session. JAX reads these variables when imported, and processes inherit them.
# The folder is the session's own: what the compiler warns of is told again.
ALONE = "PYTEST_XDIST_WORKER" not in os.environ
if ALONE:
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="csrm_programs_"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  # `make test-slow` says 0: real models run there, as users compile them.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_unconfigure() -> None:
  """The process that made the folder of programs removes it."""
  if ALONE:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# Annotated shapes and types hold at run time, in every call of every test.
install_import_hook("csrm_jax", "beartype.beartype")

# Time is measured in benchmarks/, not here: a busy machine fails no test.
settings.register_profile(
  "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def staged() -> str:
  """The folder of the real sets; without it a test is skipped."""
  folder = os.environ.get("CSRM_DATA")
  if not folder or not Path(folder).is_dir():
    pytest.skip("CSRM_DATA names no folder of real sets")
  return folder


@pytest.fixture(scope="module")
def compiled_anew():
  """For tests of what the compiler says: no program is read from a cache.

  Processes that such a test starts optimize as they do outside of tests.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  yield
  monkeypatch.undo()
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def one_thread():
  """On matrices this small torch's threads only wait for each other."""
  if not importlib.util.find_spec("torch"):
    yield
    return
  import torch

  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)
