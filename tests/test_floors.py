"""Imports go down or sideways, never up; heavy packages stay where they may."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "csrm_jax"

FLOORS = {
  "types": 0, "config": 0, "spec": 0, "markdown": 0, "errors": 0,
  "hosts": 0, "peers": 0, "storage": 0,
  "losses": 1, "metrics": 1, "sharding": 1, "checkpoint": 1, "manifest": 1,
  "model": 1, "data": 1,
  "judge": 2, "score": 2, "score_file": 2, "score_cached": 2,
  "eval": 3, "rules": 3,
  "train": 4,
  "align": 5, "export": 5, "serve": 5, "pods": 5,
}  # fmt: skip

FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def imports(path: Path):
  """(module, whether at import time) of every import in a file."""
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    else:
      continue
    for name in names:
      yield name, node in tree.body


def floor_of(module: str) -> int | None:
  """Floor of `csrm_jax.x...`; None outside the package or for its root."""
  parts = module.split(".")
  if parts[0] != "csrm_jax" or len(parts) < 2:
    return None
  return FLOORS.get(parts[1])


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_down(path):
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  if parts[0] == "__init__":
    return  # the public names, from every floor
  assert parts[0] in FLOORS, f"{path}: which floor? Add it to FLOORS"
  for module, _ in imports(path):
    above = floor_of(module)
    assert above is None or above <= FLOORS[parts[0]], f"{path}: {module}"
    root = module.split(".")[0]
    assert root not in ("launch", "configs", "tests", "benchmarks"), module


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_heavy_packages_stay_in_their_rooms(path):
  where = path.relative_to(PACKAGE).as_posix()
  for module, at_import in imports(path):
    root = module.split(".")[0]
    if root == "flax":
      assert where.startswith("model/"), f"{where} imports flax"
    if root == "torch":
      assert where.startswith("export/") or where == "eval/judges.py", where
      assert not at_import, f"{where}: import torch inside the function"


def test_flax_nnx_is_what_the_model_is_made_of():
  used = [m for m, _ in imports(PACKAGE / "model" / "backbone.py")]
  assert any(m.startswith("flax") for m in used)


def test_public_names_import_without_torch():
  code = (
    "import sys, csrm_jax as csrm;"
    "print(csrm.load, csrm.score, csrm.fit, csrm.evaluate, csrm.export,"
    " csrm.Spec); assert 'torch' not in sys.modules"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
