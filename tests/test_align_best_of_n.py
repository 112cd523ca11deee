"""Best of N: golden values, enumeration, choices, curves."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.align import best_of_n
from csrm_jax.eval import overoptimisation

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
  ("n", "nats"),
  [(1, 0.0), (4, 0.63629436), (16, 1.83508872), (64, 3.17450808)],
)
def test_kl_golden(n, nats):
  np.testing.assert_allclose(best_of_n.kl(n), nats, atol=5e-9)


def test_kl_is_that_of_the_best_of_many():
  """Best of 3 of a uniform policy over 1000 answers, by its definition."""
  m, n = 1000, 3
  i = np.arange(1, m + 1)
  best = (i / m) ** n - ((i - 1) / m) ** n
  exact = np.sum(best * np.log(best * m))
  np.testing.assert_allclose(best_of_n.kl(n), exact, atol=5e-3)
  assert exact <= best_of_n.kl(n)  # finite policies tie, so it is a bound


def subsets(scores, values, n):
  """Mean over all N-subsets of the value of the best, ties averaged."""
  total = []
  for chosen in itertools.combinations(range(len(scores)), n):
    top = max(scores[list(chosen)])
    total.append(np.mean([values[i] for i in chosen if scores[i] == top]))
  return np.mean(total)


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 7), st.booleans())
def test_estimate_is_the_mean_over_all_subsets(seed, n, tied):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 3, 7).astype(float) if tied else rng.normal(size=7)
  values = rng.normal(size=7)
  got = best_of_n.estimate(scores[None], values[None], n)
  np.testing.assert_allclose(got, [subsets(scores, values, n)], atol=1e-12)
  weights = best_of_n.weights(scores, n)
  np.testing.assert_allclose(weights.sum(), 1.0)
  assert (weights >= 0).all()


def test_weights_follow_the_formula():
  scores = np.array([3.0, 9.0, 1.0, 7.0, 5.0])
  expected = {
    s: math.comb(5 - i, 2) / math.comb(5, 3)
    for i, s in enumerate(sorted(scores, reverse=True), 1)
  }
  got = best_of_n.weights(scores, 3)
  np.testing.assert_allclose(got, [expected[s] for s in scores])
  # Large M and N: no overflow.
  many = best_of_n.weights(np.arange(4000.0), 2000)
  np.testing.assert_allclose([many.sum(), many[-1]], [1.0, 0.5])


def test_estimate_is_unbiased():
  """Against the exact best of 2 of a die, over many rolls of 3."""
  rng = np.random.default_rng(0)
  rolls = rng.integers(1, 7, (20_000, 3)).astype(float)
  exact = sum(max(a, b) for a in range(1, 7) for b in range(1, 7)) / 36
  got = best_of_n.estimate(rolls, rolls, 2)
  assert abs(got.mean() - exact) < 4 * got.std() / np.sqrt(len(got))


def test_missing_samples_take_no_part():
  scores = np.array([[1.0, np.nan, 3.0, 2.0], [4.0, 9.0, 1.0, 2.0]])
  valid = np.array([[1.0, 1, 1, 1], [1, 0, 1, 1]])
  got = best_of_n.estimate(scores, np.nan_to_num(scores), 3, valid=valid)
  np.testing.assert_allclose(got, [3.0, 4.0])
  np.testing.assert_array_equal(best_of_n.choose(scores, valid=valid), [2, 0])
  with pytest.raises(ValueError, match=r"prompt 0: 3 valid samples.* 4"):
    best_of_n.estimate(scores, scores, 4, valid=valid)
  with pytest.raises(ValueError, match="prompt 0: a sample with a score"):
    best_of_n.estimate(np.nan_to_num(scores), scores, 1)
  none = np.array([[np.nan, np.nan], [np.nan, -np.inf]])
  np.testing.assert_array_equal(best_of_n.choose(none), [-1, 1])


def test_choices():
  h = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
  s = np.array([[0.2, 0.9, 0.8], [0.2, 0.3, 0.1], [0.01, 0.02, 0.03]])
  got = best_of_n.choose_safely(h, s, threshold=0.7, refuse_below=0.1)
  # The most helpful of the safe; the safest of none; a refusal.
  np.testing.assert_array_equal(got, [1, 1, best_of_n.REFUSE])
  never = best_of_n.choose_safely(h, s, threshold=0.7)
  np.testing.assert_array_equal(never, [1, 1, 2])
  z = np.log(s / (1 - s))
  product = best_of_n.product(z, h)
  np.testing.assert_allclose(product, s / (1 + np.exp(-h)))
  np.testing.assert_array_equal(best_of_n.choose(product), [1, 1, 2])


@settings(max_examples=40)
@given(SEEDS)
def test_constrained_rank_says_what_the_rule_says(seed):
  rng = np.random.default_rng(seed)
  h, s = rng.integers(0, 3, (2, 2, 6)) / 2
  rank = best_of_n.constrained(h, s, threshold=0.5)
  for row in range(2):
    for i, j in itertools.permutations(range(6), 2):
      one, other = s[row, i] >= 0.5, s[row, j] >= 0.5
      if one != other:
        better = one
      elif one:
        better = h[row, i] > h[row, j]
      else:
        better = s[row, i] > s[row, j]
      assert (rank[row, i] > rank[row, j]) == better


def test_curve_shows_a_proxy_that_is_gamed():
  """Gold rises with the proxy up to a point, then falls."""
  rng = np.random.default_rng(0)
  proxy = rng.uniform(size=(150, 64))
  gold = np.where(proxy < 0.9, proxy, 1.8 - proxy * 1.5)
  points = best_of_n.curve(proxy, gold, bootstrap=50)
  assert [p.name for p in points] == ["N = 1", "N = 4", "N = 16", "N = 64"]
  np.testing.assert_allclose(
    [p.kl for p in points], [best_of_n.kl(n) for n in best_of_n.SIZES]
  )
  # Best of N of uniform draws: N / (N + 1); M = N = 64 is one draw each.
  np.testing.assert_allclose(
    [p.proxy for p in points], [1 / 2, 4 / 5, 16 / 17, 64 / 65], atol=0.01
  )
  for p in points:
    np.testing.assert_allclose(p.gap, p.proxy - p.gold)
    assert p.n == 150
    assert p.proxy_interval[0] <= p.proxy <= p.proxy_interval[1]
    assert p.gold_interval[0] < p.gold < p.gold_interval[1]
  assert overoptimisation.falls(points) == 2
  assert overoptimisation.best(points).name == "N = 4"
  same = best_of_n.curve(proxy, gold, sizes=(4,), selection=gold, bootstrap=0)
  assert same[0].gold > points[1].gold and same[0].proxy < points[1].proxy
  assert same[0].gold_interval == (same[0].gold, same[0].gold)


def test_pick_of_four():
  scores = np.array([[3.0, 1, 2, 0], [1.0, 1, 0, 0], [0.0, 1, 0, 0]])
  right = np.array([[True, False, False, False]] * 3)
  np.testing.assert_allclose(best_of_n.accuracy(scores, right), [1, 0.5, 0])
  flat = best_of_n.accuracy(np.zeros((1, 4)), right[:1])
  np.testing.assert_allclose(flat, [0.25])  # chance


def test_bad_numbers_are_named():
  with pytest.raises(ValueError, match="n=0"):
    best_of_n.kl(0)
  with pytest.raises(ValueError, match="n=3 of 2"):
    best_of_n.weights(np.zeros(2), 3)
