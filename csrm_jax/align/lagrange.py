"""Lagrange multipliers of many constraints at once, as pure functions.

Constraint k asks that the mean cost J_k of an episode stay at or below d_k. Its
multiplier lam_k >= 0, the price of its cost, rises while J_k > d_k and falls
below it. J_k is the mean over the last `window` episodes that constraint k
judged, however few episodes of a step those are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jaxtyping import Array, Float, Int

LAM_MIN = float(np.exp(-10.0))


class Multiplier(NamedTuple):
  """All that the multipliers remember; belongs in the checkpoint.

  Costs that a constraint never judged are not in its column: each column of
  `window` is a ring of its own.
  """

  log_lam: Float[Array, " k"]
  opt_state: Any  # of one optimiser a constraint: every leaf leads with k
  window: Float[Array, "w k"]  # costs, oldest overwritten first
  seen: Float[Array, "w k"]  # 1 where `window` holds a cost
  pointer: Int[Array, " k"]  # where the next cost of a constraint goes
  fresh: Float[Array, " k"]  # 1 if judged since the last update
  rejected: Int[Array, " k"]  # costs that were not finite and never entered
  integral: Float[Array, " k"]  # PID alone: its sum, in units of lam
  previous: Float[Array, " k"]  # PID alone: J at the last move
  moves: Int[Array, " k"]  # updates that moved this multiplier
  step: Int[Array, ""]  # updates


def lam(state: Multiplier) -> Float[Array, " k"]:
  """Multipliers, reward per unit of cost."""
  return jnp.exp(state.log_lam)


def init(
  k: int,
  *,
  window: int,
  optimizer: optax.GradientTransformation,
  lam0: float = 1.0,
) -> Multiplier:
  """Multipliers of k constraints, all at `lam0`, before any episode.

  Args:
    k: constraints.
    window: episodes of a constraint that J averages over.
    optimizer: any of optax, as given to `update`; each constraint gets one.
    lam0: reward per unit of cost.

  Raises:
    ValueError: k, window or lam0 is not positive.
  """
  for name, value in (("k", k), ("window", window), ("lam0", lam0)):
    if not value > 0:
      raise ValueError(f"multiplier {name}: {value}: must be above 0")
  log_lam = jnp.full((k,), np.log(lam0), jnp.float32)
  return Multiplier(
    log_lam=log_lam,
    opt_state=jax.vmap(optimizer.init)(log_lam),
    window=jnp.zeros((window, k)),
    seen=jnp.zeros((window, k)),
    pointer=jnp.zeros(k, jnp.int32),
    fresh=jnp.zeros(k),
    rejected=jnp.zeros(k, jnp.int32),
    integral=jnp.full((k,), lam0, jnp.float32),
    previous=jnp.zeros(k),
    moves=jnp.zeros(k, jnp.int32),
    step=jnp.zeros((), jnp.int32),
  )


def observe(
  state: Multiplier,
  costs: Float[Array, "n k"],
  observed: Float[Array, "n k"] | None = None,
) -> Multiplier:
  """Puts the raw costs of n episodes, oldest first, into the windows.

  Args:
    state: as it is.
    costs: of episodes, without KL penalty; NaN and infinities are not entered
      but counted in `rejected`, for one of them would stay in J for a window.
    observed: 1 where a constraint judged an episode; None = everywhere.
  """
  size, k = state.window.shape
  asked = jnp.ones_like(costs) if observed is None else observed
  finite = jnp.isfinite(costs)
  enters = (asked > 0) & finite
  order = jnp.cumsum(enters, axis=0) - 1  # of a cost among its constraint's
  count = jnp.sum(enters, axis=0)
  # Of more costs than the window holds, only the last would survive; writing
  # each place once keeps the scatter free of races.
  stays = enters & (order >= count - size)
  place = jnp.where(stays, (state.pointer + order) % size, size)
  column = jnp.broadcast_to(jnp.arange(k), place.shape)
  return state._replace(
    window=state.window.at[place, column].set(costs, mode="drop"),
    seen=state.seen.at[place, column].set(1.0, mode="drop"),
    pointer=((state.pointer + count) % size).astype(jnp.int32),
    fresh=jnp.maximum(state.fresh, (count > 0).astype(jnp.float32)),
    rejected=state.rejected
    + jnp.sum((asked > 0) & ~finite, axis=0, dtype=jnp.int32),
  )


def judge(
  state: Multiplier, *, pessimism: float = 0.0
) -> tuple[Float[Array, " k"], Float[Array, " k"], Float[Array, " k"]]:
  """(mean cost, J that the limit is compared with, costs in the window).

  J is the mean or, with `pessimism` p, Student's one-sided upper bound
  `mean + t_p(m - 1) s / sqrt(m)` over the m costs of the window.

  Source: HC-RLHF (arXiv:2506.08266).

  Args:
    state: after `observe`.
    pessimism: confidence of the bound, 0 = the mean itself.

  Returns:
    All [k]. Where there are too few costs (none; fewer than two for the
    bound) J is the mean, and the mean of none is 0: look at the count.
  """
  count = state.seen.sum(0)
  mean = (state.seen * state.window).sum(0) / jnp.maximum(count, 1.0)
  if not pessimism:
    return mean, mean, count
  spread = jnp.square(state.seen * (state.window - mean)).sum(0)
  variance = spread / jnp.maximum(count - 1.0, 1.0)
  # t by degrees of freedom, 1 up; the window is static, so is the table.
  table = scipy.stats.t.ppf(pessimism, np.arange(1, state.window.shape[0]))
  t = jnp.asarray(table, jnp.float32)[jnp.maximum(count - 2, 0).astype(int)]
  bound = mean + t * jnp.sqrt(variance / jnp.maximum(count, 1.0))
  return mean, jnp.where(count >= 2, bound, mean), count


def project(
  raw: Float[Array, " k"], *, lam_max: float, lam_min: float
) -> tuple[Float[Array, " k"], Float[Array, ""]]:
  """Multipliers of at least `lam_min` each and at most `lam_max` together.

  Too large a sum scales down what each has above `lam_min`, all by one factor.

  Returns:
    (multipliers, that factor; 1 if the sum was not too large).
  """
  floor = lam_min * raw.shape[0]
  above = jnp.maximum(raw, lam_min) - lam_min
  room, total = lam_max - floor, above.sum()
  factor = jnp.where(total > room, room / jnp.where(total > 0, total, 1.0), 1.0)
  return lam_min + factor * above, factor


def update(
  state: Multiplier,
  *,
  limits: Float[Array, " k"],
  optimizer: optax.GradientTransformation,
  lam_max: float,
  lam_min: float = LAM_MIN,
  delay: int = 0,
  gap_clip: float = 10.0,
  pid: tuple[float, float, float] | None = None,
  pessimism: float = 0.0,
) -> tuple[Multiplier, dict[str, Array]]:
  """One step of every multiplier that was judged since the last one.

  Gradient descent on `-(J_k - d_k) exp(log_lam_k)`, by any optimiser: ascent
  on the dual, in log lam so that lam stays above 0. Or, with `pid`, `lam =
  kp g + I + kd max(0, J - J_before)`, `I += ki g`, g = J - d, I from lam0 and
  within [0, lam_max]. Nothing winds up at `lam_max`: log_lam is what the
  projection left, and I is scaled by the same factor. A constraint that judged
  no episode since the last update, or too few for a bound, keeps its
  multiplier and its optimiser: it knows nothing new.

  Source: Safe RLHF (arXiv:2310.12773) for the gradient form, Stooke et al. 2020
  (arXiv:2007.03964) for PID.

  Args:
    state: after `observe`.
    limits: d, in the units of the costs; may change from call to call.
    optimizer: as given to `init`; unused under `pid`.
    lam_max: bound on the sum over constraints, see `project`.
    lam_min: bound on each.
    delay: updates before any multiplier moves.
    gap_clip: bound on |J - d|, in the units of the costs.
    pid: gains (kp, ki, kd), reward per squared unit of cost.
    pessimism: confidence of an upper bound used for J, see `judge`.

  Returns:
    (state, metrics): `lam`, `cost` (mean over the window), `bound` (the J
    used), `gap` (J - d, clipped), `count` (costs in the window), `moved` and
    `rejected`, all [k]; `lam_sum`, and `saturated`, 1 if the step wanted more
    than `lam_max`: for long, that means limits that cannot be met.

  Raises:
    ValueError: a setting out of range, or limits for another number of
      constraints.
  """
  k = state.log_lam.shape[0]
  _check(k, state.window.shape[0], limits, lam_max, lam_min, pid, pessimism)
  mean, bound, count = judge(state, pessimism=pessimism)
  enough = count >= (2 if pessimism else 1)
  gap = jnp.where(enough, jnp.clip(bound - limits, -gap_clip, gap_clip), 0.0)
  moved = (state.fresh > 0) & enough & (state.step >= delay)

  if pid is None:
    raw, state = _ascend(state, gap, moved, optimizer)
  else:
    raw, state = _pid(state, gap, bound, moved, pid, lam_max, gap_clip)
  new, factor = project(raw, lam_max=lam_max, lam_min=lam_min)
  # What the projection leaves alone keeps its last bit.
  touched = (factor < 1.0) | (raw < lam_min)
  state = state._replace(
    log_lam=jnp.where(touched, jnp.log(new), state.log_lam),
    fresh=jnp.zeros_like(state.fresh),
    integral=factor * state.integral,
    previous=jnp.where(moved, bound, state.previous),
    moves=state.moves + moved,
    step=state.step + 1,
  )
  return state, {
    "lam": lam(state),
    "lam_sum": lam(state).sum(),
    "cost": mean,
    "bound": bound,
    "gap": gap,
    "count": count,
    "moved": moved.astype(jnp.float32),
    "rejected": state.rejected,
    "saturated": (factor < 1.0).astype(jnp.float32),
  }


def _ascend(
  state: Multiplier,
  gap: Array,
  moved: Array,
  optimizer: optax.GradientTransformation,
) -> tuple[Array, Multiplier]:
  """(Multipliers before the projection, state) after one optimiser step."""
  updates, opt_state = jax.vmap(optimizer.update)(
    -gap * lam(state), state.opt_state, state.log_lam
  )

  def where_moved(new: Any, old: Array) -> Array:
    return jnp.where(moved.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

  state = state._replace(
    log_lam=where_moved(
      optax.apply_updates(state.log_lam, updates), state.log_lam
    ),
    opt_state=jax.tree.map(where_moved, opt_state, state.opt_state),
  )
  # e^60 is far above any lam_max, and hundreds of them still have a sum.
  return jnp.exp(jnp.minimum(state.log_lam, 60.0)), state


def _pid(
  state: Multiplier,
  gap: Array,
  bound: Array,
  moved: Array,
  gains: tuple[float, float, float],
  lam_max: float,
  gap_clip: float,
) -> tuple[Array, Multiplier]:
  """(Multipliers before the projection, state) after one PID step."""
  kp, ki, kd = gains
  integral = jnp.clip(state.integral + ki * gap, 0.0, lam_max)
  rise = jnp.where(state.moves > 0, bound - state.previous, 0.0)
  wanted = kp * gap + integral + kd * jnp.clip(rise, 0.0, gap_clip)
  raw = jnp.where(moved, wanted, lam(state))
  tiny = jnp.finfo(jnp.float32).tiny  # `project` lifts these to lam_min
  return raw, state._replace(
    log_lam=jnp.where(moved, jnp.log(jnp.maximum(raw, tiny)), state.log_lam),
    integral=jnp.where(moved, integral, state.integral),
  )


def _check(
  k: int,
  window: int,
  limits: Array,
  lam_max: float,
  lam_min: float,
  pid: tuple[float, float, float] | None,
  pessimism: float,
) -> None:
  """Refuses settings that would act otherwise than their names say."""
  if limits.shape != (k,):
    raise ValueError(
      f"limits of shape {limits.shape} for {k} constraints: give one each"
    )
  if not 0 < k * lam_min < lam_max:
    raise ValueError(
      f"lam_min {lam_min} for {k} constraints under lam_max {lam_max} on their "
      "sum: lam_min must be above 0, and their sum below lam_max"
    )
  if pid is not None and min(pid) < 0:
    raise ValueError(f"pid gains {pid}: none may be negative")
  if pessimism and not 0.5 <= pessimism < 1:
    raise ValueError(
      f"pessimism: {pessimism}: give the confidence of an upper bound, 0.5 to "
      "1 (excluded), or 0 for the mean; the risk 0.05 is confidence 0.95"
    )
  if pessimism and window < 2:
    raise ValueError(
      f"window: {window}: a bound by pessimism {pessimism} needs at least 2"
    )
