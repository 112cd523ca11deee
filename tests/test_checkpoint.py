import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import checkpoint, manifest, storage
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import step as steps
from tests import packing


def some_state(**changes):
  model, load = packing.tiny_model(**changes)
  optimizer = optimizers.make_optimizer(lr=1e-2, steps=20)
  return steps.init_state(load(jax.random.key(0)), model, optimizer)


def saved(workdir, state, *numbers, keep=2):
  with checkpoint.open_manager(workdir, keep=keep) as manager:
    for n in numbers:
      checkpoint.save(manager, n, state._replace(step=jnp.int32(n)))
    manager.wait_until_finished()


def test_round_trip_is_exact_and_complete(tmp_path):
  state = some_state()._replace(skipped=jnp.int32(3), tokens=jnp.float32(7))
  saved(tmp_path, state, 5)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state
  )
  with checkpoint.open_manager(tmp_path) as manager:
    back = checkpoint.restore(manager, 5, abstract)
  assert int(back.step) == 5
  expected = state._replace(step=jnp.int32(5))
  assert jax.tree.structure(back) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(back), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  params = checkpoint.restore_params(tmp_path)
  assert checkpoint.params_sha256(params) == checkpoint.params_sha256(
    state.params
  )


def test_only_the_newest_are_kept(tmp_path):
  saved(tmp_path, some_state(), 1, 2, 3)
  with checkpoint.open_manager(tmp_path, read_only=True) as manager:
    assert sorted(manager.all_steps()) == [2, 3]


def test_another_model_is_refused(tmp_path):
  saved(tmp_path, some_state(), 1)
  other = jax.eval_shape(lambda: some_state(lora_rank=2))
  with (
    checkpoint.open_manager(tmp_path) as manager,
    pytest.raises(ValueError, match=r"cannot be restored.*new workdir"),
  ):
    checkpoint.restore(manager, 1, other)


def test_manifest_lists_every_file_that_holds_values(tmp_path):
  saved(tmp_path, some_state(), 1, 2)
  for step in ("1", "2"):
    folder = tmp_path / "checkpoints" / step
    listed = json.loads((folder / manifest.FILE).read_text())["files"]
    found = {k for k in storage.files(folder) if "/" in k}
    assert set(listed) == found and any(k.startswith("rest/") for k in found)
    for name, wanted in listed.items():
      held = (folder / name).read_bytes()
      assert wanted == {
        "bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()
      }  # fmt: skip
    assert manifest.check(folder)


def test_scoring_reads_on_where_the_optimizer_is_damaged(tmp_path):
  saved(tmp_path, some_state(), 1)
  folder = tmp_path / "checkpoints" / "1"
  next(p for p in (folder / "rest").rglob("*") if p.is_file()).unlink()
  assert checkpoint.restore_params(tmp_path)
  with pytest.raises(ValueError, match=r"rest/.*: missing; .*none before it"):
    manifest.check(folder)


def test_missing_checkpoints_are_named(tmp_path):
  with pytest.raises(ValueError, match="no checkpoints/ here"):
    checkpoint.restore_params(tmp_path)
  saved(tmp_path, some_state(), 1)
  with pytest.raises(ValueError, match="checkpoints/3: no such checkpoint"):
    checkpoint.restore_params(tmp_path, step=3)


def test_hash_sees_names_shapes_and_bits():
  params = {"a": {"b": np.arange(6, dtype=np.float32)}}
  first = checkpoint.params_sha256(params)
  assert first == checkpoint.params_sha256({"a": {"b": params["a"]["b"] + 0}})
  others = [
    {"a": {"c": params["a"]["b"]}},
    {"a": {"b": params["a"]["b"].reshape(2, 3)}},
    {"a": {"b": params["a"]["b"].astype(np.int32)}},
    {"a": {"b": np.nextafter(params["a"]["b"], np.float32(9))}},
  ]
  assert len({first, *map(checkpoint.params_sha256, others)}) == 5
