"""Composed rewards, pairs of samples, distillation of rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from csrm_jax.align import distill

SEEDS = st.integers(0, 2**32 - 1)


def f32(x):
  return jnp.asarray(x, jnp.float32)


# ------------------------------------------------------------- composition


def test_modes_match_reference():
  rng = np.random.default_rng(0)
  z, h = rng.normal(size=(6, 3)) * 3, rng.normal(size=6) * 3
  lam, w = rng.uniform(size=3), rng.normal(size=4)
  features = rng.uniform(size=(6, 4))
  how = {"a": 0.7, "b": -0.4, "temperature": 1.3}
  s = (0.7 * z - 0.4) / 1.3
  product = expit(s).prod(-1) * expit(h)
  rate, logit = h - expit(-s) @ lam, h + s @ lam
  expected = {
    ("product", "rate"): product,
    ("log_product", "rate"): np.log(product),
    ("shaped", "rate"): rate,
    ("shaped", "logit"): logit,
    ("lagrangian", "rate"): rate / (1 + lam.sum()),
    ("lagrangian", "logit"): logit / (1 + lam.sum()),
    ("rbr", "rate"): h + features @ w,
  }
  for (mode, form), values in expected.items():
    got = distill.compose(
      f32(z),
      f32(h),
      mode,
      lam=f32(lam),
      form=form,
      features=f32(features),
      coefficients=f32(w),
      **how,
    )
    np.testing.assert_allclose(
      got, values, rtol=2e-5, atol=1e-6, err_msg=f"{mode} {form}"
    )


def test_log_product_is_exact_where_the_product_underflows():
  z, h = f32([[-200.0], [-201.0]]), f32([0.0, 0.0])
  assert (distill.compose(z, h, "product") == 0).all()
  logs = distill.compose(z, h, "log_product")
  np.testing.assert_allclose(logs[0] - logs[1], 1.0, rtol=1e-5)


@settings(max_examples=25)
@given(SEEDS, st.sampled_from(distill.MODES[:4]))
def test_more_compliance_and_more_help_are_never_worse(seed, mode):
  rng = np.random.default_rng(seed)
  z, h = rng.normal(size=(4, 2)), rng.normal(size=4)
  how = {"lam": f32([0.5, 2.0])}
  base = distill.compose(f32(z), f32(h), mode, **how)
  safer = distill.compose(f32(z + np.array([0.0, 1.0])), f32(h), mode, **how)
  kinder = distill.compose(f32(z), f32(h + 1), mode, **how)
  assert (safer > base).all() and (kinder > base).all()
  if mode == "product":
    assert ((base > 0) & (base < 1)).all()


def test_sweep_trades_safety_for_help():
  """One sample is safer, the other helps more: b decides."""
  z, h = f32([[3.0], [-1.0]]), f32([-0.5, 1.5])
  best = [
    int(distill.compose(z, h, "product", b=b).argmax()) for b in (0.0, 6.0)
  ]
  assert best == [0, 1]


def test_bad_modes_are_named():
  z, h = jnp.zeros((2, 1)), jnp.zeros(2)
  with pytest.raises(ValueError, match=r"'sum'.*log_product"):
    distill.compose(z, h, "sum")
  with pytest.raises(ValueError, match=r"'shaped'.*lam"):
    distill.compose(z, h, "shaped")
  with pytest.raises(ValueError, match=r"'rbr'.*features"):
    distill.compose(z, h, "rbr")
  with pytest.raises(ValueError, match=r"'odds'.*'rate' or 'logit'"):
    distill.compose(z, h, "shaped", lam=jnp.ones(z.shape[1]), form="odds")


# ------------------------------------------------------------------- pairs


def test_pairs_come_from_both_ends_and_are_spread_evenly():
  scores = np.random.default_rng(0).normal(size=(40, 20))
  pairs, weight = jax.jit(
    lambda s, key: distill.choose_pairs(s, key, top=3, bottom=2, pairs=4)
  )(f32(scores), jax.random.key(0))
  assert pairs.shape == (40, 4, 2) and (weight == 1).all()
  rank = np.argsort(np.argsort(-scores, -1), -1)
  found = np.take_along_axis(rank[:, None, :], np.asarray(pairs), -1)
  assert set(found[..., 0].ravel()) == {0, 1, 2}
  assert set(found[..., 1].ravel()) == {18, 19}
  # Four of six, all different: each couple in two thirds of 40 prompts.
  couples = [{tuple(p) for p in prompt} for prompt in found.tolist()]
  assert all(len(c) == 4 for c in couples)
  counts = [
    sum((i, j) in c for c in couples) for i in range(3) for j in (18, 19)
  ]
  assert min(counts) >= 15 and sum(counts) == 160


@settings(max_examples=20)
@given(SEEDS)
def test_pairs_depend_on_order_alone_and_on_their_own_prompt(seed):
  scores = np.random.default_rng(seed).normal(size=(3, 12))
  key = jax.random.key(seed % 1000)

  def choose(scores):
    return np.asarray(distill.choose_pairs(f32(scores), key, pairs=5)[0])

  plain = choose(scores)
  np.testing.assert_array_equal(choose(np.exp(scores)), plain)
  other = scores.copy()
  other[1] = -other[1]
  changed = choose(other)
  np.testing.assert_array_equal(changed[[0, 2]], plain[[0, 2]])
  assert (changed[1] != plain[1]).any()
  good, bad = (np.take_along_axis(scores, plain[..., i], -1) for i in (0, 1))
  assert (good > bad).all()


def test_missing_samples_take_no_part():
  scores = np.tile(np.arange(12.0), (3, 1))
  scores[0, 11] = np.nan  # the best would be it
  valid = np.ones((3, 12))
  valid[1, :2] = 0  # the worst would be these
  valid[2, :3] = 0  # nine are left, ten needed
  pairs, weight = distill.choose_pairs(
    f32(scores), jax.random.key(1), pairs=25, valid=f32(valid)
  )
  assert set(np.asarray(pairs[0, :, 0]).tolist()) == {6, 7, 8, 9, 10}
  assert set(np.asarray(pairs[1, :, 1]).tolist()) == {2, 3, 4, 5, 6}
  np.testing.assert_array_equal(weight[:, 0], [1, 1, 0])
  assert (pairs[2] == 0).all()


def test_ties_are_ranked_at_random():
  pairs, _ = distill.choose_pairs(
    jnp.zeros((60, 4)), jax.random.key(0), top=1, bottom=1
  )
  assert (pairs[..., 0] != pairs[..., 1]).all()
  seen = np.bincount(np.asarray(pairs).ravel(), minlength=4)
  assert seen.min() >= 15  # 30 each on average


def test_impossible_draws_are_named():
  with pytest.raises(ValueError, match="top=5, bottom=5 of 9 samples"):
    distill.choose_pairs(jnp.zeros((1, 9)), jax.random.key(0))
  with pytest.raises(ValueError, match=r"pairs=26.*25"):
    distill.choose_pairs(jnp.zeros((1, 10)), jax.random.key(0), pairs=26)


# ------------------------------------------------------------ distillation


def drawn(seed: int, n: int = 5):
  """(good, bad, references, log rewards of both, weight)."""
  rng = np.random.default_rng(seed)
  return (
    *rng.normal(-20, 4, size=(4, n)),
    *-rng.uniform(0, 3, size=(2, n)),
    rng.uniform(0.5, 2, size=n),
  )


def test_distillation_golden():
  """R+H+ = .5, R-H- = .25, log-ratios 2 and -1, beta .1: (log 2 - .3)^2."""
  args = (-10, -11, -12, -10, np.log(0.5), np.log(0.25), 1)
  got = distill.distillation(*(f32([x]) for x in args), beta=0.1)
  np.testing.assert_allclose(got.value(), 0.15456470, rtol=1e-6)


def test_distillation_matches_reference():
  for seed in range(3):
    good, bad, good_ref, bad_ref, up, down, weight = drawn(seed)
    ratio = (good - good_ref) - (bad - bad_ref)
    expected = weight @ (up - down - 0.3 * ratio) ** 2
    got = distill.distillation(*map(f32, drawn(seed)), beta=0.3)
    np.testing.assert_allclose(got.total, expected, rtol=1e-4)
    np.testing.assert_allclose(got.weight, weight.sum(), rtol=1e-6)


def test_distillation_is_zero_at_the_tilted_policy_alone():
  """Descent on a table ends at pi_ref (R H)^(1 / beta), normalised."""
  rng = np.random.default_rng(0)
  reference = rng.normal(size=6)
  reference -= np.log(np.exp(reference).sum())
  rewards, beta = -rng.uniform(0, 1, size=6), 0.5
  tilted = reference + rewards / beta
  tilted -= np.log(np.exp(tilted).sum())
  i, j = np.triu_indices(6, 1)

  def loss(logits):
    logp = jax.nn.log_softmax(logits)
    return distill.distillation(
      logp[i],
      logp[j],
      f32(reference[i]),
      f32(reference[j]),
      f32(rewards[i]),
      f32(rewards[j]),
      jnp.ones(len(i)),
      beta=beta,
    ).value()

  assert loss(f32(tilted)) < 1e-10
  logits = jax.lax.fori_loop(
    0, 200, lambda _, x: x - 1.0 * jax.grad(loss)(x), f32(reference)
  )
  np.testing.assert_allclose(jax.nn.log_softmax(logits), tilted, atol=1e-4)


@settings(max_examples=20)
@given(SEEDS)
def test_distillation_is_blind_to_constants_and_to_the_order(seed):
  good, bad, good_ref, bad_ref, up, down, weight = drawn(seed)
  args = (good, bad, good_ref, bad_ref, up, down, weight)
  swapped = (bad, good, bad_ref, good_ref, down, up, weight)
  shifted = (good + 3, bad + 3, good_ref, bad_ref, up - 1, down - 1, weight)
  plain, *others = (
    float(distill.distillation(*map(f32, x), beta=0.2).total)
    for x in (args, swapped, shifted)
  )
  np.testing.assert_allclose(others, plain, rtol=1e-3)


def test_padding_changes_neither_value_nor_gradient():
  args = drawn(3)
  nan = [np.append(x, np.nan) for x in args[:6]]

  def total(x, weight):
    return distill.distillation(*x, weight, beta=0.1).total

  plain = jax.value_and_grad(total)(tuple(map(f32, args[:6])), f32(args[6]))
  padded = jax.value_and_grad(total)(
    tuple(map(f32, nan)), f32(np.append(args[6], 0.0))
  )
  np.testing.assert_allclose(padded[0], plain[0], rtol=1e-6)
  for one, other in zip(padded[1], plain[1], strict=True):
    np.testing.assert_allclose(one[:5], other, rtol=1e-6)
    assert one[5] == 0
  for rewards in plain[1][4:]:
    assert (rewards == 0).all()  # no gradient into the judge
