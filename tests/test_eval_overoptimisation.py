"""Points of proxy and gold over KL: means, intervals, falls."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csrm_jax.eval.overoptimisation import best, by_kl, falls, point


def points(golds, kls=None):
  return [
    point(
      f"step {i}",
      float(i if kls is None else kls[i]),
      np.array([0.9]),
      np.array([float(gold)]),
      ["f"],
      bootstrap=0,
    )
    for i, gold in enumerate(golds)
  ]


def test_means_and_intervals():
  rng = np.random.default_rng(0)
  proxy, gold = rng.normal(1.0, 1.0, (2, 400))
  found = point("x", 2.0, proxy, gold, range(400), bootstrap=800)
  np.testing.assert_allclose(
    [found.proxy, found.gold, found.gap],
    [proxy.mean(), gold.mean(), (proxy - gold).mean()],
  )
  half = 1.96 * (proxy - gold).std() / 20
  np.testing.assert_allclose(
    found.gap_interval, [found.gap - half, found.gap + half], atol=0.03
  )
  assert found.n == 400 and found.kl == 2.0


def test_families_are_resampled_whole():
  """Twenty copies of five answers say no more than five answers."""
  few = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
  one = point("x", 0.0, few, few, range(5), bootstrap=400)
  many = np.repeat(few, 20)
  families = np.repeat(np.arange(5), 20).tolist()
  other = point("x", 0.0, many, many, families, bootstrap=400)
  np.testing.assert_allclose(other.gold_interval, one.gold_interval)


@pytest.mark.parametrize(
  ("golds", "run"),
  [
    ([1, 2, 3], 0),
    ([1, 2, 1, 2, 1], 1),
    ([1, 3, 2, 1], 2),
    ([3, 3, 3], 0),
    ([4, 3, 2, 5, 4], 2),
    ([1], 0),
    ([], 0),
  ],
)
def test_falls(golds, run):
  assert falls(points(golds)) == run


@given(st.permutations([0, 1, 2, 3, 4]))
def test_points_are_read_in_the_order_of_kl(order):
  golds = np.array([0.1, 0.5, 0.4, 0.3, 0.6])
  shuffled = points(golds[order], np.array(order))
  assert [p.kl for p in by_kl(shuffled)] == [0, 1, 2, 3, 4]
  assert falls(shuffled) == 2
  assert best(shuffled).gold == 0.6


def test_bad_points_are_named():
  zero, nan = np.zeros(2), np.array([0.0, np.nan])
  with pytest.raises(ValueError, match="'a': gold of response 1 is nan"):
    point("a", 0.0, zero, nan, "fg")
  with pytest.raises(ValueError, match="'a': kl is -1"):
    point("a", -1.0, zero, zero, "fg")
  with pytest.raises(ValueError, match="'a': no responses"):
    point("a", 0.0, zero[:0], zero[:0], [])
  with pytest.raises(ValueError, match="no points"):
    best([])
