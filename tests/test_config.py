"""Recipes set known keys, of the right type, and say what they cost."""

import ast
import sys
from pathlib import Path

import pytest

from csrm_jax.config import default, from_file

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture
def outside(monkeypatch):
  """Nothing of the root can be imported, as in a launcher's process."""
  here = [p for p in sys.path if Path(p).resolve() != ROOT]
  monkeypatch.setattr(sys, "path", here)
  for name in [n for n in sys.modules if n.split(".")[0] == "configs"]:
    monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_recipe(path, outside):
  doc = ast.get_docstring(ast.parse(path.read_text())) or ""
  assert "Cost" in doc or "hours" in doc, f"{path}: say what it costs"
  config = from_file(path)
  known = default()
  assert set(config.keys()) == set(known.keys())
  for key in known:
    if hasattr(known[key], "keys"):
      assert set(config[key].keys()) == set(known[key].keys()), key
  assert config.is_locked


def test_a_file_without_a_recipe_is_named(tmp_path):
  (tmp_path / "empty.py").write_text("steps = 3\n")
  with pytest.raises(ValueError, match=r"empty\.py: defines no get_config"):
    from_file(tmp_path / "empty.py")
  with pytest.raises(OSError, match=r"none\.py"):
    from_file(tmp_path / "none.py")


def test_unknown_key_and_wrong_type_fail():
  config = default()
  with pytest.raises(AttributeError):
    config.model.lr = 1.0
  with pytest.raises(TypeError):
    config.steps = "many"
