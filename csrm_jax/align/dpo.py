"""Direct preference optimisation: DPO and IPO on log-probabilities of pairs.

Spec-conditional training is a matter of data: the spec stands in the system
turn of the prompt, and pairs come from the contract or from `distill.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from csrm_jax.losses import counted, weighted
from csrm_jax.types import Mean

Pairs = Float[Array, " n"]  # a number for each pair


def response_logprob(
  logprobs: Float[Array, "n l"], mask: Float[Array, "n l"]
) -> Float[Array, " n"]:
  """Log-probability of each response: the sum over its tokens, nats.

  Args:
    logprobs: of each token given those before it.
    mask: 1 on the tokens of the response, 0 on prompt and padding.
  """
  return jnp.sum(counted(logprobs, mask), -1)


def implicit_reward(
  logprob: Pairs, reference: Pairs, *, beta: float
) -> Float[Array, " n"]:
  """The reward under which this policy is optimal: beta log(pi / pi_ref).

  Up to a constant of the prompt. Source: Rafailov et al. 2023
  (arXiv:2305.18290), eq. 5.
  """
  return beta * (logprob - reference)


def lead(
  chosen: Pairs,
  rejected: Pairs,
  chosen_reference: Pairs,
  rejected_reference: Pairs,
  weight: Pairs,
  *,
  beta: float,
) -> Float[Array, " n"]:
  """u: implicit reward of the chosen response less that of the rejected.

  Args:
    chosen: log-probability under the policy, summed over tokens, nats.
    rejected: the same of the rejected response.
    chosen_reference: the same under the frozen reference.
    rejected_reference: the same.
    weight: 0 marks padding, whose u is 0.
    beta: reward per nat.
  """
  chosen, chosen_reference, rejected, rejected_reference = (
    counted(x, weight)
    for x in (chosen, chosen_reference, rejected, rejected_reference)
  )
  return implicit_reward(chosen, chosen_reference, beta=beta) - implicit_reward(
    rejected, rejected_reference, beta=beta
  )


def dpo(
  chosen: Pairs,
  rejected: Pairs,
  chosen_reference: Pairs,
  rejected_reference: Pairs,
  weight: Pairs,
  *,
  beta: float,
  label_smoothing: float = 0.0,
) -> Mean:
  """`softplus(-u)`: the chosen response wins by its implicit reward.

  Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; smoothing: Mitchell
  2023, "A note on DPO with noisy preferences", `(1 - eps) softplus(-u) + eps
  softplus(u)`, whose optimum is `u = log((1 - eps) / eps)`.

  Args:
    chosen: log-probability under the policy, summed over tokens, nats.
    rejected: the same of the rejected response.
    chosen_reference: the same under the frozen reference.
    rejected_reference: the same.
    weight: pairs that each stands for; 0 marks padding.
    beta: reward per nat.
    label_smoothing: probability that a pair is recorded the wrong way.

  Returns:
    Mean of nats per pair.
  """
  u = lead(
    chosen,
    rejected,
    chosen_reference,
    rejected_reference,
    weight,
    beta=beta,
  )
  nats = (1.0 - label_smoothing) * jax.nn.softplus(-u)
  return weighted(nats + label_smoothing * jax.nn.softplus(u), weight)


def ipo(
  chosen: Pairs,
  rejected: Pairs,
  chosen_reference: Pairs,
  rejected_reference: Pairs,
  weight: Pairs,
  *,
  beta: float,
) -> Mean:
  """`(u / beta - 1 / (2 beta))^2`: a lead of 1 / (2 beta) nats, no more.

  Unlike DPO it has a finite optimum on pairs that are always ordered alike.
  Source: Azar et al. 2023 (arXiv:2310.12036), tau = beta.

  Args:
    chosen: as for `dpo`.
    rejected: as for `dpo`.
    chosen_reference: as for `dpo`.
    rejected_reference: as for `dpo`.
    weight: as for `dpo`.
    beta: strength of the pull to the reference; positive.

  Returns:
    Mean of squared nats per pair.
  """
  log_ratio = lead(
    chosen,
    rejected,
    chosen_reference,
    rejected_reference,
    weight,
    beta=1.0,
  )
  return weighted(jnp.square(log_ratio - 0.5 / beta), weight)


def accuracy(u: Pairs, weight: Pairs) -> Mean:
  """Share of pairs whose chosen response has the higher implicit reward.

  Ties count half. `u` as `lead` gives it.
  """
  u = jnp.where(weight > 0, u, 0.0)
  return weighted((jnp.sign(u) + 1.0) / 2.0, weight)
