"""Recipes that a model tells: its own and those of what it began from."""

import json
from pathlib import Path

import pytest

from csrm_jax.config import default, from_file
from csrm_jax.eval import recipes


def config(source: str, *, seed: int = 0, **data) -> dict:
  """Content of a config.json; rows of the world, which need no file."""
  return {"seed": seed, "data": {"source": source, **data}}


def adapter(folder, own: dict | None, started_from: dict | None = None):
  """A folder with the csrm.json of an exported adapter."""
  folder.mkdir()
  described = recipes.summary(own) if own else {}
  if started_from:
    described["started_from"] = started_from
  (folder / "csrm.json").write_text(json.dumps(described))
  return folder


def workdir(folder, own: dict, started_from: dict | None = None):
  """A folder that claims to be trained by this config."""
  folder.mkdir()
  described = {"started_from": started_from} if started_from else {}
  (folder / "model.json").write_text(json.dumps(described))
  (folder / "config.json").write_text(json.dumps(own))
  return folder


def texts(*configs: dict) -> frozenset[str]:
  """Hashes of all that is said in the training rows of some configs."""
  rows = [
    row
    for one in configs
    for row in recipes._training_rows(recipes._config(one), None)
  ]
  return recipes.texts_of(rows)


def test_an_adapter_tells_a_recipe_without_paths(tmp_path):
  own = config("synthetic:3", seed=5, refusals=0.3, path="/mine")
  folder = adapter(tmp_path / "a", own | {"steps": 7})

  told = recipes.recipe(folder)

  assert recipes.is_known(folder)
  assert "/mine" not in (folder / "csrm.json").read_text()
  assert (told.seed, told.data.source) == (5, "synthetic:3")
  assert (told.data.refusals, told.data.path) == (0.3, None)
  assert recipes.texts_of(recipes.training_rows(folder)) == texts(own)


@pytest.mark.parametrize("source", ["jsonl", "synthetic:3,jsonl"])
def test_rows_of_the_user_s_own_are_no_recipe(tmp_path, source):
  folder = adapter(tmp_path / "a", config(source))
  assert not recipes.is_known(folder)
  assert recipes.recipe(folder) == default()


def test_texts_of_every_recipe_are_left_out(tmp_path):
  """A run with another seed may hold out what its beginning trained on."""
  first = config("synthetic:4", seed=9)
  second = config("synthetic:4", seed=1)
  third = config("synthetic:4", seed=2)
  described = recipes.summary(second) | {
    "started_from": recipes.earlier(recipes.summary(first))
  }
  folder = workdir(tmp_path / "run", third, recipes.earlier(described))

  split = recipes.split_of(folder, data=tmp_path)

  assert split.texts == texts(first, second, third)
  assert texts(first) - texts(second, third)
  assert (split.seed, split.note) == (2, "")
  assert split.trained == {"synthetic"}


def test_an_unknown_beginning_is_noted(tmp_path):
  own = config("synthetic:4")
  unknown = {"model_fingerprint": "sha256:x", "data": []}
  for folder in (
    adapter(tmp_path / "a", own, unknown),
    workdir(tmp_path / "run", own, unknown),
  ):
    split = recipes.split_of(folder, data=tmp_path)
    assert split.texts == texts(own)
    assert split.note == "what training began from is unknown"
  assert recipes.earlier(recipes.summary(own) | {"started_from": unknown}) == {}
  assert recipes.earlier({"data": []}) == {}


def test_sets_that_are_not_there_are_noted(tmp_path):
  folder = adapter(tmp_path / "a", config("polyguard:9,synthetic:4"))
  split = recipes.split_of(folder, data=tmp_path)
  assert split.trained == {"polyguard", "synthetic"}
  assert split.texts == texts(config("synthetic:4"))
  assert split.note == f"not in {tmp_path}: polyguard"


def test_a_workdir_s_own_set_must_be_there(tmp_path):
  folder = workdir(tmp_path / "run", config("polyguard:9"))
  with pytest.raises(ValueError, match="polyguard"):
    recipes.split_of(folder, data=tmp_path)


def test_a_foreign_model_is_told_apart(tmp_path):
  split = recipes.split_of(tmp_path, data=tmp_path)
  assert split.note.startswith("recipe unknown: as for the default one")
  assert not split.texts
  assert split == recipes.split_of(None, data=tmp_path)


def test_the_shipped_adapter_tells_both_parts():
  root = Path(__file__).parent.parent
  folder = root / "models" / "smollm2-135m-csrm"
  described = json.loads((folder / "csrm.json").read_text())

  told = [described["recipe"], *described["started_from"]["recipes"]]

  for name, recipe in zip(
    ("csrm_permissive_2", "csrm_permissive"), told, strict=True
  ):
    made = from_file(root / "configs" / f"{name}.py").to_dict()
    assert recipes.summary(made) == {"recipe": recipe}, name
