"""Metrics: golden values, scikit-learn and SciPy references, properties."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from csrm_jax import metrics

P = np.array([0.05, 0.15, 0.15, 0.35, 0.55, 0.62, 0.71, 0.83, 0.92, 0.97])
Y = np.array([0, 0, 1, 0, 1, 0, 1, 1, 1, 1], np.float64)
Z = logit(P)


def sample(seed: int, n: int = 60, ties: bool = True):
  """(log-odds, labels of both classes, positive weights)."""
  rng = np.random.default_rng(seed)
  z = rng.normal(size=n) * 2
  if ties:
    z = np.round(z)
  y = (rng.random(n) < expit(z)).astype(np.float64)
  y[:2] = 0.0, 1.0
  return z, y, rng.uniform(0.1, 2.0, n)


SEEDS = st.integers(0, 10_000)

# Every metric that is a function of log-odds, labels and weights.
ROW_METRICS = {
  "auroc": metrics.auroc,
  "auprc": metrics.auprc,
  "auprc_unsafe": lambda z, y, w: metrics.auprc(z, y, w, positive=0),
  "f1_unsafe": metrics.f1_unsafe,
  "f1_safe": metrics.f1_safe,
  "precision": lambda z, y, w: metrics.precision_recall(z, y, w, positive=0)[0],
  "recall": lambda z, y, w: metrics.precision_recall(z, y, w, positive=0)[1],
  "ece": lambda z, y, w: metrics.ece(expit(z), y, w),
  "smece": lambda z, y, w: metrics.smece(expit(z), y, w),
  "brier": lambda z, y, w: metrics.brier(expit(z), y, w),
  "nll": metrics.nll,
}


@pytest.mark.parametrize(
  ("value", "expected", "tolerance"),
  [
    (metrics.ece(P, Y, bins=10), 0.274, 1e-8),
    (metrics.ece(P, Y, bins=5), 0.206, 1e-8),
    (metrics.brier(P, Y), 0.15772, 1e-8),
    (metrics.nll(Z, Y), 0.47497969, 1e-8),
    (metrics.auroc(Z, Y), 0.85416667, 1e-8),
    (metrics.auprc(Z, Y), 0.91666667, 1e-8),
    (metrics.smece(P, Y), 0.0972, 1e-3),
    (metrics.f1_safe(Z, Y), 0.83333333, 1e-8),
    (metrics.f1_unsafe(Z, Y), 0.75, 1e-8),
  ],
)
def test_golden(value, expected, tolerance):
  np.testing.assert_allclose(value, expected, atol=tolerance)


def test_always_positive_f1_golden():
  unsafe = np.arange(100) < 49
  value = metrics.f1_unsafe(np.full(100, -5.0), 1.0 - unsafe)
  np.testing.assert_allclose(value, 0.65771812, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.booleans())
def test_equals_scikit_learn(seed, ties):
  z, y, w = sample(seed, ties=ties)
  p = expit(z)
  unsafe, flagged = 1 - y, p < 0.5
  sk = {"sample_weight": w}
  expected = {
    "auroc": sklearn.metrics.roc_auc_score(y, z, **sk),
    "auprc": sklearn.metrics.average_precision_score(y, z, **sk),
    "auprc_unsafe": sklearn.metrics.average_precision_score(unsafe, -z, **sk),
    "f1_unsafe": sklearn.metrics.f1_score(unsafe, flagged, **sk),
    "f1_safe": sklearn.metrics.f1_score(y, ~flagged, **sk),
    "recall": sklearn.metrics.recall_score(unsafe, flagged, **sk),
    "brier": sklearn.metrics.brier_score_loss(y, p, **sk),
    "nll": sklearn.metrics.log_loss(y, p, **sk),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(
      ROW_METRICS[name](z, y, w), value, rtol=1e-9, atol=1e-12, err_msg=name
    )


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_ece_matches_a_loop(seed):
  z, y, w = sample(seed, ties=False)
  p = expit(z)
  expected = 0.0
  for b in range(15):
    inside = (p >= b / 15) & (p < (b + 1) / 15)
    expected += abs(np.sum((w * (y - p))[inside])) / w.sum()
  np.testing.assert_allclose(metrics.ece(p, y, w), expected, rtol=1e-9)


def test_equal_mass_bins_hold_equally_many():
  p = expit(sample(0, 150, ties=False)[0])
  index = metrics.bin_index(p, bins=15, equal_mass=True)
  np.testing.assert_array_equal(np.bincount(index), np.full(15, 10))
  order = np.argsort(p)
  assert np.all(np.diff(index[order]) >= 0)
  y = sample(0, 150, ties=False)[1]
  means = [abs((y - p)[index == b].mean()) for b in range(15)]
  np.testing.assert_allclose(
    metrics.ece(p, y, equal_mass=True), np.mean(means), rtol=1e-9
  )
  tied = metrics.bin_index(np.full(9, 0.3), bins=3, equal_mass=True)
  assert len(set(tied)) == 1


def direct_smece(p, y, w, points: int = 4000) -> float:
  """The definition by quadrature, kernel summed over its mirror images."""
  t = (np.arange(points) + 0.5) / points

  def error(sigma):
    kernel = sum(
      scipy.stats.norm.pdf(t[:, None], loc=2 * k + sign * p, scale=sigma)
      for k in range(-2, 3)
      for sign in (1, -1)
    )
    return np.mean(np.abs(kernel @ (w * (y - p)) / w.sum()))

  low, high = 1e-4, 1.0
  for _ in range(14):
    middle = (low + high) / 2
    low, high = (middle, high) if error(middle) > middle else (low, middle)
  return (low + high) / 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smece_matches_quadrature(seed):
  z, y, w = sample(seed, ties=False)
  p = expit(z)
  np.testing.assert_allclose(
    metrics.smece(p, y, w), direct_smece(p, y, w), atol=1e-3
  )


def test_smece_of_calibrated_and_of_opposite():
  rng = np.random.default_rng(0)
  p = rng.random(20_000)
  y = (rng.random(20_000) < p).astype(np.float64)
  assert metrics.smece(p, y) < 0.02
  # All mass off by 0.6 in one direction cannot be smoothed away.
  far = metrics.smece(np.full(500, 0.2), np.r_[np.ones(400), np.zeros(100)])
  np.testing.assert_allclose(far, 0.6, atol=5e-3)
  # p = 0 is perfect here; the bandwidth's fixed point is then 0.
  assert metrics.smece(np.zeros(10), np.zeros(10)) < 1e-5


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_padding_with_weight_zero_is_inert(seed):
  z, y, w = sample(seed)
  rng = np.random.default_rng(seed)
  zz, yy = np.r_[z, rng.normal(size=9)], np.r_[y, rng.integers(0, 2, 9)]
  ww = np.r_[w, np.zeros(9)]
  for name, metric in ROW_METRICS.items():
    np.testing.assert_allclose(
      metric(zz, yy, ww), metric(z, y, w), atol=1e-9, err_msg=name
    )


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_integer_weights_are_repeats_and_axes_are_kept(seed):
  z, y, _ = sample(seed, 30)
  rng = np.random.default_rng(seed)
  counts = rng.integers(0, 3, (4, 30)) + (np.arange(30) < 2)
  for name, metric in ROW_METRICS.items():
    together = metric(z, y, counts.astype(np.float64))
    assert together.shape == (4,), name
    for i, c in enumerate(counts):
      alone = metric(np.repeat(z, c), np.repeat(y, c), np.ones(c.sum()))
      np.testing.assert_allclose(together[i], alone, atol=1e-6, err_msg=name)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_ranking_ignores_monotone_maps_and_calibration_bounds(seed):
  z, y, w = sample(seed)
  np.testing.assert_allclose(
    metrics.auroc(3 * z + 1, y, w), metrics.auroc(z, y, w)
  )
  np.testing.assert_allclose(
    metrics.auroc(-z, 1 - y, w), metrics.auroc(z, y, w), rtol=1e-9
  )
  p = expit(z)
  gap = abs(np.sum(w * (y - p)) / w.sum())
  assert gap - 1e-9 <= metrics.ece(p, y, w) <= 1.0
  # A wide kernel leaves the mean gap; a narrow one at most the mean |error|.
  assert gap - 1e-3 <= metrics.smece(p, y, w)
  assert metrics.smece(p, y, w) <= np.sum(w * np.abs(y - p)) / w.sum() + 1e-3


def test_missing_class_is_nan_and_f1_is_zero():
  z = np.array([1.0, -1.0])
  assert np.isnan(metrics.auroc(z, np.ones(2)))
  assert np.isnan(metrics.auprc(z, np.zeros(2)))
  assert metrics.f1_unsafe(z, np.ones(2)) == 0.0
  empty = np.zeros(0)
  for name, metric in ROW_METRICS.items():
    if not name.startswith("f1"):
      assert np.isnan(metric(empty, empty, empty)), name


def test_soft_labels_rank_at_one_half_and_calibrate_as_they_are():
  soft = np.where(Y > 0, 0.7, 0.2)
  np.testing.assert_allclose(metrics.auroc(Z, soft), metrics.auroc(Z, Y))
  np.testing.assert_allclose(metrics.f1_safe(Z, soft), metrics.f1_safe(Z, Y))
  np.testing.assert_allclose(metrics.brier(soft, soft), 0.0)
  np.testing.assert_allclose(metrics.ece(soft, soft), 0.0, atol=1e-12)


# ----------------------------------------------------------------- pairs


def test_preference_accuracy_counts_ties_half():
  preferred, rejected = np.array([1.0, 0.0, 2.0, 3.0]), np.array([0, 1, 2, 1.0])
  np.testing.assert_allclose(
    metrics.preference_accuracy(preferred, rejected), (1 + 0 + 0.5 + 1) / 4
  )
  np.testing.assert_allclose(
    metrics.preference_accuracy(preferred, rejected, np.array([0, 1, 2, 0.0])),
    (0 + 1.0) / 3,
  )
  assert np.isnan(metrics.preference_accuracy(np.zeros(0), np.zeros(0)))


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_preferences_between_classes_are_auroc(seed):
  z, y, _ = sample(seed, 20)
  win, lose = np.meshgrid(z[y == 1], z[y == 0])
  np.testing.assert_allclose(
    metrics.preference_accuracy(win.ravel(), lose.ravel()), metrics.auroc(z, y)
  )


def test_ladder_golden():
  z = [-1.0, 1.2, 1.0, 2.0]
  forward, backward = metrics.ladder_order(z), metrics.ladder_order(z[::-1])
  assert forward["violated"] == forward["violated_adjacent"] == 1
  assert (backward["violated"], backward["violated_adjacent"]) == (5, 2)
  tau = scipy.stats.kendalltau(np.arange(4), z).statistic
  np.testing.assert_allclose(forward["kendall"], tau)
  assert np.isnan(metrics.ladder_order([1.0])["kendall"])


# --------------------------------------------------------- sensitivity

#        base 0  flip of 0  kept  base 3  flip of 3  kept  flip of 3
BASE = np.array([-1, 0, 0, -1, 3, 3, 3])
GOLD = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
ODDS = np.array([2.0, -1.0, -3.0, -1.0, 1.0, -2.0, -1.0])


def test_flips_by_hand():
  # Flips: rows 1 (right), 4 (right), 6 (missed). Kept: 2 (moved), 5 (still).
  np.testing.assert_allclose(metrics.flip_recall(ODDS, GOLD, BASE), 2 / 3)
  np.testing.assert_allclose(metrics.spurious_flips(ODDS, GOLD, BASE), 1 / 2)


def test_a_flip_needs_both_verdicts():
  wrong_way = metrics.flip_recall(-ODDS, GOLD, BASE)
  np.testing.assert_allclose(wrong_way, 0.0)
  wrong_base = np.where(BASE < 0, -ODDS, ODDS)
  np.testing.assert_allclose(metrics.flip_recall(wrong_base, GOLD, BASE), 0.0)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_flips_of_constant_and_perfect_judges(seed):
  rng = np.random.default_rng(seed)
  n = 24
  base = np.where(np.arange(n) % 4 == 0, -1, np.arange(n) // 4 * 4)
  gold = rng.integers(0, 2, n).astype(np.float64)
  gold[:3] = 0.0, 1.0, 0.0  # one flip and one kept edit at least
  weight = rng.uniform(0.5, 2.0, (3, n))
  for odds, recall in ((np.full(n, -9.0), 0.0), (2 * gold - 1, 1.0)):
    np.testing.assert_allclose(
      metrics.flip_recall(odds, gold, base, weight), recall
    )
    np.testing.assert_allclose(
      metrics.spurious_flips(odds, gold, base, weight), 0.0
    )
  assert np.isnan(metrics.flip_recall(gold, gold, np.full(n, -1)))


def test_flips_ignore_weight_zero():
  weight = np.array([1, 1, 1, 1, 1, 1, 0.0])
  np.testing.assert_allclose(metrics.flip_recall(ODDS, GOLD, BASE, weight), 1.0)
  weight[2] = 0.0
  np.testing.assert_allclose(
    metrics.spurious_flips(ODDS, GOLD, BASE, weight), 0.0
  )


# ----------------------------------------------------------- intervals


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_matches_scipy(successes, more):
  trials = successes + more
  expected = scipy.stats.binomtest(successes, trials).proportion_ci(
    method="wilson"
  )
  np.testing.assert_allclose(
    metrics.wilson(successes, trials), expected, atol=1e-9
  )
  assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_wilson_holds_the_rate_whatever_is_rounded():
  trials = np.arange(1, 500)
  for successes in (np.zeros(499), trials, trials // 3):
    low, high = metrics.wilson(successes, trials)
    rate = successes / trials
    assert (low <= rate).all() and (rate <= high).all()
  assert metrics.wilson(0, 24)[0] == 0.0 and metrics.wilson(24, 24)[1] == 1.0


@pytest.mark.parametrize(
  ("successes", "trials", "expected"),
  [
    (59, 59, 0.95049239),
    (58, 58, 0.94966066),
    (99, 100, 0.95344019),
    (196, 200, 0.95481959),
  ],
)
def test_clopper_pearson_golden(successes, trials, expected):
  got = metrics.clopper_pearson_lower(successes, trials)
  np.testing.assert_allclose(got, expected, atol=1e-8)
  reference = scipy.stats.binomtest(
    successes, trials, alternative="greater"
  ).proportion_ci(0.95, method="exact")
  np.testing.assert_allclose(got, reference.low, rtol=1e-9)
  assert metrics.clopper_pearson_lower(0, trials) == 0.0


def test_intervals_are_seeded_and_cover():
  z, y, _ = sample(3, 400, ties=False)

  def of_weights(w):
    return {"auroc": metrics.auroc(z, y, w), "never": np.full(len(w), np.nan)}

  groups = [f"family-{i // 4}" for i in range(400)]
  got = metrics.intervals(of_weights, groups, resamples=300, seed=1)
  assert got == metrics.intervals(of_weights, groups, resamples=300, seed=1)
  assert got != metrics.intervals(of_weights, groups, resamples=300, seed=2)
  low, high = got["auroc"]
  assert low < metrics.auroc(z, y) < high
  assert "never" not in got


def test_intervals_match_the_normal_ones_and_widen_with_groups():
  rng = np.random.default_rng(0)
  values = np.repeat(rng.normal(size=100), 5)  # rows of a group are equal

  def mean(w):
    return {"mean": w @ values / w.sum(-1)}

  by_group = metrics.intervals(
    mean, np.repeat(np.arange(100), 5).tolist(), resamples=4000
  )["mean"]
  by_row = metrics.intervals(mean, list(range(500)), resamples=4000)["mean"]
  error = values.std() / np.sqrt(100)
  np.testing.assert_allclose(
    by_group, values.mean() + np.array([-1.96, 1.96]) * error, atol=0.1 * error
  )
  ratio = (by_group[1] - by_group[0]) / (by_row[1] - by_row[0])
  np.testing.assert_allclose(ratio, np.sqrt(5), rtol=0.1)


def test_reliability_curve_follows_the_frequency():
  rng = np.random.default_rng(0)
  p = rng.random(30_000)
  y = (rng.random(30_000) < p**2).astype(np.float64)
  at = np.linspace(0.1, 0.9, 9)
  frequency, density = metrics.reliability_curve(p, y, at=at, sigma=0.02)
  np.testing.assert_allclose(frequency, at**2, atol=0.04)
  np.testing.assert_allclose(density, 1.0, atol=0.1)
