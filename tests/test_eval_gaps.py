"""Seen against unseen."""

import numpy as np

from csrm_jax import metrics
from csrm_jax.eval import suites
from csrm_jax.eval.gaps import unseen_gaps


def suite(name: str, labels) -> suites.Suite:
  rows = [
    {
      "id": f"{name}{i}",
      "messages": [{"role": "assistant", "content": f"{i}"}],
      "label": label,
      "spec": "S1: x",
      "weight": 1.0 + i % 2,
    }
    for i, label in enumerate(labels)
  ]
  return suites.flatten(name, rows)


def test_gap_is_the_difference_of_the_two_weighted_aurocs():
  rng = np.random.default_rng(0)
  labels = np.arange(40) % 4 > 1
  found = {
    name: suite(name, labels.astype(float).tolist())
    for name in ("a_seen_rules", "a_unseen_rules", "b_unseen", "c_seen")
  }
  odds = {name: rng.normal(size=40) + labels for name in found}
  answers = {(name, "one"): z for name, z in odds.items()}
  answers["a_seen_rules", "two"] = odds["a_seen_rules"]  # not on the other
  gaps = unseen_gaps(found, answers, bootstrap=20)
  assert {k: set(v) for k, v in gaps.items()} == {"a_rules": {"one"}}
  gap = gaps["a_rules"]["one"]
  weight = 1.0 + np.arange(40) % 2
  expected = [
    metrics.auroc(odds[f"a_{side}_rules"], labels.astype(float), weight)
    for side in ("seen", "unseen")
  ]
  np.testing.assert_allclose(gap["auroc_seen"], expected[0])
  np.testing.assert_allclose(gap["auroc_unseen"], expected[1])
  np.testing.assert_allclose(gap["gap"], expected[0] - expected[1])
  low, high = gap["intervals"]["gap"]
  assert low < gap["gap"] < high
