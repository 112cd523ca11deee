"""Losses: pure functions of arrays, float32, each a `Mean` of nats.

Labels are 1 where the response complies, everywhere. Every function
takes weights in which 0 marks padding, and lets neither the value nor the
gradient of a padded entry through, not even when that entry is NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from csrm_jax.types import PAIR_KINDS, Batch, Mean

# The terms of a mixed batch, in the order of the log.
TERMS = ("calibration", *PAIR_KINDS)


def clip_temperature(temperature: Float[Array, "..."] | float) -> Array:
  """Bradley-Terry temperatures stay in [0.25, 8] log-odds, learned or not."""
  return jnp.clip(jnp.asarray(temperature, jnp.float32), 0.25, 8.0)


def weighted(nats: Float[Array, "..."], weight: Float[Array, "..."]) -> Mean:
  """Sums; weight is stopped, so that nobody trains on it by accident."""
  weight = jax.lax.stop_gradient(weight).astype(jnp.float32)
  return Mean(jnp.sum(weight * nats), jnp.sum(weight))


def counted(
  x: Float[Array, "..."], weight: Float[Array, "..."]
) -> Float[Array, "..."]:
  """First half of the double `where`: padded entries become 0 up front."""
  return jnp.where(weight > 0, x.astype(jnp.float32), 0.0)


def calibration(
  logits: Float[Array, "b s"],
  label: Float[Array, "b s"],
  weight: Float[Array, "b s"],
  *,
  label_smoothing: float = 0.0,
  focal: float = 0.0,
  brier: float = 0.0,
) -> Mean:
  """Binary cross-entropy of compliance, with three options.

  BCE is `softplus(z) - y z`, gradient `sigmoid(z) - y`. Label smoothing pulls
  the label to `y (1 - eps) + eps / 2`. Focal (Lin et al. 2017,
  arXiv:1708.02002, eq. 4) multiplies each class's term by the probability of
  the other class to the power `focal`; Brier adds `brier (sigmoid(z) - y)^2`.
  The first two bias calibration: refit the temperature after either.

  Args:
    logits: log-odds of compliance.
    label: probability of compliance; 1 = complies.
    weight: examples each label stands for; 0 marks padding.
    label_smoothing: eps in [0, 1).
    focal: exponent, 0 = plain cross-entropy.
    brier: weight of the squared error; vanishes at confident mistakes, so it
      is only ever added.

  Returns:
    Mean of nats per label (with `brier`, nats + weighted squared error).
  """
  z, y = counted(logits, weight), counted(label, weight)
  smooth = y * (1.0 - label_smoothing) + label_smoothing / 2
  if focal:
    # sigmoid(-z)^g as exp(-g softplus(z)): no 0^(g-1) in the gradient.
    safe = jnp.exp(-focal * jax.nn.softplus(z)) * jax.nn.softplus(-z)
    unsafe = jnp.exp(-focal * jax.nn.softplus(-z)) * jax.nn.softplus(z)
    nats = smooth * safe + (1.0 - smooth) * unsafe
  else:
    nats = jax.nn.softplus(z) - smooth * z
  if brier:
    nats = nats + brier * jnp.square(jax.nn.sigmoid(z) - y)
  return weighted(nats, weight)


def brier_score(
  logits: Float[Array, "b s"],
  label: Float[Array, "b s"],
  weight: Float[Array, "b s"],
) -> Mean:
  """Mean squared error of the compliance probability."""
  z, y = counted(logits, weight), counted(label, weight)
  return weighted(jnp.square(jax.nn.sigmoid(z) - y), weight)


def bradley_terry(
  rewards: Float[Array, "b s"],
  pairs: Int[Array, "b p 2"],
  weight: Float[Array, "b p"],
  *,
  margin: Float[Array, "b p"] | float = 0.0,
  temperature: Float[Array, ""] | float = 1.0,
  smoothing: float = 0.0,
) -> Mean:
  """Negative log-likelihood that the preferred segment wins each pair.

  `softplus(-(r_w - r_l - m) / tau)`. Over spec pairs the lenient spec is the
  winner, the strict one the loser.

  Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.

  Args:
    rewards: log-odds that each segment complies with its spec.
    pairs: slots of the (preferred, rejected) segments, both in the same row.
    weight: examples each pair stands for; 0 marks padding.
    margin: log-odds by which the winner must lead.
    temperature: log-odds, clipped to [0.25, 8].
    smoothing: probability that the preference is recorded the wrong way.

  Returns:
    Mean of nats per pair: (weighted sum of nats, sum of weights).

  Slots out of range are not detected here; `data/trie.py` rules them out.
  """
  r = jnp.take_along_axis(rewards[:, None, :], pairs, axis=-1)  # [b p 2]
  lead = counted(r[..., 0] - r[..., 1], weight)
  lead = (lead - counted(jnp.broadcast_to(margin, lead.shape), weight)) / (
    clip_temperature(temperature)
  )
  nats = jax.nn.softplus(-lead)
  if smoothing:
    nats = (1.0 - smoothing) * nats + smoothing * jax.nn.softplus(lead)
  return weighted(nats, weight)


def severity_order(
  rewards: Float[Array, "b k"],
  weight: Float[Array, "b k"],
  *,
  margin: float = 0.0,
) -> Mean:
  """Every milder rung of a ladder should beat every more severe one.

  `mean over i < j of softplus(-(z_j - z_i - m))`: a ladder counts once however
  long it is. `data/trie.py` unrolls ladders into `severity` pairs of weight
  2 / (K (K - 1)), for which `bradley_terry` gives the same number.

  Args:
    rewards: log-odds; each row one ladder, most severe rung first.
    weight: 1 for a rung, 0 for padding.
    margin: log-odds between any two rungs.

  Returns:
    Mean of nats per ladder; ladders with fewer than two rungs do not count.
  """
  z = counted(rewards, weight)
  present = (weight > 0).astype(jnp.float32)
  k = rewards.shape[-1]
  order = jnp.triu(jnp.ones((k, k), jnp.float32), 1)
  both = present[:, :, None] * present[:, None, :] * order  # [b k k]
  nats = jax.nn.softplus(-(z[:, None, :] - z[:, :, None] - margin)) * both
  count = both.sum((-2, -1))
  per_ladder = nats.sum((-2, -1)) / jnp.where(count > 0, count, 1.0)
  return weighted(per_ladder, (count > 0).astype(jnp.float32))


def verbaliser(
  logits: Float[Array, "b s v"],
  *,
  safe: tuple[int, ...],
  unsafe: tuple[int, ...],
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
  """Reads compliance off the vocabulary at the answer position.

  Source: CSRM (arXiv:2605.30487): two sets of tokens stand for the verdicts.

  Args:
    logits: next-token logits at each readout.
    safe: ids of the words for "complies".
    unsafe: ids of the words for "violates"; disjoint from `safe`.

  Returns:
    (log-odds of compliance, log of the probability mass on both sets). The
    second's complement, 1 - exp, is the leak to other tokens.
  """
  u = logits.astype(jnp.float32)
  good = jax.nn.logsumexp(u[..., jnp.array(safe)], axis=-1)
  bad = jax.nn.logsumexp(u[..., jnp.array(unsafe)], axis=-1)
  everything = jax.nn.logsumexp(u, axis=-1)
  return good - bad, jnp.logaddexp(good, bad) - everything


def verbaliser_cross_entropy(
  logits: Float[Array, "b s v"],
  label: Float[Array, "b s"],
  weight: Float[Array, "b s"],
  *,
  safe: tuple[int, ...],
  unsafe: tuple[int, ...],
) -> Mean:
  """Full-vocabulary cross-entropy of the verdict words.

  `-logsumexp(logp[A_y])`, which is BCE of the log-odds minus the log mass on
  both sets: the second part teaches the answer format.

  Source: CSRM (arXiv:2605.30487).

  Returns:
    Mean of nats per label.
  """
  known = counted(logits, weight[..., None])
  z, log_mass = verbaliser(known, safe=safe, unsafe=unsafe)
  bce = calibration(z, label, weight)
  leak = weighted(-log_mass, weight)
  return Mean(bce.total + leak.total, bce.weight)


def safe_rlhf_cost(
  costs: Float[Array, "b s"],
  sign: Float[Array, "b s"],
  pairs: Int[Array, "b p 2"],
  weight: Float[Array, "b p"],
  *,
  regulariser: float = 0.0,
) -> Mean:
  """The cost model's loss: order of a pair and the sign of both its costs.

  With `c = -z` and `y = (1 - k) / 2` it equals Bradley-Terry on z plus BCE of
  both segments, so zero is the border between safe and unsafe.

  Source: Dai et al. 2023 (arXiv:2310.12773), eq. 4.

  Args:
    costs: minus the log-odds of compliance.
    sign: +1 harmful, -1 harmless.
    pairs: slots of (safer, more harmful) in the same row.
    weight: examples each pair stands for; 0 marks padding.
    regulariser: weight of the pair's mean squared cost; the paper's code
      uses 0.001.

  Returns:
    Mean of nats per pair (three terms each).
  """

  def of_pairs(x: Array) -> Array:
    both = jnp.take_along_axis(x[:, None, :], pairs, axis=-1)
    return counted(both, weight[..., None])

  c, k = of_pairs(costs), of_pairs(sign)
  order = jax.nn.softplus(-(c[..., 1] - c[..., 0]))
  nats = order + jax.nn.softplus(-k * c).sum(-1)
  nats = nats + regulariser * jnp.square(c).mean(-1)
  return weighted(nats, weight)


def mixed(
  readouts: Float[Array, "b s 2"],
  batch: Batch,
  *,
  label_smoothing: float = 0.0,
  focal: float = 0.0,
  brier: float = 0.0,
  temperature: Float[Array, ""] | float = 1.0,
  pair_smoothing: float = 0.0,
  log_mass: Float[Array, "b s"] | None = None,
) -> dict[str, Mean]:
  """Every term of a mixed batch, each with its own weight, none divided yet.

  Args:
    readouts: column 0 the log-odds of compliance z, column 1 helpfulness h.
    batch: packed rows; `help` pairs compare h, all other pairs z.
    label_smoothing: of the calibration term.
    focal: of the calibration term.
    brier: of the calibration term.
    temperature: of every Bradley-Terry term, log-odds.
    pair_smoothing: of every Bradley-Terry term.
    log_mass: verbaliser head only: log mass on the verdict words, whose
      negative joins the calibration term.

  Returns:
    A Mean for each name in `TERMS`. Add them over micro-batches and shards,
    or divide by `weights_of` the whole batch: see `total`.
  """
  z, h = readouts[..., 0], readouts[..., 1]
  terms = {
    "calibration": calibration(
      z,
      batch.label,
      batch.label_weight,
      label_smoothing=label_smoothing,
      focal=focal,
      brier=brier,
    )
  }
  if log_mass is not None:
    leak = weighted(-counted(log_mass, batch.label_weight), batch.label_weight)
    bce = terms["calibration"]
    terms["calibration"] = Mean(bce.total + leak.total, bce.weight)
  for index, kind in enumerate(PAIR_KINDS):
    terms[kind] = bradley_terry(
      h if kind == "help" else z,
      batch.pair,
      jnp.where(batch.pair_kind == index, batch.pair_weight, 0.0),
      margin=batch.pair_margin,
      temperature=temperature,
      smoothing=pair_smoothing,
    )
  return terms


def weights_of(batch: Batch) -> dict[str, Float[Array, ""]]:
  """The weight `mixed` will give each term, known before any forward pass."""
  weights = {"calibration": jnp.sum(batch.label_weight).astype(jnp.float32)}
  for index, kind in enumerate(PAIR_KINDS):
    of_kind = jnp.where(batch.pair_kind == index, batch.pair_weight, 0.0)
    weights[kind] = jnp.sum(of_kind).astype(jnp.float32)
  return weights


def total(
  terms: dict[str, Mean],
  *,
  weights: dict[str, float],
  denominators: dict[str, Float[Array, ""]] | None = None,
) -> Float[Array, ""]:
  """The scalar to differentiate: sum over terms of weight x total / count.

  With `denominators = weights_of(whole batch)` the results of micro-batches
  and shards are parts of one loss: they and their gradients add up exactly.

  Args:
    terms: of `mixed`, over all rows or some of them.
    weights: coefficient of each term; a term left out counts 0.
    denominators: global weight of each term; default: the terms' own.

  Returns:
    Nats, weighted. A term with no entries contributes 0.

  Raises:
    ValueError: a weight names a term that does not exist.
  """
  unknown = sorted(set(weights) - set(terms))
  if unknown:
    raise ValueError(
      f"loss weight for {unknown[0]!r}: no such term; use one of "
      f"{', '.join(terms)}"
    )
  result = jnp.zeros((), jnp.float32)
  for name, weight in weights.items():
    count = terms[name].weight if denominators is None else denominators[name]
    share = terms[name].total / jnp.where(count > 0, count, 1.0)
    result = result + weight * share
  return result
