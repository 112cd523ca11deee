"""Losses of PPO: clipped policy and value losses, and the ptx term.

Masks are 1 at a token of the response and 0 elsewhere. What stands where the
mask is 0 enters neither value nor gradient, not even when it is NaN. Each loss
is a `Mean` over tokens, so micro-batches and shards add up exactly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from csrm_jax.losses import counted, weighted
from csrm_jax.types import Mean

# A log-ratio beyond this is a broken update, and exp of it would be the batch.
LOG_RATIO_LIMIT = 20.0  # nats


def _ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
  """p_new / p_old of each token; 1 where the mask is 0."""
  old = jax.lax.stop_gradient(old_logprobs)
  log_ratio = counted(logprobs, mask) - counted(old, mask)
  return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def policy_loss(
  logprobs: Float[Array, "n l"],
  old_logprobs: Float[Array, "n l"],
  advantages: Float[Array, "n l"],
  mask: Float[Array, "n l"],
  *,
  clip: float,
) -> Mean:
  """Clipped surrogate `-min(rho A, clip(rho, 1 - clip, 1 + clip) A)`.

  `rho = exp(logprobs - old_logprobs)`, its logarithm held within 20 nats.
  Gradients reach `logprobs` alone.

  Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7.

  Args:
    logprobs: nats, of the sampled tokens under the policy that is trained.
    old_logprobs: nats, under the policy that sampled them.
    advantages: in units of reward; of the Lagrangian, see `advantages.mix`.
    mask: 1 at tokens that count.
    clip: largest useful change of a token's probability, as a share.

  Returns:
    Mean over tokens, in units of reward.
  """
  a = counted(jax.lax.stop_gradient(advantages), mask)
  ratio = _ratio(logprobs, old_logprobs, mask)
  near = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
  return weighted(-jnp.minimum(ratio * a, near * a), mask)


def clip_fraction(
  logprobs: Float[Array, "n l"],
  old_logprobs: Float[Array, "n l"],
  advantages: Float[Array, "n l"],
  mask: Float[Array, "n l"],
  *,
  clip: float,
) -> Mean:
  """Share of tokens at which `policy_loss` is flat because the clip holds.

  That is `rho > 1 + clip` where A > 0 and `rho < 1 - clip` where A < 0. A ratio
  out of range on the other side still has its gradient and is not counted.

  Args and Returns as in `policy_loss`; the Mean is a share of tokens.
  """
  a = counted(jax.lax.stop_gradient(advantages), mask)
  ratio = _ratio(jax.lax.stop_gradient(logprobs), old_logprobs, mask)
  held = ((ratio > 1.0 + clip) & (a > 0)) | ((ratio < 1.0 - clip) & (a < 0))
  return weighted(held.astype(jnp.float32), mask)


def value_loss(
  values: Float[Array, "n l *k"],
  old_values: Float[Array, "n l *k"],
  returns: Float[Array, "n l *k"],
  mask: Float[Array, "n l"] | Float[Array, "n l *k"],
  *,
  clip: float,
) -> Mean:
  """Half the squared error of a critic, the worse of clipped and unclipped.

  `0.5 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2)`. Critics of
  k constraints come with a last axis k; an entry (token, constraint) then
  counts once, so the mean does not grow with k.

  Source: Safe RLHF (arXiv:2310.12773), after Schulman et al. 2017.

  Args:
    values: of the critic that is trained, in units of reward or cost.
    old_values: of the critic at sampling time.
    returns: targets G, see `advantages.gae`.
    mask: 1 at entries that count; without the axis k it holds for every
      constraint, with it a constraint may be judged on some episodes only.
    clip: in the units of the values; `inf` for no clipping.

  Returns:
    Mean over entries, in squared units.
  """
  if mask.ndim < values.ndim:
    mask = jnp.broadcast_to(mask[..., None], values.shape)
  v = counted(values, mask)
  old = counted(jax.lax.stop_gradient(old_values), mask)
  g = counted(jax.lax.stop_gradient(returns), mask)
  near = jnp.clip(v, old - clip, old + clip)
  worse = jnp.maximum(jnp.square(v - g), jnp.square(near - g))
  return weighted(0.5 * worse, mask)


def nll(logprobs: Float[Array, "n l"], mask: Float[Array, "n l"]) -> Mean:
  """Negative log-likelihood of demonstrations: the ptx term.

  Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 2.

  Args:
    logprobs: nats, of the demonstrated tokens.
    mask: 1 at tokens that count.

  Returns:
    Mean of nats per token.
  """
  return weighted(-counted(logprobs, mask), mask)
