"""Advantages without a critic: REINFORCE++, GRPO, RLOO, under constraints.

Rewards are larger-is-better, costs smaller-is-better, one an episode. Every
advantage is stopped: no gradient runs into a reward model through it. Padded
episodes (weight or mask 0) count for nothing, not even when they are NaN.

Under constraints the advantages of reward and costs, each about its own
baseline, are mixed to `(A_r - sum_k lam_k A_ck) / (1 + sum_k lam_k)`, and the
mixture is scaled by its own standard deviation: scaling reward and costs
apart would silently change every lam (and cancels the divisor, which then
matters for `scale="none"` alone). The divisor is the same for all episodes,
also for those on which a constraint was not observed: there its advantage is
0, as for an episode of average cost.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from csrm_jax.align import advantages as advantage

SCALES = ("group", "batch", "none")


def groups_of(prompts: int, samples: int) -> Int[Array, " n"]:
  """The group of each episode where each prompt has `samples` in a row."""
  return jnp.repeat(jnp.arange(prompts), samples)


def centred(
  values: Float[Array, "n k"],
  group: Int[Array, " n"],
  observed: Float[Array, "n k"],
  *,
  leave_one_out: bool = False,
) -> Float[Array, "n k"]:
  """Values less the mean of their group, column by column.

  Args:
    values: rewards or costs.
    group: episodes of one prompt share a number; any integers.
    observed: 1 where a value is known, else 0.
    leave_one_out: the baseline is the mean of the others instead (RLOO),
      which is the plain one times `s / (s - 1)` for s observed members.

  Returns:
    0 where nothing was observed, and for the only one observed of its group:
    it has no baseline.
  """
  known = (observed > 0).astype(jnp.float32)
  same = (group[:, None] == group[None, :]).astype(jnp.float32)

  def mean(x: Array) -> Array:
    # Full precision: bfloat16 products would leave a bias in every baseline.
    total = jnp.matmul(same, x, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.where(count > 0, count, 1.0)

  count = jnp.matmul(same, known, precision=jax.lax.Precision.HIGHEST)
  x = jnp.where(observed > 0, values.astype(jnp.float32), 0.0)
  # Twice: the second pass takes away the rounding of the first mean, which a
  # group of equal rewards would otherwise scale up to a signal.
  for _ in range(2):
    x = (x - mean(x)) * known
  if leave_one_out:
    x = x * count / jnp.where(count > 1, count - 1.0, 1.0)
  return jax.lax.stop_gradient(x)


def lagrangian(
  reward: Float[Array, " n"],
  costs: Float[Array, "n k"],
  lam: Float[Array, " k"],
  group: Int[Array, " n"],
  *,
  weight: Float[Array, " n"] | None = None,
  observed: Float[Array, "n k"] | None = None,
  leave_one_out: bool = False,
  scale: str = "group",
  eps: float = 1e-4,
) -> Float[Array, " n"]:
  """Group advantages of the Lagrangian: GRPO or RLOO under k constraints.

  Args:
    reward: of each episode.
    costs: of each episode under each constraint.
    lam: multipliers, not negative.
    group: episodes of one prompt share a number.
    weight: 0 marks a padded episode; default: all count.
    observed: 1 where the constraint was judged on the episode; default: all.
    leave_one_out: baseline of RLOO instead of the group's mean.
    scale: divide the mixture by its standard deviation in each "group", in
      the "batch", or by "none".
    eps: added to the standard deviation.

  Returns:
    One advantage an episode, mean 0 in each group; 0 for padding.

  Raises:
    ValueError: an unknown `scale`.
  """
  if scale not in SCALES:
    raise ValueError(f"scale {scale!r}: use one of {', '.join(SCALES)}")
  present = jnp.ones_like(reward) if weight is None else weight
  seen = jnp.ones_like(costs) if observed is None else observed
  seen = seen * (present > 0)[:, None]
  of_reward = centred(
    reward[:, None], group, present[:, None], leave_one_out=leave_one_out
  )[:, 0]
  of_costs = centred(costs, group, seen, leave_one_out=leave_one_out)
  lam = jax.lax.stop_gradient(lam)
  mixed = (of_reward - jnp.sum(of_costs * lam, -1)) / (1.0 + jnp.sum(lam))
  if scale == "none":
    return mixed
  counted = (present > 0).astype(jnp.float32)
  whole = jnp.zeros_like(group) if scale == "batch" else group
  same = (whole[:, None] == whole[None, :]).astype(jnp.float32)
  # The mixture's mean is 0 in every group, so its mean square is its variance.
  both = jnp.stack([jnp.square(mixed), counted], -1)
  square, count = jnp.matmul(same, both, precision=jax.lax.Precision.HIGHEST).T
  deviation = jnp.sqrt(square / jnp.where(count > 0, count, 1.0))
  return mixed / (deviation + eps)


def grpo(
  reward: Float[Array, " n"],
  group: Int[Array, " n"],
  *,
  weight: Float[Array, " n"] | None = None,
  scale: str = "group",
  eps: float = 1e-4,
) -> Float[Array, " n"]:
  """Reward less its group's mean, over its group's standard deviation.

  The deviation is that of the group itself (divided by s, not s - 1).

  Source: Shao et al. 2024 (arXiv:2402.03300).
  """
  none = jnp.zeros((reward.shape[0], 0), jnp.float32)
  return lagrangian(
    reward,
    none,
    jnp.zeros(0, jnp.float32),
    group,
    weight=weight,
    scale=scale,
    eps=eps,
  )


def rloo(
  reward: Float[Array, " n"],
  group: Int[Array, " n"],
  *,
  weight: Float[Array, " n"] | None = None,
) -> Float[Array, " n"]:
  """Reward less the mean reward of the other samples of its prompt.

  Source: Ahmadian et al. 2024 (arXiv:2402.14740).
  """
  one = jnp.ones_like(reward) if weight is None else weight
  return centred(reward[:, None], group, one[:, None], leave_one_out=True)[:, 0]


def to_tokens(
  advantages: Float[Array, " n"], mask: Float[Array, "n l"]
) -> Float[Array, "n l"]:
  """The episode's advantage on each of its response tokens, 0 elsewhere."""
  return jnp.where(mask > 0, advantages[:, None], 0.0)


def reinforce_plus_plus(
  reward: Float[Array, " n"],
  kl: Float[Array, "n l"],
  mask: Float[Array, "n l"],
  *,
  kl_coefficient: float,
  costs: Float[Array, "n k"] | None = None,
  lam: Float[Array, " k"] | None = None,
  observed: Float[Array, "n k"] | None = None,
  whiten: bool = True,
) -> Float[Array, "n l"]:
  """Reward less the KL penalty still to come, whitened over the batch.

  `A_t = R - beta sum_{i >= t} kl_i`, then less the mean of all response tokens
  and over their standard deviation. With costs, R is the mixture
  `(R - sum_k lam_k (C_k - mean C_k)) / (1 + sum_k lam_k)`, the mean taken over
  the episodes on which constraint k was observed, so that one not judged
  counts as average, not as free; the penalty stays beta for every lam.

  Source: Hu 2025 (arXiv:2501.03262); CSRM (arXiv:2605.30487), whose printed
  sum starts at 1.

  Args:
    reward: of each episode.
    kl: log-ratio of policy to reference at each token, nats (k1 estimate).
    mask: 1 on response tokens; an episode without any is padding.
    kl_coefficient: beta, reward per nat.
    costs: of each episode under each constraint; with `lam`.
    lam: multipliers, not negative.
    observed: 1 where the constraint was judged; default: all.
    whiten: False leaves the advantages as they are.

  Returns:
    An advantage on each response token, 0 elsewhere.

  Raises:
    ValueError: costs without multipliers, or multipliers without costs.
  """
  if (costs is None) != (lam is None):
    given = "lam" if costs is None else "costs"
    raise ValueError(f"{given} alone: give costs and lam, or neither")
  present = jnp.any(mask > 0, -1)
  total = jnp.where(present, reward.astype(jnp.float32), 0.0)
  if costs is not None and lam is not None:
    seen = jnp.ones_like(costs) if observed is None else observed
    of_costs = centred(
      costs, jnp.zeros(len(costs), jnp.int32), seen * present[:, None]
    )
    total = (total - jnp.sum(of_costs * lam, -1)) / (1.0 + jnp.sum(lam))
  penalty = jnp.where(mask > 0, kl.astype(jnp.float32), 0.0)
  ahead = jnp.cumsum(penalty[:, ::-1], -1)[:, ::-1]
  advantages = to_tokens(total, mask) - kl_coefficient * ahead
  if whiten:
    advantages = advantage.whiten(advantages, mask)
  return jax.lax.stop_gradient(jnp.where(mask > 0, advantages, 0.0))
