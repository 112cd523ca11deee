"""Recipes set known keys, of the right type, and say what they cost."""

import ast
import importlib
from pathlib import Path

import pytest

from csrm_jax.config import default

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_recipe(path):
  doc = ast.get_docstring(ast.parse(path.read_text())) or ""
  assert "Cost" in doc or "hours" in doc, f"{path}: say what it costs"
  config = importlib.import_module(f"configs.{path.stem}").get_config()
  known = default()
  assert set(config.keys()) == set(known.keys())
  for key in known:
    if hasattr(known[key], "keys"):
      assert set(config[key].keys()) == set(known[key].keys()), key
  assert config.is_locked


def test_unknown_key_and_wrong_type_fail():
  config = default()
  with pytest.raises(AttributeError):
    config.model.lr = 1.0
  with pytest.raises(TypeError):
    config.steps = "many"
