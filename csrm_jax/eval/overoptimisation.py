"""Proxy and gold judge over the distance that optimisation went, in KL."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from csrm_jax import metrics

Interval = tuple[float, float]


class Point(NamedTuple):
  """Both judges on the responses of one policy.

  Attributes:
    name: of the policy: a step, "N = 16".
    kl: nats from the reference.
    n: responses.
    proxy: mean score by the judge that was optimised, with its 95 % interval.
    gold: the same by a judge that was never used to train or to select.
    gap: proxy less gold, same scale for both.
  """

  name: str
  kl: float
  n: int
  proxy: float
  proxy_interval: Interval
  gold: float
  gold_interval: Interval
  gap: float
  gap_interval: Interval


def point(
  name: str,
  kl: float,
  proxy: Float[np.ndarray, " n"],
  gold: Float[np.ndarray, " n"],
  families: Sequence[object],
  *,
  bootstrap: int = 500,
  seed: int = 0,
) -> Point:
  """The means of one policy, resampled by family.

  Args:
    name: of the policy.
    kl: nats from the reference, finite, not negative.
    proxy: score of each response by the optimised judge, finite.
    gold: score by the other judge, on the same scale.
    families: bootstrap unit of each response.
    bootstrap: resamples; 0: each interval is the value itself.
    seed: of the resamples.

  Raises:
    ValueError: no responses, or a number that is not finite.
  """
  if not len(proxy):
    raise ValueError(f"point {name!r}: no responses; give at least one")
  for what, numbers in (("kl", [kl]), ("proxy", proxy), ("gold", gold)):
    if not np.isfinite(numbers).all():
      at = int(np.flatnonzero(~np.isfinite(numbers))[0])
      raise ValueError(
        f"point {name!r}: {what} of response {at} is {numbers[at]}; give finite"
        " numbers"
      )
  if kl < 0:
    raise ValueError(f"point {name!r}: kl is {kl}; give nats, 0 or more")
  columns = np.stack([proxy, gold, proxy - gold], -1).astype(np.float64)
  names = ("proxy", "gold", "gap")

  def values(w: np.ndarray) -> dict[str, np.ndarray]:
    means = (w @ columns) / w.sum(-1, keepdims=True)
    return {name: means[..., i] for i, name in enumerate(names)}

  mean = columns.mean(0).tolist()
  spread = metrics.intervals(values, families, resamples=bootstrap, seed=seed)
  low_high = [spread.get(n, (m, m)) for n, m in zip(names, mean, strict=True)]
  return Point(
    name,
    float(kl),
    len(proxy),
    mean[0],
    low_high[0],
    mean[1],
    low_high[1],
    mean[2],
    low_high[2],
  )


def by_kl(points: Sequence[Point]) -> list[Point]:
  """The points from the reference outwards; equal KL keeps its order."""
  return sorted(points, key=lambda p: p.kl)


def falls(points: Sequence[Point]) -> int:
  """Longest run of points in KL order at which gold falls.

  Two in a row: stop training (Gao et al. 2022, arXiv:2210.10760, show that
  gold peaks while the proxy goes on rising). By values alone: noise counts.
  """
  longest = run = 0
  for one, other in itertools.pairwise(by_kl(points)):
    run = run + 1 if other.gold < one.gold else 0
    longest = max(longest, run)
  return longest


def best(points: Sequence[Point]) -> Point:
  """The point where gold peaks; of equals the one nearest the reference.

  Raises:
    ValueError: no points.
  """
  if not points:
    raise ValueError("no points: give at least one policy")
  return max(by_kl(points), key=lambda p: p.gold)
