"""What a figure was measured on: command, versions, machine."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csrm_jax.eval.run import peak_memory_gib


def describe(packages: Sequence[str]) -> dict[str, Any]:
  """Facts to write beside every result, as the machine is now.

  Args:
    packages: whose versions count.

  Returns:
    command; versions of Python and the packages that are installed; machine:
    processor, cores, load and the peak memory of this process, GiB.
  """
  return {
    "command": " ".join(sys.argv),
    "machine": {
      "cpu": _processor(),
      "cores": os.cpu_count(),
      "load_at_end": os.getloadavg()[0],
      "peak_memory_gib": peak_memory_gib(),
    },
    "versions": {"python": platform.python_version()}
    | {name: version for name in packages if (version := _version(name))},
  }


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _processor() -> str:
  info = Path("/proc/cpuinfo")
  if info.is_file():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":")[1].strip()
  return platform.processor()
