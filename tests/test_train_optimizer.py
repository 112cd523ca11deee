"""The optimizer: clipping equals optax's; which leaves decay; the schedule."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from csrm_jax.train.optimizer import (
  clip_by_global_norm,
  decays,
  is_head,
  make_optimizer,
  schedule,
)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 50.0])
def test_clipping_equals_optax(scale):
  rng = np.random.default_rng(0)
  gradients = {
    "a": jnp.asarray(scale * rng.normal(size=(3, 4)), jnp.float32),
    "b": jnp.asarray(scale * rng.normal(size=5), jnp.float32),
  }
  expected, _ = optax.clip_by_global_norm(0.7).update(
    gradients, optax.EmptyState()
  )

  ours = clip_by_global_norm(0.7)
  got, _ = ours.update(gradients, ours.init(gradients))

  for name in gradients:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)


def test_only_matrices_of_the_backbone_decay():
  params = {
    "upper": {"mlp": {"up": {"kernel": 0.0, "bias": 0.0}}},
    "final_norm": {"scale": 0.0},
    "head": {"kernel": 0.0},
    "embed": {"embedding": 0.0},
  }

  assert decays(params) == {
    "upper": {"mlp": {"up": {"kernel": True, "bias": False}}},
    "final_norm": {"scale": False},
    "head": {"kernel": False},
    "embed": {"embedding": True},
  }
  assert is_head(params)["head"]["kernel"]
  assert not is_head(params)["final_norm"]["scale"]


def test_schedule_rises_to_its_peak_and_ends_at_its_share():
  rate = schedule(lr=2.0, steps=100, warmup=0.1, final_lr=0.25)

  assert float(rate(0)) == 0.0
  np.testing.assert_allclose(float(rate(10)), 2.0)
  np.testing.assert_allclose(float(rate(100)), 0.5)
  assert float(rate(60)) < float(rate(30))


def test_the_head_moves_by_its_own_multiple():
  params = {
    "head": {"kernel": jnp.ones(3)},
    "final_norm": {"scale": jnp.ones(3)},
  }
  gradients = {
    "head": {"kernel": jnp.ones(3)},
    "final_norm": {"scale": jnp.ones(3)},
  }
  optimizer = make_optimizer(lr=0.1, steps=10, warmup=0.1, head_lr=0.5)
  state = optimizer.init(params)

  _, state = optimizer.update(gradients, state, params)  # warm-up: rate 0
  updates, _ = optimizer.update(gradients, state, params)

  np.testing.assert_allclose(updates["final_norm"]["scale"], -0.1, rtol=1e-4)
  np.testing.assert_allclose(updates["head"]["kernel"], -0.05, rtol=1e-4)
