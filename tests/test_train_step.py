import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import losses
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import step as steps
from tests import packing

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


@pytest.mark.slow
def test_verbaliser_learns_format_and_helpfulness():
  model, _, state = ready(head="verbaliser")
  # Every kind of pair.
  batch = jax.tree.map(jnp.asarray, packing.packed(6).batch)
  loss, terms, gradient = steps.loss_and_gradients(
    model, state.params, batch, weights=WEIGHTS
  )
  readouts, logits = model.apply_with_logits(state.params, batch)
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
  loss, terms, gradient = steps.loss_and_gradients(
    model, state.params, batch, weights=WEIGHTS
  )
  z, h = np.moveaxis(np.asarray(model.apply(state.params, batch)), -1, 0)
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
    return steps.loss_and_gradients(model, params, batch, weights=WEIGHTS)[0]

  slope = (moved(1) - moved(-1)) / (2 * eps)
  inner = sum(
    jnp.vdot(g, d)
    for g, d in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )
  np.testing.assert_allclose(slope, inner, rtol=2e-2)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulation_equals_one_batch(microbatches):
  model, _, state = ready()
  batch = batch_of(8)

  def of(n):
    return steps.loss_and_gradients(
      model, state.params, batch, weights=WEIGHTS, microbatches=n
    )

  (loss, terms, gradient), (one, one_terms, expected) = of(microbatches), of(1)
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

replica, fsdp, tensor = map(int, sys.argv[2].split(","))
model, optimizer, state = ready()
mesh = sharding.make_mesh(replica=replica, fsdp=fsdp, tensor=tensor)
abstract = jax.eval_shape(lambda: state)
step = steps.compile_step(
  abstract, mesh, model=model, optimizer=optimizer, weights=WEIGHTS,
  microbatches=int(sys.argv[3]),
)
state = jax.device_put(state, sharding.shardings(abstract, mesh))
losses = []
for i in range(4):
  batch = jax.device_put(batch_of(16, 100 * i), sharding.batch_sharding(mesh))
  state, metrics = step(state, batch)
  losses.append(float(metrics["loss"]))
leaves = {
  sharding.path_name(p): np.asarray(x)
  for p, x in jax.tree_util.tree_leaves_with_path(state.params)
}
np.savez(sys.argv[1], losses=losses, **leaves)
"""


def run_on(devices: int, mesh: str, microbatches: int, path):
  """Four steps in a process with so many simulated devices."""
  done = subprocess.run(
    [sys.executable, "-c", _SEVERAL, str(path), mesh, str(microbatches)],
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "Involuntary full rematerialization" not in done.stderr
  return np.load(path)


def test_accumulation_and_devices_agree(tmp_path):
  """1, 2, 4 micro-batches; 1 and 8 devices: one trajectory."""
  expected = run_on(1, "1,1,1", 1, tmp_path / "one.npz")
  others = [(1, "1,1,1", 4), (8, "2,2,2", 1), (8, "1,8,1", 2), (8, "1,2,4", 4)]
  for i, (devices, mesh, microbatches) in enumerate(others):
    found = run_on(devices, mesh, microbatches, tmp_path / f"{i}.npz")
    for name in expected.files:
      np.testing.assert_allclose(
        found[name], expected[name], atol=1e-4, err_msg=f"{name} on {mesh}"
      )
    np.testing.assert_allclose(found["losses"], expected["losses"], atol=1e-5)


def test_step_learns_and_counts():
  model, optimizer, state = ready()
  batch = batch_of(4)
  real = float(packing.trie_tokens(batch))
  step = jax.jit(
    lambda s, b: steps.train_step(
      s, b, model=model, optimizer=optimizer, weights=WEIGHTS
    )
  )
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
  after, metrics = steps.train_step(
    state, poisoned, model=model, optimizer=optimizer, weights=WEIGHTS
  )
  assert int(after.skipped) == int(after.skipped_in_a_row) == 1
  assert not np.isfinite(float(metrics["loss"]))
  for a, b in zip(
    jax.tree.leaves((after.params, after.opt_state)),
    jax.tree.leaves((state.params, state.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  after, _ = steps.train_step(
    after, batch, model=model, optimizer=optimizer, weights=WEIGHTS
  )
  assert int(after.skipped) == 1 and int(after.skipped_in_a_row) == 0


@pytest.mark.parametrize(
  "changes", [{"train_layers": 1}, {"lora_rank": 2}, {"train_layers": 0}]
)
def test_frozen_parameters_stay_and_have_no_moments(changes):
  model, optimizer, state = ready(**changes)
  after, _ = steps.train_step(
    state, batch_of(2), model=model, optimizer=optimizer, weights=WEIGHTS
  )
  trained, frozen = model.split(after.params)
  _, before = model.split(state.params)
  for a, b in zip(
    jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  held = sum(x.size for x in jax.tree.leaves(after.opt_state))
  assert held < 2 * sum(x.size for x in jax.tree.leaves(trained)) + 10
