"""Settings that every test shares."""

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

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
