"""Losses: golden values, float64 references, properties, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp

from csrm_jax import losses
from csrm_jax.types import PAIR_KINDS, Batch, Mean

NUMBERS = st.floats(-30.0, 30.0, width=32)
PROBABILITIES = st.floats(0.0, 1.0, width=32)


def softplus(x: np.ndarray) -> np.ndarray:
  return np.logaddexp(0.0, np.asarray(x, np.float64))


def row(*values: float) -> jax.Array:
  return jnp.array([values], jnp.float32)


def one(logit: float, label: float, **options) -> tuple[float, float]:
  """(loss, gradient) of one label."""

  def loss(z):
    return losses.calibration(
      z[None, None], row(label), row(1.0), **options
    ).value()

  value, gradient = jax.value_and_grad(loss)(jnp.float32(logit))
  return float(value), float(gradient)


# ----------------------------------------------------------- calibration


@pytest.mark.parametrize(
  ("logit", "label", "options", "value", "gradient"),
  [
    (1.5, 1.0, {}, 0.20141328, -0.18242552),
    (1.5, 0.0, {}, 1.70141328, 0.81757448),
    (1.5, 1.0, {"focal": 2.0}, 0.00670285, -0.01703111),
    (1.5, 1.0, {"label_smoothing": 0.1}, 0.27641328, -0.13242552),
    (-30.0, 1.0, {}, 30.0, -1.0),
  ],
)
def test_calibration_golden(logit, label, options, value, gradient):
  np.testing.assert_allclose(
    one(logit, label, **options), (value, gradient), rtol=2e-6, atol=2e-8
  )


@pytest.mark.parametrize(
  ("logit", "label", "value", "gradient"),
  [
    (1.5, 1.0, 0.03327907, -0.05441624),
    (1.5, 0.0, 0.66842802, 0.24387666),
    (-30.0, 1.0, 1.0, -1.87e-13),
  ],
)
def test_brier_golden(logit, label, value, gradient):
  got = jax.value_and_grad(
    lambda z: losses.brier_score(z[None, None], row(label), row(1.0)).value()
  )(jnp.float32(logit))
  np.testing.assert_allclose(
    got, (value, gradient), rtol=2e-3 if logit < 0 else 2e-6
  )
  added = one(logit, label, brier=1.0)[0] - one(logit, label)[0]
  np.testing.assert_allclose(added, value, rtol=1e-5)


def test_smoothed_optimum_golden():
  _, gradient = one(2.94443898, 1.0, label_smoothing=0.1)
  assert abs(gradient) < 1e-7


@settings(deadline=None, max_examples=40)
@given(
  st.lists(st.tuples(NUMBERS, PROBABILITIES), min_size=3, max_size=3),
  st.sampled_from([0.0, 0.1]),
  st.sampled_from([0.0, 0.5]),
)
def test_calibration_matches_reference(entries, smoothing, brier):
  z, y = np.array(entries, np.float64).T
  smooth = y * (1 - smoothing) + smoothing / 2
  expected = softplus(z) - smooth * z + brier * (expit(z) - y) ** 2

  got = losses.calibration(
    row(*z),
    row(*y),
    jnp.ones((1, len(z))),
    label_smoothing=smoothing,
    brier=brier,
  )

  np.testing.assert_allclose(got.total, expected.sum(), rtol=2e-5, atol=1e-5)
  assert got.weight == len(z)


@settings(deadline=None, max_examples=30)
@given(NUMBERS, st.sampled_from([0.0, 1.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_focal_matches_reference_and_is_finite(z, y, exponent):
  q = np.float64((2 * y - 1) * z)
  value, gradient = one(z, y, focal=exponent)
  np.testing.assert_allclose(
    value, expit(-q) ** exponent * softplus(-q), rtol=5e-5, atol=1e-7
  )
  assert np.isfinite(gradient)


@settings(deadline=None, max_examples=30)
@given(NUMBERS, PROBABILITIES)
def test_calibration_gradient_is_bounded(z, y):
  _, gradient = one(z, y)
  np.testing.assert_allclose(gradient, expit(z) - y, atol=1e-6)
  assert abs(gradient) <= 1.0


# --------------------------------------------------------- Bradley-Terry


@pytest.mark.parametrize(
  ("lead", "options", "value", "gradient"),
  [
    (1.0, {}, 0.31326169, -0.26894142),
    (1.0, {"margin": 0.5}, 0.47407698, -0.37754067),
    (-2.0, {}, 2.12692801, None),
    (1.0, {"smoothing": 0.1}, 0.41326169, -0.16894142),
    (2.19722458, {"smoothing": 0.1}, None, 0.0),
  ],
)
def test_bradley_terry_golden(lead, options, value, gradient):
  def loss(r):
    return losses.bradley_terry(
      r, jnp.array([[[0, 1]]]), row(1.0), **options
    ).value()

  got, slope = jax.value_and_grad(loss)(row(lead, 0.0))
  if value is not None:
    np.testing.assert_allclose(got, value, rtol=1e-6)
  if gradient is not None:
    np.testing.assert_allclose(slope[0, 0], gradient, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(slope.sum(), 0.0, atol=1e-7)


def test_bradley_terry_matches_reference():
  a, b, c = np.array([0.3, -1.2, 2.0])
  expected = np.log1p(np.exp(b - a)) + 2 * np.log1p(np.exp(b - c))

  loss = losses.bradley_terry(
    rewards=jnp.array([[a, b, c]]),
    pairs=jnp.array([[[0, 1], [2, 1]]]),
    weight=jnp.array([[1.0, 2.0]]),
  )

  np.testing.assert_allclose(loss.total / loss.weight, expected / 3, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
  st.lists(NUMBERS, min_size=3, max_size=3),
  NUMBERS,
  st.floats(-2.0, 2.0, width=32),
  st.sampled_from([0.25, 1.0, 3.0]),
)
def test_bradley_terry_ignores_shifts(rewards, shift, margin, temperature):
  pairs = jnp.array([[[0, 1], [2, 1]]])

  def loss(r):
    return losses.bradley_terry(
      r, pairs, row(1.0, 0.5), margin=margin, temperature=temperature
    ).total

  r = np.array(rewards, np.float64)
  leads = (np.array([r[0] - r[1], r[2] - r[1]]) - margin) / temperature
  expected = np.sum([1.0, 0.5] * softplus(-leads))
  np.testing.assert_allclose(
    loss(row(*rewards)), expected, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    loss(row(*rewards) + shift), expected, rtol=1e-4, atol=1e-3
  )


def test_temperature_is_clipped():
  clipped = losses.clip_temperature(jnp.array([0.0, 0.5, 100.0]))
  np.testing.assert_allclose(clipped, [0.25, 0.5, 8.0])
  pairs, weight = jnp.array([[[0, 1]]]), row(1.0)
  frozen = losses.bradley_terry(row(1.0, 0.0), pairs, weight, temperature=0.0)
  np.testing.assert_allclose(frozen.total, softplus(-4.0), rtol=1e-6)


# -------------------------------------------------------- severity order


def test_severity_order_golden():
  z = row(-1.0, 1.2, 1.0, 2.0)
  loss = losses.severity_order(z, jnp.ones_like(z))
  np.testing.assert_allclose(loss.value(), 0.29384998, rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
  st.integers(2, 4).flatmap(lambda k: st.lists(NUMBERS, min_size=k, max_size=k))
)
def test_severity_order_equals_weighted_pairs(rungs):
  k = len(rungs)
  z = row(*rungs)
  pairs = jnp.array([[[j, i] for i in range(k) for j in range(i + 1, k)]])
  weight = jnp.full(pairs.shape[:2], 2 / (k * (k - 1)))
  expected = np.mean(
    [softplus(rungs[i] - rungs[j]) for j in range(k) for i in range(j)]
  )

  as_ladder = losses.severity_order(z, jnp.ones_like(z))
  as_pairs = losses.bradley_terry(z, pairs, weight)

  np.testing.assert_allclose(as_ladder.value(), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(as_pairs.value(), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(as_pairs.weight, 1.0, rtol=1e-6)


def test_severity_order_skips_short_ladders_and_padding():
  z = jnp.array([[-1.0, 1.2, jnp.nan], [3.0, jnp.nan, jnp.nan]])
  weight = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])

  def loss(z):
    return losses.severity_order(z, weight).value()

  value, gradient = jax.value_and_grad(loss)(z)
  np.testing.assert_allclose(value, softplus(-2.2), rtol=1e-6)
  assert losses.severity_order(z, weight).weight == 1.0
  np.testing.assert_array_equal(gradient[weight == 0], 0.0)
  assert gradient[1, 0] == 0.0
  assert gradient[0, 0] > 0.0 > gradient[0, 1]


# ------------------------------------------------------------ verbaliser

VOCABULARY = jnp.array([[[2.0, -1.0, 0.5, 3.0, 0.0, -2.0]]])
SETS = {"safe": (0, 1), "unsafe": (3, 4)}


def test_verbaliser_golden():
  z, log_mass = losses.verbaliser(VOCABULARY, **SETS)
  np.testing.assert_allclose(z, -1.0, rtol=1e-6)
  np.testing.assert_allclose(jax.nn.sigmoid(z), 0.26894142, rtol=1e-6)
  np.testing.assert_allclose(-log_mass, 0.06001756, rtol=1e-5)
  for label, expected in ((1.0, 1.37327924), (0.0, 0.37327924)):
    got = losses.verbaliser_cross_entropy(
      VOCABULARY, row(label), row(1.0), **SETS
    )
    np.testing.assert_allclose(got.value(), expected, rtol=1e-6)
  bce = losses.calibration(z, row(1.0), row(1.0))
  np.testing.assert_allclose(bce.value(), 1.31326169, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(NUMBERS, min_size=6, max_size=6), st.sampled_from([0.0, 1.0]))
def test_verbaliser_matches_reference(logits, label):
  u = np.array(logits, np.float64)
  verdict = SETS["safe"] if label else SETS["unsafe"]
  expected = logsumexp(u) - logsumexp(u[list(verdict)])
  got = losses.verbaliser_cross_entropy(
    jnp.array(u, jnp.float32)[None, None], row(label), row(1.0), **SETS
  )
  np.testing.assert_allclose(got.value(), expected, rtol=1e-4, atol=1e-4)


def test_verbaliser_padding_is_inert():
  logits = jnp.concatenate([VOCABULARY, jnp.full((1, 1, 6), jnp.nan)], axis=1)

  def loss(u):
    return losses.verbaliser_cross_entropy(
      u, row(1.0, 1.0), row(1.0, 0.0), **SETS
    ).value()

  value, gradient = jax.value_and_grad(loss)(logits)
  np.testing.assert_allclose(value, 1.37327924, rtol=1e-6)
  np.testing.assert_array_equal(gradient[0, 1], 0.0)
  assert np.all(np.isfinite(gradient))


# --------------------------------------------------------- Safe RLHF cost


@pytest.mark.parametrize(
  ("costs", "signs", "value", "gradient"),
  [
    ((-1.0, 2.0), (-1.0, 1.0), 0.48877705, (0.31636729, -0.16662880)),
    ((0.5, 1.5), (1.0, 1.0), 0.98875195, (-0.10859925, -0.45136695)),
  ],
)
def test_safe_rlhf_cost_golden(costs, signs, value, gradient):
  def loss(c):
    return losses.safe_rlhf_cost(
      c, row(*signs), jnp.array([[[0, 1]]]), row(1.0)
    ).value()

  got, slope = jax.value_and_grad(loss)(row(*costs))
  np.testing.assert_allclose(got, value, rtol=1e-6)
  np.testing.assert_allclose(slope[0], gradient, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(NUMBERS, NUMBERS, st.sampled_from([(0, 1), (1, 1), (0, 0)]))
def test_safe_rlhf_cost_is_bradley_terry_plus_bce(winner, loser, harmful):
  z, pairs = row(winner, loser), jnp.array([[[0, 1]]])
  sign = row(*(1.0 if k else -1.0 for k in harmful))
  label = (1.0 - sign) / 2

  cost = losses.safe_rlhf_cost(-z, sign, pairs, row(1.0))
  order = losses.bradley_terry(z, pairs, row(1.0))
  bce = losses.calibration(z, label, row(1.0, 1.0))

  np.testing.assert_allclose(
    cost.total, order.total + bce.total, rtol=1e-5, atol=1e-6
  )


def test_safe_rlhf_cost_regulariser_and_padding():
  pairs = jnp.array([[[0, 1], [0, 2]]])
  costs = row(-1.0, 2.0, float("nan"))

  def loss(c):
    return losses.safe_rlhf_cost(
      c, row(-1.0, 1.0, 1.0), pairs, row(1.0, 0.0), regulariser=0.1
    ).value()

  value, gradient = jax.value_and_grad(loss)(costs)
  np.testing.assert_allclose(value, 0.48877705 + 0.1 * 2.5, rtol=1e-6)
  assert gradient[0, 2] == 0.0
  assert np.all(np.isfinite(gradient))


# ---------------------------------------------------------- mixed batches


def packed(seed: int = 0, *, rows: int = 4, slots: int = 6, pairs: int = 5):
  """Random readouts and the loss side of a batch, some of it padding."""
  rng = np.random.default_rng(seed)
  ends = np.zeros((rows, 1), np.int32)
  batch = Batch(
    tokens=jnp.array(ends),
    positions=jnp.array(ends),
    subtree_end=jnp.array(ends + 1),
    readout=jnp.zeros((rows, slots), jnp.int32),
    label=jnp.array(rng.integers(0, 2, (rows, slots)), jnp.float32),
    label_weight=jnp.array(rng.choice([0.0, 1.0, 2.0], (rows, slots))),
    pair=jnp.array(rng.integers(0, slots, (rows, pairs, 2)), jnp.int32),
    pair_kind=jnp.array(rng.integers(0, 4, (rows, pairs)), jnp.int32),
    pair_weight=jnp.array(rng.choice([0.0, 0.5, 1.0], (rows, pairs))),
    pair_margin=jnp.array(rng.choice([0.0, 0.5], (rows, pairs))),
  )
  return jnp.array(rng.normal(size=(rows, slots, 2)), jnp.float32), batch


GAMMA = {
  "calibration": 1.0,
  "spec": 0.1,
  "resp": 0.2,
  "help": 0.7,
  "severity": 0.3,
}


def test_mixed_matches_reference():
  readouts, batch = packed(3)
  terms = losses.mixed(readouts, batch)

  z, h = np.moveaxis(np.asarray(readouts, np.float64), -1, 0)
  expected = {name: 0.0 for name in losses.TERMS}
  for i, slot in np.ndindex(z.shape):
    w, y = batch.label_weight[i, slot], batch.label[i, slot]
    expected["calibration"] += w * (softplus(z[i, slot]) - y * z[i, slot])
  for i, p in np.ndindex(batch.pair_weight.shape):
    kind = PAIR_KINDS[int(batch.pair_kind[i, p])]
    v = (h if kind == "help" else z)[i]
    win, lose = (int(k) for k in batch.pair[i, p])
    lead = v[win] - v[lose] - batch.pair_margin[i, p]
    expected[kind] += batch.pair_weight[i, p] * softplus(-lead)

  assert tuple(terms) == losses.TERMS
  for name in losses.TERMS:
    np.testing.assert_allclose(terms[name].total, expected[name], rtol=1e-5)
  weights = losses.weights_of(batch)
  for name in losses.TERMS:
    np.testing.assert_allclose(terms[name].weight, weights[name], rtol=1e-6)


@jax.jit
@jax.value_and_grad
def mixed_loss(readouts, batch, denominators):
  return losses.total(
    losses.mixed(readouts, batch), weights=GAMMA, denominators=denominators
  )


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_micro_batches_add_up(seed):
  """Loss and gradient of the parts, under global denominators, add up."""
  readouts, batch = packed(seed)
  denominators = losses.weights_of(batch)

  whole, gradient = mixed_loss(readouts, batch, denominators)
  parts = [
    mixed_loss(
      readouts[i : i + 2],
      jax.tree.map(lambda x, i=i: x[i : i + 2], batch),
      denominators,
    )
    for i in (0, 2)
  ]
  np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-5)
  np.testing.assert_allclose(
    np.concatenate([p[1] for p in parts]), gradient, rtol=1e-5, atol=1e-7
  )
  own = losses.total(losses.mixed(readouts, batch), weights=GAMMA)
  np.testing.assert_allclose(own, whole, rtol=1e-6)


def test_padding_is_inert():
  """NaN in unused slots, margins and labels touches nothing."""
  readouts, batch = packed(5)
  batch = batch._replace(
    label=jnp.where(batch.label_weight > 0, batch.label, jnp.nan),
    pair_margin=jnp.where(batch.pair_weight > 0, batch.pair_margin, jnp.nan),
  )

  @jax.jit
  @jax.value_and_grad
  def loss(r, batch):
    return losses.total(
      losses.mixed(r, batch, focal=1.5, brier=0.5, label_smoothing=0.1),
      weights=GAMMA,
    )

  def widen(x, axis, value):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, 3)
    return jnp.pad(x, pad, constant_values=value)

  padded = batch._replace(
    label=widen(batch.label, 1, jnp.nan),
    label_weight=widen(batch.label_weight, 1, 0),
    pair=widen(batch.pair, 1, 0),
    pair_kind=widen(batch.pair_kind, 1, 0),
    pair_weight=widen(batch.pair_weight, 1, 0),
    pair_margin=widen(batch.pair_margin, 1, jnp.nan),
  )
  value, gradient = loss(readouts, batch)
  wide, wide_gradient = loss(widen(readouts, 1, jnp.nan), padded)

  assert np.isfinite(value)
  np.testing.assert_allclose(wide, value, rtol=1e-6)
  np.testing.assert_allclose(
    wide_gradient[:, : readouts.shape[1]], gradient, rtol=1e-6
  )
  np.testing.assert_array_equal(wide_gradient[:, readouts.shape[1] :], 0.0)


def test_rows_act_on_their_own_readout():
  """Labels move z only, help pairs h only, the other pairs z only."""
  readouts, batch = packed(7)

  def gradient(labels: float, kind: str):
    chosen = batch._replace(
      label_weight=labels * jnp.ones_like(batch.label_weight),
      pair=jnp.broadcast_to(jnp.array([0, 1]), batch.pair.shape),
      pair_kind=jnp.full_like(batch.pair_kind, (*PAIR_KINDS, "").index(kind)),
      pair_weight=jnp.ones_like(batch.pair_weight),
    )
    return mixed_loss(readouts, chosen, losses.weights_of(chosen))[1]

  of_labels, of_help, of_spec = (
    gradient(1.0, ""),
    gradient(0.0, "help"),
    gradient(0.0, "spec"),
  )
  assert np.all(of_labels[..., 0] != 0) and np.all(of_labels[..., 1] == 0)
  assert np.all(of_help[..., 0] == 0) and np.all(of_help[:, :2, 1] != 0)
  assert np.all(of_spec[:, :2, 0] != 0) and np.all(of_spec[..., 1] == 0)
  np.testing.assert_allclose(
    gradient(1.0, "help"), of_labels + of_help, rtol=1e-5, atol=1e-7
  )


def test_empty_batch_costs_nothing():
  readouts, batch = packed(1)
  empty = batch._replace(
    label_weight=jnp.zeros_like(batch.label_weight),
    pair_weight=jnp.zeros_like(batch.pair_weight),
  )
  value, gradient = mixed_loss(readouts, empty, losses.weights_of(empty))
  assert value == 0.0
  np.testing.assert_array_equal(gradient, 0.0)


def test_log_mass_joins_calibration():
  readouts, batch = packed(2)
  log_mass = jnp.full(batch.label.shape, -0.25)
  plain = losses.mixed(readouts, batch)["calibration"]
  with_leak = losses.mixed(readouts, batch, log_mass=log_mass)["calibration"]
  np.testing.assert_allclose(with_leak.value() - plain.value(), 0.25, rtol=1e-5)


def test_total_names_an_unknown_weight():
  terms = {"calibration": Mean(jnp.float32(1.0), jnp.float32(2.0))}
  with pytest.raises(ValueError, match=r"'specs'.*calibration"):
    losses.total(terms, weights={"specs": 0.1})


def test_half_precision_is_reduced_in_float32():
  z = jnp.full((1, 4096), 0.25, jnp.bfloat16)
  loss = losses.calibration(z, jnp.ones_like(z), jnp.ones_like(z))
  assert loss.total.dtype == jnp.float32
  np.testing.assert_allclose(loss.value(), softplus(-0.25), rtol=1e-5)
