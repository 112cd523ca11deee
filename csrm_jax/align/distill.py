"""One reward out of compliance and helpfulness, and its distillation.

`compose` makes the scalar that a policy is trained on, `choose_pairs` picks
good and bad samples by it, and `distillation` regresses the policy's log-ratio
of each pair on the difference of their log rewards.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from csrm_jax.align import dpo
from csrm_jax.align.limits import costs_of
from csrm_jax.losses import counted, weighted
from csrm_jax.types import Mean

MODES = ("product", "log_product", "lagrangian", "shaped", "rbr")


def compliance(
  z: Float[Array, "*n"],
  *,
  a: float = 1.0,
  b: float = 0.0,
  temperature: float = 1.0,
) -> Float[Array, "*n"]:
  """`(a z + b) / T`, log-odds: the sigmoid of it is the reward R.

  Sweeping a and b traces the front of safety and helpfulness without another
  training of the judge. Source: CSRM (arXiv:2605.30487).
  """
  return (a * z.astype(jnp.float32) + b) / temperature


def compose(
  z: Float[Array, "n k"],
  h: Float[Array, " n"],
  mode: str,
  *,
  a: float = 1.0,
  b: float = 0.0,
  temperature: float = 1.0,
  lam: Float[Array, " k"] | None = None,
  form: str = "rate",
  features: Float[Array, "n f"] | None = None,
  coefficients: Float[Array, " f"] | None = None,
) -> Float[Array, " n"]:
  """One reward for each response, larger is better.

  With `s = (a z + b) / T`, `R = prod_k sigmoid(s_k)`, `H = sigmoid(h)`, both in
  (0, 1), and costs `C_k` of s_k:

  - "product": R H (CSRM, arXiv:2605.30487), in (0, 1);
  - "log_product": log R + log H, nats, exact where R H underflows;
  - "lagrangian": `(h - sum_k lam_k C_k) / (1 + sum_k lam_k)` (Safe RLHF,
    arXiv:2310.12773);
  - "shaped": `h - sum_k lam_k C_k`, with fixed lam;
  - "rbr": `h + features @ coefficients` (arXiv:2411.01111); z, or any function
    of it, may be a column of the features.

  Args:
    z: log-odds of compliance with each of k specs.
    h: helpfulness, log-odds.
    mode: of `MODES`.
    a: slope, see `compliance`.
    b: shift, log-odds.
    temperature: T, positive.
    lam: multipliers of the costs, for "lagrangian" and "shaped".
    form: of the costs, see `cost`.
    features: of the response, for "rbr".
    coefficients: of the features, for "rbr".

  Raises:
    ValueError: an unknown mode or form, or one whose arguments are missing.
  """
  if mode not in MODES:
    raise ValueError(f"mode {mode!r}: use one of {', '.join(MODES)}")
  s = compliance(z, a=a, b=b, temperature=temperature)
  helpfulness = h.astype(jnp.float32)
  if mode in ("product", "log_product"):
    total = jax.nn.log_sigmoid(s).sum(-1) + jax.nn.log_sigmoid(helpfulness)
    return jnp.exp(total) if mode == "product" else total
  if mode == "rbr":
    if features is None or coefficients is None:
      raise ValueError("mode 'rbr': give features and coefficients")
    return helpfulness + jnp.sum(features * coefficients, -1)
  if lam is None:
    raise ValueError(f"mode {mode!r}: give lam, one multiplier for each spec")
  shaped = helpfulness - jnp.sum(lam * costs_of(s, form=form), -1)
  return shaped if mode == "shaped" else shaped / (1.0 + jnp.sum(lam))


def choose_pairs(
  scores: Float[Array, "g s"],
  key: PRNGKeyArray,
  *,
  top: int = 5,
  bottom: int = 5,
  pairs: int = 1,
  valid: Float[Array, "g s"] | None = None,
) -> tuple[Int[Array, "g p 2"], Float[Array, "g p"]]:
  """Random pairs of a prompt's best and worst samples, all different.

  Ties are ranked at random. The pairs of a prompt depend on the key, its
  number and its own scores alone. Source: CSRM (arXiv:2605.30487), which takes
  5 and 5 of 100 samples.

  Args:
    scores: of each sample of each prompt, larger is better.
    key: of the draws.
    top: how many of the best take part.
    bottom: how many of the worst.
    pairs: of each prompt.
    valid: 0 marks samples that do not exist; a NaN score is not valid either.

  Returns:
    (numbers of the better and the worse sample, weight). The weight is 0 for a
    prompt with fewer than `top + bottom` valid samples, whose best and worst
    would overlap; its pairs point at sample 0. Count them.

  Raises:
    ValueError: more samples or pairs are asked for than there can be.
  """
  samples = scores.shape[1]
  if top < 1 or bottom < 1 or top + bottom > samples:
    raise ValueError(
      f"top={top}, bottom={bottom} of {samples} samples: give at least 1 each,"
      f" {samples} together at most"
    )
  if not 1 <= pairs <= top * bottom:
    raise ValueError(f"pairs={pairs}: give 1 to top * bottom = {top * bottom}")
  known = ~jnp.isnan(scores)
  if valid is not None:
    known &= valid > 0

  def of_prompt(
    key: PRNGKeyArray, values: Float[Array, " s"], known: Array
  ) -> tuple[Array, Array]:
    tied, drawn = jax.random.split(key)
    toss = jax.random.uniform(tied, values.shape)
    # Not known last, then the best first, then at random.
    order = jnp.lexsort((toss, -jnp.where(known, values, 0.0), ~known))
    count = jnp.sum(known)
    enough = count >= top + bottom
    cell = jax.random.choice(drawn, top * bottom, (pairs,), replace=False)
    good, bad = order[cell // bottom], order[count - 1 - cell % bottom]
    chosen = jnp.where(enough, jnp.stack([good, bad], -1), 0)
    return chosen.astype(jnp.int32), jnp.full(pairs, enough, jnp.float32)

  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scores)))
  return jax.vmap(of_prompt)(keys, scores, known)


def distillation(
  good: Float[Array, " n"],
  bad: Float[Array, " n"],
  good_reference: Float[Array, " n"],
  bad_reference: Float[Array, " n"],
  good_log_reward: Float[Array, " n"],
  bad_log_reward: Float[Array, " n"],
  weight: Float[Array, " n"],
  *,
  beta: float,
) -> Mean:
  """`(log(R+ H+ / (R- H-)) - beta (log rho+ - log rho-))^2`, rho = pi / pi_ref.

  Zero for all pairs exactly where the policy is `pi_ref (R H)^(1 / beta)`,
  normalised. Source: CSRM (arXiv:2605.30487), reward distillation.

  Args:
    good: log-probability of the better response under the policy, summed over
      its tokens, nats (`dpo.response_logprob`).
    bad: the same of the worse response.
    good_reference: the same under the frozen reference.
    bad_reference: the same.
    good_log_reward: log R H of the better response (`compose`,
      "log_product"), nats.
    bad_log_reward: the same of the worse response.
    weight: pairs that each stands for; 0 marks padding.
    beta: nats of reward per nat of log-ratio.

  Returns:
    Mean of squared nats per pair.
  """
  target = counted(good_log_reward, weight) - counted(bad_log_reward, weight)
  lead = dpo.lead(good, bad, good_reference, bad_reference, weight, beta=beta)
  return weighted(jnp.square(jax.lax.stop_gradient(target) - lead), weight)
