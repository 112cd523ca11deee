import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import losses
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import step as steps
from tests import packing, runs

WEIGHTS = dict.fromkeys(losses.TERMS, 0.5) | {"calibration": 1.0}


def batch_of(rows: int, seed: int = 0):
  """`rows` packed rows of 2 families each."""
  parts = [packing.packed(2, seed=seed + i).batch for i in range(rows)]
  assert all(p.tokens.shape[0] == 1 for p in parts)
  return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def ready(**changes):
  model, load = packing.tiny_model(**changes)
  optimizer = optimizers.make_optimizer(lr=1e-2, steps=20)
  state = steps.init_state(load(jax.random.key(0)), model, optimizer)
  return model, optimizer, state


def compiled(model, *, microbatches=1):
  """`steps.loss_and_gradients` of (params, batch)."""

  def call(params, batch):
    return steps.loss_and_gradients(
      model, params, batch, weights=WEIGHTS, microbatches=microbatches
    )

  return jax.jit(call)


def one_step(model, optimizer):
  """`steps.train_step` of (state, batch)."""
  return jax.jit(
    functools.partial(
      steps.train_step, model=model, optimizer=optimizer, weights=WEIGHTS
    )
  )


@pytest.mark.slow
def test_verbaliser_learns_format_and_helpfulness():
  model, _, state = ready(head="verbaliser")
  # Every kind of pair.
  batch = jax.tree.map(jnp.asarray, packing.packed(6).batch)
  loss, terms, gradient = compiled(model)(state.params, batch)
  readouts, logits = jax.jit(model.apply_with_logits)(state.params, batch)
  nats = losses.verbaliser_cross_entropy(
    logits, batch.label, batch.label_weight, safe=(3,), unsafe=(4,)
  )
  # The mass on the verdict words is part of the term ...
  np.testing.assert_allclose(
    terms["calibration"].value(), nats.value(), rtol=1e-5
  )
  bce = losses.calibration(readouts[..., 0], batch.label, batch.label_weight)
  assert terms["calibration"].value() > bce.value() + 1.0
  # ... and helpfulness is still read from its own row.
  assert np.isfinite(loss) and terms["help"].weight > 0
  compliance, helpfulness = gradient["head"]["kernel"]
  assert np.any(helpfulness) and not np.any(compliance)


def test_gradient_is_that_of_the_written_loss():
  model, _, state = ready()
  batch = batch_of(4)
  evaluated = compiled(model)
  loss, terms, gradient = evaluated(state.params, batch)
  z, h = np.moveaxis(
    np.asarray(jax.jit(model.apply)(state.params, batch)), -1, 0
  )
  weight = np.asarray(batch.label_weight)
  nats = np.logaddexp(0, z) - np.asarray(batch.label) * z
  expected = (weight * nats).sum() / weight.sum()
  for index, kind in enumerate(("spec", "resp", "help")):
    r = h if kind == "help" else z
    total = count = 0.0
    for row, slot in np.argwhere(np.asarray(batch.pair_kind) == index):
      w = float(batch.pair_weight[row, slot])
      win, lose = batch.pair[row, slot]
      lead = r[row, win] - r[row, lose] - batch.pair_margin[row, slot]
      total += w * np.logaddexp(0, -lead)
      count += w
    expected += 0.5 * total / max(count, 1e-9)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert terms["calibration"].weight == weight.sum()

  direction = jax.tree.map(lambda g: g / (1e-6 + jnp.abs(g).max()), gradient)
  eps = 1e-3

  def moved(sign):
    shifted = jax.tree.map(
      lambda p, d: p + sign * eps * d,
      model.split(state.params)[0],
      direction,
    )
    params = model.join(shifted, model.split(state.params)[1])
    return evaluated(params, batch)[0]

  slope = (moved(1) - moved(-1)) / (2 * eps)
  inner = sum(
    jnp.vdot(g, d)
    for g, d in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )
  np.testing.assert_allclose(slope, inner, rtol=2e-2)


@pytest.fixture(scope="module")
def of_eight():
  """Model, state, 8 rows, and what one batch of them gives."""
  model, _, state = ready()
  batch = batch_of(8)
  return model, state, batch, compiled(model)(state.params, batch)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_equals_one_batch(of_eight, microbatches):
  model, state, batch, (one, one_terms, expected) = of_eight
  loss, terms, gradient = compiled(model, microbatches=microbatches)(
    state.params, batch
  )
  np.testing.assert_allclose(loss, one, rtol=1e-6)
  for name in terms:
    np.testing.assert_allclose(terms[name].total, one_terms[name].total, 1e-5)
  for a, b in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)


_SEVERAL = """
import sys
import jax, numpy as np
from csrm_jax import sharding
from csrm_jax.train import step as steps
from tests.test_train_step import WEIGHTS, batch_of, ready

folder, *layouts = sys.argv[1:]
batches = [batch_of(16, 100 * i) for i in range(4)]
for layout in layouts:
  replica, fsdp, tensor, microbatches = map(int, layout.split(","))
  model, optimizer, state = ready()
  mesh = sharding.make_mesh(replica=replica, fsdp=fsdp, tensor=tensor)
  abstract = jax.eval_shape(lambda: state)
  step = steps.compile_step(
    abstract, mesh, model=model, optimizer=optimizer, weights=WEIGHTS,
    microbatches=microbatches,
  )
  state = jax.device_put(state, sharding.shardings(abstract, mesh))
  losses = []
  for batch in batches:
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  leaves = {
    sharding.path_name(p): np.asarray(x)
    for p, x in jax.tree_util.tree_leaves_with_path(state.params)
  }
  np.savez(f"{folder}/{layout}.npz", losses=losses, **leaves)
"""


def run_on(devices: int, folder, *layouts: str):
  """Four steps with each layout, in a process with so many devices.

  Layouts are "replica,fsdp,tensor,microbatches"; the devices are simulated.
  """
  runs.on_devices(_SEVERAL, folder, *layouts, devices=devices)
  return [np.load(folder / f"{layout}.npz") for layout in layouts]


def test_accumulation_and_devices_agree(tmp_path):
  """1, 2, 4 micro-batches; 1 and 8 devices: one trajectory."""
  expected, four = run_on(1, tmp_path, "1,1,1,1", "1,1,1,4")
  meshes = ("2,2,2,1", "1,8,1,2", "1,2,4,4")
  others = [four, *run_on(8, tmp_path, *meshes)]
  for layout, found in zip(("1,1,1,4", *meshes), others, strict=True):
    for name in expected.files:
      np.testing.assert_allclose(
        found[name], expected[name], atol=1e-4, err_msg=f"{name} on {layout}"
      )
    np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-5)


def test_step_learns_and_counts():
  model, optimizer, state = ready()
  batch = batch_of(4)
  real = float(packing.trie_tokens(batch))
  step = one_step(model, optimizer)
  first = None
  for _ in range(15):
    state, metrics = step(state, batch)
    first = first or float(metrics["loss"])
  assert float(metrics["loss"]) < 0.7 * first
  assert int(state.step) == 15 and int(state.skipped) == 0
  assert float(state.tokens) == 15 * real


def test_non_finite_step_is_skipped_and_counted():
  model, optimizer, state = ready()
  batch = batch_of(2)
  poisoned = batch._replace(label_weight=batch.label_weight * jnp.nan)
  step = one_step(model, optimizer)
  after, metrics = step(state, poisoned)
  assert int(after.skipped) == int(after.skipped_in_a_row) == 1
  assert not np.isfinite(float(metrics["loss"]))
  for a, b in zip(
    jax.tree.leaves((after.params, after.opt_state)),
    jax.tree.leaves((state.params, state.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  after, _ = step(after, batch)
  assert int(after.skipped) == 1 and int(after.skipped_in_a_row) == 0


@pytest.mark.parametrize(
  "changes", [{"train_layers": 1}, {"lora_rank": 2}, {"train_layers": 0}]
)
def test_frozen_parameters_stay_and_have_no_moments(changes):
  model, optimizer, state = ready(**changes)
  after, _ = one_step(model, optimizer)(state, batch_of(2))
  trained, frozen = model.split(after.params)
  _, before = model.split(state.params)
  for a, b in zip(
    jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  held = sum(x.size for x in jax.tree.leaves(after.opt_state))
  assert held < 2 * sum(x.size for x in jax.tree.leaves(trained)) + 10
