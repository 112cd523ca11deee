"""Best of N: choosing a sample, what it costs in KL, what it brings.

Float64 NumPy: this is bookkeeping over scores, without gradients. Larger
scores are better. Rows are prompts, columns their samples.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from csrm_jax.eval.overoptimisation import Point, point

SIZES = (1, 4, 16, 64)
REFUSE = -1

Scores = Float[np.ndarray, "g s"]


def kl(n: int) -> float:
  """log N - (N - 1) / N nats: most that the best of N is from the policy.

  Exact where no two samples tie (Beirami et al. 2024, arXiv:2401.01879, show
  that it is a bound in general).

  Raises:
    ValueError: n below 1.
  """
  if n < 1:
    raise ValueError(f"n={n}: give a number of samples, 1 or more")
  return math.log(n) - (n - 1) / n


def _valid(scores: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
  known = ~np.isnan(scores)
  return known if valid is None else known & (np.asarray(valid) > 0)


def product(z: Scores, h: Scores) -> Scores:
  """R H = sigmoid(z) sigmoid(h), from log-odds."""
  return expit(z) * expit(h)


def choose(
  scores: Scores, *, valid: Float[np.ndarray, "g s"] | None = None
) -> Int[np.ndarray, " g"]:
  """The best sample of each prompt, the first of equals.

  Args:
    scores: such as `product`.
    valid: 0 marks samples that do not exist; a NaN score is not valid either.

  Returns:
    Its number, `REFUSE` (-1) for a prompt without a valid sample.
  """
  known = _valid(scores, valid)
  best = np.argmax(np.where(known, scores, -np.inf), -1)
  # All -inf: argmax would name an invalid first sample.
  best = np.where(
    np.take_along_axis(known, best[:, None], -1)[:, 0],
    best,
    np.argmax(known, -1),
  )
  return np.where(known.any(-1), best, REFUSE)


def constrained(h: Scores, s: Scores, *, threshold: float) -> Scores:
  """Ranks by helpfulness among safe samples; the others by safety, below.

  Sample i ranks above j if it alone is safe (`s >= threshold`), if both are
  and it helps more, or if neither is and it is safer. A score like any other:
  for `choose`, and for `estimate` at any N.

  Args:
    h: helpfulness, any scale.
    s: safety: probability of compliance.
    threshold: least safety that counts as safe.

  Returns:
    Ranks from 0, worst first, equals sharing one; NaN where h or s is NaN.
  """
  known = ~(np.isnan(h) | np.isnan(s))
  out = np.full(h.shape, np.nan)
  for row in range(len(h)):
    at = np.flatnonzero(known[row])
    safe = s[row, at] >= threshold
    keys = np.stack([safe, np.where(safe, h[row, at], s[row, at])], -1)
    _, rank = np.unique(keys, axis=0, return_inverse=True)
    out[row, at] = rank.reshape(-1)
  return out


def choose_safely(
  h: Scores,
  s: Scores,
  *,
  threshold: float,
  refuse_below: float = 0.0,
  valid: Float[np.ndarray, "g s"] | None = None,
) -> Int[np.ndarray, " g"]:
  """Most helpful of the safe, else the safest, else a refusal.

  Args:
    h: helpfulness, any scale.
    s: safety: probability of compliance.
    threshold: least safety at which helpfulness decides.
    refuse_below: where no sample is this safe, refuse; 0: never.
    valid: 0 marks samples that do not exist; NaN is not valid either.

  Returns:
    A number of a sample, or `REFUSE` (-1): answer with a fixed refusal.
  """
  best = choose(constrained(h, s, threshold=threshold), valid=valid)
  safety = np.take_along_axis(s, np.maximum(best, 0)[:, None], -1)[:, 0]
  return np.where((best >= 0) & (safety >= refuse_below), best, REFUSE)


def weights(scores: Float[np.ndarray, " m"], n: int) -> Float[np.ndarray, " m"]:
  """Probability of each of M samples to be the best of N drawn among them.

  `C(M - i, N - 1) / C(M, N)` for the i-th best, drawn without replacement;
  samples that tie share their probability, as if ties were broken by a toss.

  Raises:
    ValueError: n out of 1..M.
  """
  count = len(scores)
  if not 1 <= n <= count:
    raise ValueError(f"n={n} of {count} samples: give 1 to {count}")
  i = np.arange(count - n)
  steps = (count - n - i) / (count - 1 - i)  # one rank further down
  ranked = np.zeros(count)
  ranked[: count - n + 1] = n / count * np.cumprod(np.append(1.0, steps))
  _, place, ties = np.unique(-scores, return_inverse=True, return_counts=True)
  total = np.zeros(len(ties))
  np.add.at(total, np.repeat(np.arange(len(ties)), ties), ranked)
  return (total / ties)[place.reshape(-1)]


def estimate(
  scores: Scores,
  values: Scores,
  n: int,
  *,
  valid: Float[np.ndarray, "g s"] | None = None,
) -> Float[np.ndarray, " g"]:
  """Unbiased mean value of the best of N, from M >= N samples a prompt.

  The average over all subsets of N samples, instead of one draw of N.

  Args:
    scores: what selects.
    values: what is reported of the selected: `scores` itself or a gold judge.
    n: N.
    valid: 0 marks samples that do not exist; a NaN score is not valid either.

  Raises:
    ValueError: a prompt with fewer than N valid samples, by its number, or a
      valid sample without a value.
  """
  known = _valid(scores, valid)
  out = np.zeros(len(scores))
  for row, mask in enumerate(known):
    if mask.sum() < n:
      raise ValueError(
        f"prompt {row}: {mask.sum()} valid samples, too few for the best of"
        f" {n}; draw more samples or ask for a smaller N"
      )
    if np.isnan(values[row, mask]).any():
      raise ValueError(f"prompt {row}: a sample with a score has no value")
    out[row] = weights(scores[row, mask], n) @ values[row, mask]
  return out


def curve(
  proxy: Scores,
  gold: Scores,
  *,
  sizes: Sequence[int] = SIZES,
  selection: Scores | None = None,
  valid: Float[np.ndarray, "g s"] | None = None,
  bootstrap: int = 500,
  seed: int = 0,
) -> list[Point]:
  """Proxy and gold score of the best of N, over N; resampled by prompt.

  Args:
    proxy: score by the judge that selects.
    gold: by a judge never used to select, on the same scale.
    sizes: values of N.
    selection: what selects, where it is not the proxy score (`constrained`).
    valid: 0 marks samples that do not exist; a NaN score is not valid either.
    bootstrap: resamples of prompts for the 95 % intervals.
    seed: of the resamples.

  Raises:
    ValueError: as `estimate`.
  """
  by = proxy if selection is None else selection
  return [
    point(
      f"N = {n}",
      kl(n),
      estimate(by, proxy, n, valid=valid),
      estimate(by, gold, n, valid=valid),
      range(len(proxy)),
      bootstrap=bootstrap,
      seed=seed,
    )
    for n in sizes
  ]


def accuracy(
  scores: Scores, right: Bool[np.ndarray, "g s"]
) -> Float[np.ndarray, " g"]:
  """Picking the right one of several, per prompt; ties share. Chance 1 / s.

  As RewardBench 2 (arXiv:2506.01937) does with 1 right answer of 4.
  """
  return np.array(
    [weights(s, len(s)) @ r for s, r in zip(scores, right, strict=True)]
  ).reshape(-1)
