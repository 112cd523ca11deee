"""What a figure was measured on (command, versions, machine), and launchers."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csrm_jax.eval.run import peak_memory_gib

ROOT = Path(__file__).parent.parent


def launch(script: str, *options: str) -> None:
  """Runs `launch/SCRIPT` as a user would; where it fails, so does this process.

  Raises:
    SystemExit: with the status of the script, which has said why.
  """
  command = [sys.executable, str(ROOT / "launch" / script), *options]
  status = subprocess.run(command, check=False).returncode
  if status:
    raise SystemExit(status)


def describe(
  packages: Sequence[str], paths: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Facts to write beside every result, as the machine is now.

  Args:
    packages: whose versions count.
    paths: what stands in the command for a path that is the user's own.

  Returns:
    command; versions of Python and the packages that are installed; machine:
    processor, cores, load and the peak memory, GiB, of this process or of the
    largest that it ran.
  """
  words = []
  for argument in sys.argv:
    before, equals, last = argument.rpartition("=")
    words.append(before + equals + (paths or {}).get(last, last))
  return {
    "command": " ".join(words),
    "machine": {
      "cpu": _processor(),
      "cores": os.cpu_count(),
      "load_at_end": os.getloadavg()[0],
      "peak_memory_gib": max(
        peak_memory_gib(), peak_memory_gib(resource.RUSAGE_CHILDREN)
      ),
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
