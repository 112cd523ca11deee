"""From episode rewards, costs and critics to one advantage per token.

Masks are 1 at the tokens of the response, which are contiguous, and 0 at
prompt and padding; what stands there enters nothing, not even when it is NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def per_token(
  reward: Float[Array, " n"],
  kl: Float[Array, "n l"],
  mask: Float[Array, "n l"],
  *,
  kl_coefficient: float,
  clip: float,
) -> Float[Array, "n l"]:
  """The episode's reward on its last token, the KL penalty on every token.

  `clip(kl_coefficient kl_t + 1[t = last] R, -clip, clip)`. The coefficient
  carries the sign: -beta for the reward, +beta for every cost. After `mix` the
  penalty is then `(-beta - beta sum lam) / (1 + sum lam) = -beta` for all lam,
  as long as the clip cuts nothing.

  Source: Safe RLHF (arXiv:2310.12773), with the whole of beta in each as in its
  released code; the paper writes half of it.

  Args:
    reward: of the episode, or its cost for one constraint (vmap over k).
    kl: `log pi_old - log pi_ref` of the sampled tokens, nats.
    mask: 1 at response tokens. A row without any has no last token, so its
      reward goes nowhere; it weighs 0 in every loss too.
    kl_coefficient: reward per nat.
    clip: bound on the sum, in units of reward.

  Returns:
    Rewards of tokens; 0 where the mask is 0.
  """
  after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  last = (mask > 0) & (after <= 0)
  given = jnp.where(last, reward[:, None].astype(jnp.float32), 0.0)
  penalty = kl_coefficient * jnp.where(mask > 0, kl.astype(jnp.float32), 0.0)
  return jax.lax.stop_gradient(jnp.clip(penalty + given, -clip, clip))


def gae(
  rewards: Float[Array, "n l"],
  values: Float[Array, "n l"],
  mask: Float[Array, "n l"],
  *,
  discount: float,
  gae_lambda: float,
) -> tuple[Float[Array, "n l"], Float[Array, "n l"]]:
  """Generalised advantage estimation over the response.

  `delta_t = u_t + discount V_{t+1} - V_t`, `A_t = delta_t + discount
  gae_lambda A_{t+1}`, `G_t = A_t + V_t`; V after the last response token is 0.

  Source: Schulman et al. 2016 (arXiv:1506.02438), eq. 16.

  Args:
    rewards: of tokens, see `per_token`; for costs vmap over k.
    values: the critic's V before each token is chosen, in the same units.
    mask: 1 at response tokens, contiguous.
    discount: per token; 1 = none.
    gae_lambda: 0 trusts the critic, 1 the returns.

  Returns:
    (advantages, returns), both without gradient, 0 where the mask is 0.
  """
  live = mask > 0
  u = jnp.where(live, jax.lax.stop_gradient(rewards).astype(jnp.float32), 0.0)
  v = jnp.where(live, jax.lax.stop_gradient(values).astype(jnp.float32), 0.0)
  ahead = jnp.pad(v[:, 1:], ((0, 0), (0, 1)))
  delta = jnp.where(live, u + discount * ahead - v, 0.0)

  def back(a: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
    error, here = at
    a = jnp.where(here, error + discount * gae_lambda * a, 0.0)
    return a, a

  start = jnp.zeros_like(delta[:, 0])
  _, a = jax.lax.scan(back, start, (delta.T, live.T), reverse=True)
  return a.T, a.T + v


def mix(
  reward_advantages: Float[Array, "n l"],
  cost_advantages: Float[Array, "n l k"],
  lam: Float[Array, " k"],
  *,
  observed: Float[Array, "n k"] | None = None,
  judged: float = 1.0,
) -> Float[Array, "n l"]:
  """Advantage of the Lagrangian: `(A_r - sum_k lam_k A_ck) / (1 + sum lam)`.

  Both sums run over the constraints that the episode was judged by: only so
  does the KL penalty net to -beta in every row (see `per_token`).

  Where those were drawn at random (`judged` below 1), they stand for all: each
  weighs `lam_k / judged`, and the divisor is that of all. Then the mean over
  the draws is the Lagrangian, KL penalty included. A divisor of each row's own
  would not do: a constraint judged in one row of 50 could never weigh more
  than those 50 rows' reward, however large its multiplier.

  Source: Safe RLHF (arXiv:2310.12773), its update of the actor, with k costs.

  Args:
    reward_advantages: of the reward.
    cost_advantages: of each cost; a cost is bad when large.
    lam: multipliers, reward per unit of cost, >= 0.
    observed: 1 where an episode was judged by a constraint; None = by all.
    judged: chance of that, if a draw decided; 1: no draw did, and what did not
      judge an episode does not hold for it.

  Returns:
    Advantages in units of reward, without gradient.
  """
  n, _, k = cost_advantages.shape
  seen = jnp.ones((n, k)) if observed is None else observed
  weight = jnp.where(seen > 0, lam / judged, 0.0)  # [n k]
  costs = jnp.where(seen[:, None] > 0, cost_advantages, 0.0)
  # Summed in float32 on every device: TPUs would round a product to bfloat16.
  priced = jnp.einsum("nlk,nk->nl", costs, weight, precision="highest")
  total = weight.sum(-1)[:, None] if judged == 1.0 else lam.sum()
  mixed = (reward_advantages - priced) / (1.0 + total)
  return jax.lax.stop_gradient(mixed)


def whiten(
  advantages: Float[Array, "n l"], mask: Float[Array, "n l"]
) -> Float[Array, "n l"]:
  """Mean 0 and standard deviation 1 over the tokens that count.

  For mixed advantages alone: whitening A_r and A_c apart would rescale lam
  behind its back. It cancels the division by `1 + sum lam`, where that is the
  same in all rows. Safe RLHF's released code does not whiten.

  Args:
    advantages: of `mix`.
    mask: 1 at tokens that count.

  Returns:
    `(A - mean) / (std + 1e-8)` at those tokens, else 0; no unit.
  """
  live = mask > 0
  a = jnp.where(live, jax.lax.stop_gradient(advantages), 0.0)
  count = jnp.maximum(live.sum(), 1)
  centred = jnp.where(live, a - a.sum() / count, 0.0)
  std = jnp.sqrt(jnp.square(centred).sum() / count)
  return centred / (std + 1e-8)
