"""Costs of episodes and limits on them, as rates or on the logit scale."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FORMS = ("rate", "logit")


def costs_of(log_odds: Float[Array, "n k"], *, form: str) -> Array:
  """Costs of episodes from calibrated log-odds that they comply.

  Args:
    log_odds: temperature included, as `csrm.score` gives them.
    form: "rate", cost = P(violation), bounded and a true expected rate; or
      "logit", cost = minus the log-odds, which keeps its slope far from 0.

  Returns:
    [n k]; probabilities or log-odds of a violation.

  Raises:
    ValueError: another form.
  """
  return jax.nn.sigmoid(-log_odds) if _is_rate(form) else -log_odds


def limits_of(rates: Float[Array, " k"], *, form: str) -> Array:
  """Limits in the units of `costs_of`, from wanted violation rates in (0, 1).

  Raises:
    ValueError: a form other than "rate" and "logit", or a rate outside (0, 1);
      so call it outside jit.
  """
  bad = np.flatnonzero(~((np.asarray(rates) > 0) & (np.asarray(rates) < 1)))
  if bad.size:
    raise ValueError(
      f"limit of constraint {bad[0]}: {float(rates[bad[0]])}: must be a rate "
      "between 0 and 1, both excluded; e.g. 0.05 allows 5 % violations"
    )
  return rates if _is_rate(form) else jnp.log(rates) - jnp.log1p(-rates)


def _is_rate(form: str) -> bool:
  if form not in FORMS:
    raise ValueError(
      f"form of costs and limits: {form!r}: use 'rate' or 'logit'"
    )
  return form == "rate"
