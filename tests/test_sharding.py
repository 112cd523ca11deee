import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from csrm_jax import sharding
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import step as steps
from tests import packing

MESH = AbstractMesh((2, 2, 2), sharding.AXES)


@pytest.mark.parametrize(
  ("path", "shape", "expected"),
  [
    ("embed/embedding", (60, 64), P("tensor", "fsdp")),
    ("upper/mlp/up/kernel", (2, 64, 128), P(None, "fsdp", "tensor")),
    ("upper/mlp/down/kernel", (2, 128, 64), P(None, "tensor", "fsdp")),
    ("lower/attention/out/kernel", (64, 64), P("tensor", "fsdp")),
    ("upper/attention/query/lora_a", (2, 64, 3), P(None, "fsdp", None)),
    ("upper/attention_norm/scale", (2, 64), P(None, None)),
    ("head/kernel", (2, 64), P(None, None)),
    # A dimension that the axis does not divide stays whole.
    ("embed/embedding", (61, 64), P(None, "fsdp")),
    ("opt_state/1/0/mu/upper/mlp/up/kernel", (2, 64, 128),
     P(None, "fsdp", "tensor")),
  ],
)  # fmt: skip
def test_table(path, shape, expected):
  assert sharding.spec_of(path, shape, MESH) == expected


def test_unknown_parameter_is_an_error():
  with pytest.raises(ValueError, match="'upper/new/thing'"):
    sharding.spec_of("upper/new/thing", (4, 4), MESH)


def test_every_leaf_of_a_state_has_a_place():
  for changes in ({}, {"lora_rank": 2}, {"train_layers": 1}):
    model, load = packing.tiny_model(**changes)
    optimizer = optimizers.make_optimizer(lr=1e-3, steps=2)
    state = jax.eval_shape(
      lambda load=load, model=model, optimizer=optimizer: steps.init_state(
        load(jax.random.key(0)), model, optimizer
      )
    )
    mesh = sharding.make_mesh()
    placed = sharding.shardings(state, mesh)
    assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(state))


def test_mesh_that_does_not_cover_the_devices_is_an_error():
  with pytest.raises(ValueError, match="does not cover"):
    sharding.make_mesh(replica=3, fsdp=5, tensor=1)


@pytest.mark.parametrize(("rows", "micro"), [(3, 2), (4, 3), (4, 0)])
def test_rows_must_fill_every_shard(rows, micro):
  with pytest.raises(ValueError, match=f"batch_rows = {rows}"):
    sharding.check_rows(rows, micro, sharding.make_mesh())


def test_state_bytes_per_device_are_divided():
  """Of the sharded kernels, each of 8 devices holds an eighth."""
  load = packing.tiny_model()[1]
  shapes = jax.eval_shape(lambda: load(jax.random.key(0)))
  mesh = AbstractMesh((1, 4, 2), sharding.AXES)
  whole = part = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    name = sharding.path_name(path)
    if "kernel" not in name or name.startswith("head"):
      continue
    spec = sharding.spec_of(name, leaf.shape, mesh)
    cut = np.prod([mesh.shape[a] for a in spec if a] or [1])
    whole += leaf.size
    part += leaf.size / cut
  assert part == whole / 8
