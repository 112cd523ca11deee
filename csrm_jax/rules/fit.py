"""Weights of rule-based rewards: a hinge loss over pairs of one prompt."""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from csrm_jax import metrics


class Pairs(NamedTuple):
  """Ordered pairs of completions of one prompt and one response type.

  Attributes:
    gap: features of the better one less those of the worse one.
    lead: helpfulness of the better less that of the worse; real, any sign.
    margin: by which the better is to lead, in units of reward.
    family: of the prompt.
  """

  gap: Float[np.ndarray, "n f"]
  lead: Float[np.ndarray, " n"]
  margin: Float[np.ndarray, " n"]
  family: tuple[str, ...]

  def keep(self, chosen: Bool[np.ndarray, " n"]) -> "Pairs":
    """Those chosen."""
    family = tuple(self.family[i] for i in np.flatnonzero(chosen).tolist())
    return Pairs(
      self.gap[chosen], self.lead[chosen], self.margin[chosen], family
    )


class Fitted(NamedTuple):
  """Attributes: weights; losses before each step (mean hinge)."""

  weights: Float[np.ndarray, " f"]
  losses: Float[np.ndarray, " steps"]


def make_pairs(
  features: Float[np.ndarray, "m f"],
  helpfulness: Float[np.ndarray, " m"],
  ranks: Int[np.ndarray, " m"],
  families: Sequence[str],
  *,
  margin: float = 1.0,
  per_rank: float = 0.0,
) -> Pairs:
  """All pairs of completions of one prompt that differ in rank.

  Args:
    features: phi of each completion.
    helpfulness: of a reward model, any real scale; zeros without one.
    ranks: 0 is best; of equal ones no pair is made.
    families: of the prompts.
    margin: wanted lead, in units of reward.
    per_rank: added to it for every rank between the two beyond the first.

  Returns:
    Pairs in float64: a margin may be any real number.
  """
  groups: dict[str, list[int]] = {}
  for i, family in enumerate(families):
    groups.setdefault(family, []).append(i)
  better: list[int] = []
  worse: list[int] = []
  for members in groups.values():
    for i in members:
      for j in members:
        if ranks[i] < ranks[j]:
          better.append(i)
          worse.append(j)
  b, w = np.array(better, int), np.array(worse, int)
  apart = (ranks[w] - ranks[b]).astype(np.float64)
  helpful = helpfulness.astype(np.float64)
  return Pairs(
    features[b].astype(np.float64) - features[w].astype(np.float64),
    helpful[b] - helpful[w],
    margin + per_rank * (apart - 1.0),
    tuple(families[i] for i in better),
  )


def hold_out(
  families: Sequence[str], *, share: float, seed: int
) -> Bool[np.ndarray, " n"]:
  """Which pairs are kept from fitting: whole prompts, in an order by hash.

  Prompts are taken while they bring the share nearer, but never the last. Pairs
  of a single prompt are drawn one by one.
  """
  n = len(families)
  wanted = share * n

  def order(name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())

  held = np.zeros(n, bool)
  names = sorted(set(families), key=lambda name: (order(name), name))
  if len(names) < 2:
    chosen = sorted(range(n), key=lambda i: order(str(i)))
    held[chosen[: round(wanted)]] = True
    return held
  member = np.array(families, object)
  for name in names[:-1]:
    more = held | (member == name)
    if abs(more.sum() - wanted) < abs(held.sum() - wanted):
      held = more
  return held


def hinge(
  weights: Float[Array, " f"],
  gap: Float[Array, "n f"],
  lead: Float[Array, " n"],
  margin: Float[Array, " n"],
) -> Float[Array, ""]:
  """Mean of max(0, margin - (reward of the better - that of the worse)).

  Source: Mu et al. 2024 (arXiv:2411.01111), eq. 2, with mu = 1. Convex.
  """
  return jnp.mean(jnp.maximum(0.0, margin - lead - gap @ weights))


def fit(
  pairs: Pairs,
  *,
  steps: int = 1000,
  lr: float = 0.01,
  weight_decay: float = 0.0,
) -> Fitted:
  """AdamW from zero on all pairs at once; the best iterate is the answer.

  The loss has kinks, around which iterates jump by about `lr`; the loss of
  the best one is the lowest that was seen.

  Args:
    pairs: one or more.
    steps: of full batches.
    lr: constant, in units of the spread of `lead` where that is above 1: no
      weight gets much further from zero than steps x lr, and helpfulness may
      have any scale.
    weight_decay: decoupled; with it the last iterate is the answer, as the
      lowest loss then is no aim of the fit.

  Raises:
    ValueError: no pairs, or a number in them that is not finite.
  """
  if not len(pairs.gap):
    raise ValueError(
      "no two completions of one prompt differ in rank, so nothing can be"
      " fitted; give several completions a prompt"
    )
  for name, values in zip(("gap", "lead", "margin"), pairs, strict=False):
    if not np.isfinite(np.asarray(values)).all():
      raise ValueError(f"{name} of a pair is not finite; check its features")
  arrays = [jnp.asarray(x, jnp.float32) for x in pairs[:3]]
  unit = max(1.0, float(np.std(pairs.lead)))
  best, last, losses = _descend(
    *arrays, steps=steps, lr=lr * unit, weight_decay=weight_decay
  )
  chosen = last if weight_decay else best
  return Fitted(np.asarray(chosen), np.asarray(losses))


@functools.partial(jax.jit, static_argnames=("steps", "lr", "weight_decay"))
def _descend(
  gap: Array,
  lead: Array,
  margin: Array,
  *,
  steps: int,
  lr: float,
  weight_decay: float,
) -> tuple[Array, Array, Array]:
  """(best weights, last weights, loss before each step)."""
  optimizer = optax.adamw(lr, weight_decay=weight_decay)
  start = jnp.zeros(gap.shape[1], jnp.float32)

  def step(carry: Any, _: None) -> Any:
    weights, state, best, lowest = carry
    loss, gradient = jax.value_and_grad(hinge)(weights, gap, lead, margin)
    best = jnp.where(loss < lowest, weights, best)
    lowest = jnp.minimum(loss, lowest)
    update, state = optimizer.update(gradient, state, weights)
    return (weights + update, state, best, lowest), loss

  carry = (start, optimizer.init(start), start, jnp.float32(jnp.inf))
  (last, _, best, lowest), losses = jax.lax.scan(step, carry, length=steps)
  final = hinge(last, gap, lead, margin)
  return jnp.where(final < lowest, last, best), last, losses


def optimum(pairs: Pairs) -> tuple[Float[np.ndarray, " f"], float]:
  """(weights, loss) of the exact minimum, as a linear program.

  minimise mean(s) over w, s >= 0 with s >= margin - lead - gap w.

  Raises:
    ValueError: the solver gave up; says why.
  """
  n, f = pairs.gap.shape
  wanted = pairs.margin - pairs.lead
  constraints = scipy.sparse.hstack(
    [scipy.sparse.csr_array(-pairs.gap), -scipy.sparse.eye_array(n)]
  )
  found = scipy.optimize.linprog(
    np.concatenate([np.zeros(f), np.full(n, 1.0 / n)]),
    A_ub=constraints.tocsr(),
    b_ub=-wanted,
    bounds=[(None, None)] * f + [(0, None)] * n,
    method="highs",
  )
  if found.status != 0:
    raise ValueError(f"the linear program has no answer: {found.message}")
  return found.x[:f], float(found.fun)


def measure(weights: Float[np.ndarray, " f"], pairs: Pairs) -> dict[str, float]:
  """What the weights make of some pairs.

  Returns:
    `pairs`; `loss`: mean hinge; `clipped`: share of pairs that lead by their
    margin, so that the loss does not see them; `pair_error`: share in the wrong
    order, ties half; `pair_error_helpfulness`: by helpfulness alone.
  """
  if not len(pairs.gap):
    return {"pairs": 0.0}
  ahead = pairs.lead + pairs.gap @ np.asarray(weights, np.float64)
  short = np.maximum(0.0, pairs.margin - ahead)

  def error(difference: np.ndarray) -> float:
    zeros = np.zeros_like(difference)
    return 1.0 - float(metrics.preference_accuracy(difference, zeros))

  return {
    "pairs": float(len(short)),
    "loss": float(short.mean()),
    "clipped": float((short == 0).mean()),
    "pair_error": error(ahead),
    "pair_error_helpfulness": error(pairs.lead),
  }
