"""Training that goes on from an exported adapter."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import csrm_jax as csrm
from csrm_jax import checkpoint, sharding
from csrm_jax.eval import recipes
from csrm_jax.export import adapter
from csrm_jax.model import adapter as layout
from csrm_jax.model import lora
from csrm_jax.model.names import flatten, unflatten
from csrm_jax.train import loop, start
from tests import runs, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = "S1: Refunds. Disallowed: promises of a refund."
CHATS = [
  [{"role": "assistant", "content": text}]
  for text in ("You will get your money back.", "No.", "Ask at the desk.")
]


def log_odds(judge):
  return np.array([s.log_odds for s in csrm.score(judge, SPEC, CHATS)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return tiny.write_base(tmp_path_factory.mktemp("base"), tiny.judge())


@pytest.fixture(scope="module")
def small(base):
  """What makes configs/tiny.py two steps of adapters of rank 2 on that base."""
  return {
    "steps": 2,
    "batch_rows": 2,
    "checkpoint_every": 1,
    "model.path": str(base),
    "model.lora_rank": 2,
    "model.lora_alpha": 2.0,
    "data.row_length": 2048,  # the tiny tokenizer spells most words out
  }


@pytest.fixture(scope="module")
def recipe(small):
  """(changes) -> config."""
  return lambda **changes: runs.tiny_config(**small | changes)


@pytest.fixture(scope="module")
def folder(base, recipe, tmp_path_factory):
  """An exported adapter that does something."""
  judge = tiny.judge(temperature=1.7, lora_rank=2, lora_alpha=2.0)
  noisy = flatten(tiny.with_noise(judge.params, lora.LEAVES))
  for path in [k for k in noisy if k.endswith(lora.LEAVES)]:
    noisy[path] = 0.2 * noisy[path]
  judge = dataclasses.replace(judge, params=unflatten(noisy))
  workdir = tmp_path_factory.mktemp("first")
  config = recipe(**{"data.source": "polyguard"}).to_dict()
  (workdir / "config.json").write_text(json.dumps(config))
  (workdir / "data").mkdir()
  counts = {"counts": {"polyguard_made": 1234}}
  (workdir / "data" / "meta.json").write_text(json.dumps(counts))
  tiny.write_workdir(workdir, judge)
  out = tmp_path_factory.mktemp("exported") / "adapter"
  adapter.export(workdir, out)
  return out


def begun(config):
  """Model, tokenizer and parameters before step 0."""
  tokenizer = loop.load_tokenizer(config)
  model, load_params = loop.make_model(config, tokenizer)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  key = jax.random.key(0)
  held = sharding.shardings(jax.eval_shape(model.init, key), mesh)
  params = start.from_adapter(
    config, model, tokenizer, load_params(key, held), held
  )
  return model, tokenizer, params, held


def test_training_begins_with_the_scores_of_the_folder(recipe, folder):
  expected = csrm.load(folder)
  model, words, params, held = begun(recipe(**{"model.adapter": str(folder)}))

  judge = dataclasses.replace(
    expected, model=model, params=params, temperature=1.0, path="begun"
  )
  np.testing.assert_allclose(log_odds(judge), log_odds(expected), atol=1e-5)
  assert words.fingerprint() == expected.tokenizer.fingerprint()
  assert {k: v.sharding for k, v in flatten(params).items()} == flatten(held)
  stored = layout.read(folder).tensors
  for name, tensor in layout.tensors(params["upper"], first=0):
    np.testing.assert_array_equal(tensor, stored[name])
  np.testing.assert_array_equal(
    params["head"]["kernel"][0], stored[layout.SCORE][0]
  )


def test_a_layer_without_an_adapter_keeps_its_fresh_one(recipe, folder):
  config = recipe()
  model, load_params = loop.make_model(config, loop.load_tokenizer(config))
  fresh = load_params(jax.random.key(0))
  read = layout.read(folder)
  some = {k: v for k, v in read.tensors.items() if ".layers.1." not in k}

  placed, row = layout.place(fresh, read._replace(tensors=some), origin=folder)

  a, b = (placed["upper"]["mlp"]["gate"][leaf] for leaf in lora.LEAVES)
  fresh_a = fresh["upper"]["mlp"]["gate"]["lora_a"]
  assert np.any(b[0]) and not np.any(b[1])
  assert not np.array_equal(a[0], fresh_a[0])
  np.testing.assert_array_equal(a[1], fresh_a[1])
  np.testing.assert_array_equal(row, read.tensors[layout.SCORE][0])
  assert model.lower_layers == 0


def test_upper_layers_alone_refuse_an_adapter_of_all(recipe, folder):
  changes = {"model.adapter": str(folder), "model.train_layers": 1}
  with pytest.raises(ValueError, match=r"layers\.0\..* has no place"):
    begun(recipe(**changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.lora_rank": 4}, r"rank 2 and alpha 2, .* 4 and 2; set .*rank=2"),
    ({"model.lora_alpha": 8.0}, r"recipe 2 and 8; set .*alpha=2\.0"),
    ({"model.lora_rank": 0}, r"the recipe 0 and 2"),
  ],
)
def test_another_shape_is_refused(recipe, folder, changes, message):
  with pytest.raises(ValueError, match=message):
    begun(recipe(**{"model.adapter": str(folder)} | changes))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"template_fingerprint": "sha256:no"},
      "template_fingerprint is sha256:no",
    ),
    ({"base": {"fingerprint": "sha256:no"}}, "base fingerprint is sha256:no"),
  ],
)
def test_another_base_or_prompt_is_refused(
  recipe, folder, tmp_path, change, message
):
  shutil.copytree(folder, tmp_path / "other")
  file = tmp_path / "other" / "csrm.json"
  described = json.loads(file.read_text())
  for key, value in change.items():
    nested = isinstance(value, dict)
    described[key] = described[key] | value if nested else value
  file.write_text(json.dumps(described))

  with pytest.raises(ValueError, match=message):
    begun(recipe(**{"model.adapter": str(tmp_path / "other")}))


def test_no_adapter_there_is_named(recipe, tmp_path):
  with pytest.raises(ValueError, match=r"without adapter_config\.json"):
    begun(recipe(**{"model.adapter": str(tmp_path)}))


def test_provenance_goes_back_to_the_first(recipe, folder, tmp_path):
  """What is non-commercial stays so, however many runs come after."""
  assert start.provenance(recipe()) == {}
  shutil.copytree(folder, tmp_path / "second")
  file = tmp_path / "second" / "csrm.json"
  described = json.loads(file.read_text())
  closed = [{"name": "beavertails", "commercial": False}]
  described["started_from"] = {"model_fingerprint": "sha256:x", "data": closed}
  file.write_text(json.dumps(described))

  found = start.provenance(
    recipe(**{"model.adapter": str(tmp_path / "second")})
  )

  assert found["data"] == [*described["data"], *closed]
  assert found["model_fingerprint"] == described["model_fingerprint"]
  assert "recipes" not in found  # that of the first is unknown

  described["started_from"]["recipes"] = []
  file.write_text(json.dumps(described))
  again = start.provenance(
    recipe(**{"model.adapter": str(tmp_path / "second")})
  )
  assert [r["data"]["source"] for r in again["recipes"]] == ["polyguard"]


@pytest.mark.slow
def test_a_run_goes_on_and_says_what_it_began_from(recipe, folder, tmp_path):
  first = tmp_path / "adapter"
  shutil.copytree(folder, first)
  config = recipe(**{"model.adapter": str(first)})
  workdir = tmp_path / "run"

  result = loop.fit(config, workdir)
  shutil.rmtree(first)  # what has begun needs it no more
  again = loop.fit(config, workdir)

  assert again["params_sha256"] == result["params_sha256"]
  moved = (
    np.asarray(checkpoint.restore_params(workdir)["head"]["kernel"][0])
    - layout.read(folder).tensors[layout.SCORE][0]
  )
  # Two steps of Adam move an entry by two rates at most.
  most = 2 * config.optimizer.lr * config.optimizer.head_lr
  assert 0 < np.max(np.abs(moved)) <= 1.1 * most

  adapter.export(workdir, tmp_path / "second")
  described = json.loads((tmp_path / "second" / "csrm.json").read_text())
  before = json.loads((folder / "csrm.json").read_text())
  assert described["started_from"] == {
    "model_fingerprint": before["model_fingerprint"],
    "data": before["data"],
    "recipes": [before["recipe"]],
  }
  assert recipes.recipe(tmp_path / "second").data.source == "synthetic"
  assert [s["name"] for s in described["data"]] == ["synthetic"]
  card = (tmp_path / "second" / "README.md").read_text()
  assert (
    f"It began as the adapter with fingerprint `{before['model_fingerprint']}`"
    in card
  )
  assert "| polyguard | CC BY 4.0 | 1234 |" in card
  assert "| synthetic | Apache-2.0 (csrm_jax) |" in card


@pytest.mark.slow
def test_eight_devices_begin_and_go_on_as_one(small, folder, tmp_path):
  changes = small | {
    "model.adapter": str(folder),
    "batch_rows": 4,
    "steps": 3,  # the rate of the first is 0
  }
  loop.fit(runs.tiny_config(**changes), tmp_path / "one")

  spread = {"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  code = f"""
import jax
from csrm_jax.train import loop
from tests import runs
assert jax.device_count() == 8
loop.fit(runs.tiny_config(**{changes | spread!r}), {str(tmp_path / "eight")!r})
"""

  runs.on_devices(code)

  one, eight = (runs.lines(tmp_path / name) for name in ("one", "eight"))
  assert [line["step"] for line in eight] == [1, 2, 3]
  for expected, found in zip(one, eight, strict=True):
    for key in ("loss", "gradient_norm"):
      assert found[key] == pytest.approx(expected[key], rel=1e-4), key


def test_no_side_of_the_folders_adapters_is_zero(recipe, folder):
  """So both learn from the first step."""
  model, _, params, _ = begun(recipe(**{"model.adapter": str(folder)}))
  leaves = flatten(params["upper"])
  for path in [k for k in leaves if k.endswith(lora.LEAVES)]:
    assert jnp.all(jnp.any(leaves[path] != 0, axis=(1, 2))), path
  assert model.lora_rank == 2
