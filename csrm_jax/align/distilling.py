"""CSRM's reward distillation, online: sample, score by R H, learn from pairs.

Source: CSRM (arXiv:2605.30487). The losses are in `distill.py`.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax import sharding
from csrm_jax.align import descent, distill, online, pairwise
from csrm_jax.align.pairwise import Pairs
from csrm_jax.align.rollout import Rollouts
from csrm_jax.align.setup import Setup
from csrm_jax.config import Config
from csrm_jax.types import TrainState


def check(config: Config) -> None:
  """Raises ValueError for keys that do not go with this method."""
  align = config.align
  if align.judged:
    raise ValueError(
      f"--config.align.judged={align.judged}: method 'distill' multiplies the"
      " compliance with all constraints; set it to 0"
    )
  if (
    align.top < 1
    or align.bottom < 1
    or align.top + align.bottom > (align.samples)
  ):
    raise ValueError(
      f"--config.align.samples={align.samples}: too few for top ="
      f" {align.top} and bottom = {align.bottom}; their sum may be samples at"
      " most, each at least 1"
    )
  if not 1 <= align.contrasts <= align.top * align.bottom:
    raise ValueError(
      f"--config.align.contrasts={align.contrasts}: give 1 to top x bottom ="
      f" {align.top * align.bottom}"
    )


def prepare(setup: Setup, optimizers: Any, state: TrainState) -> Any:
  """Compiles; returns the step of the loop in `run.py`."""
  align = setup.config.align
  sharding.check_rows(align.prompts_per_step * align.contrasts, 1, setup.mesh)
  shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  update = descent.compile_update(
    functools.partial(
      pairwise.update,
      agent=setup.agent,
      optimizers=optimizers,
      method="distill",
      beta=align.beta,
    ),
    shape,
    setup.frozen,
    setup.mesh,
  )
  spread = sharding.batch_sharding(setup.mesh)

  def advance(state: TrainState, k: int) -> tuple[TrainState, dict[str, float]]:
    clock = [time.perf_counter()]
    sampled = online.sample(setup, state.params, step=k)
    clock.append(time.perf_counter())
    judged = online.judge(setup, sampled, step=k)
    clock.append(time.perf_counter())
    pairs, found = contrast(setup.config, sampled, judged, step=k)
    state, measured = update(state, setup.frozen, jax.device_put(pairs, spread))
    line = {name: float(x) for name, x in measured.items()}
    # Of all responses, not of those alone that made pairs.
    line |= online.seen(setup, sampled, judged) | found
    clock.append(time.perf_counter())
    line |= dict(zip(online.SECONDS, np.diff(clock).tolist(), strict=True))
    return state, line

  return advance


def contrast(
  config: Config, sampled: Rollouts, judged: dict[str, np.ndarray], *, step: int
) -> tuple[Pairs, dict[str, float]]:
  """Pairs of each prompt's best and worst responses by R H.

  A response without a score (not finite) takes no part; a prompt that has fewer
  than `align.top + align.bottom` left makes no pairs.

  Args:
    config: of the run.
    sampled: `align.samples` after each other for each prompt.
    judged: of `online.judge`.
    step: from 0; draws the pairs.

  Returns:
    Pairs, of weight 0 where a prompt makes none, and what was counted: reward
    (mean h), log_reward (mean log R H, nats), gap (its mean over the pairs),
    unscored (responses), prompts_left_out.
  """
  align = config.align
  scores = np.asarray(
    distill.compose(
      jnp.asarray(judged["log_odds"]),
      jnp.asarray(judged["rewards"]),
      "log_product",
    )
  )
  known = np.isfinite(scores)
  groups = (len(scores) // align.samples, align.samples)
  key = jax.random.fold_in(jax.random.key(config.seed + 3), step)
  chosen, weight = distill.choose_pairs(
    jnp.asarray(np.where(known, scores, np.nan).reshape(groups)),
    key,
    top=align.top,
    bottom=align.bottom,
    pairs=align.contrasts,
  )
  first = np.arange(groups[0])[:, None, None] * align.samples
  rows = (np.asarray(chosen) + first).reshape(-1, 2)
  weight = np.asarray(weight, np.float32)
  log_rewards = np.where(known, scores, 0.0)[rows].astype(np.float32)
  pairs = Pairs(
    tokens=jnp.asarray(sampled.tokens[rows]),
    length=jnp.asarray(sampled.length[rows]),
    mask=jnp.asarray(sampled.mask[rows]),
    weight=jnp.asarray(weight.reshape(-1)),
    log_rewards=jnp.asarray(log_rewards),
  )
  counted = weight.reshape(-1) > 0
  gaps = (log_rewards[:, 0] - log_rewards[:, 1])[counted]

  def mean(x: np.ndarray) -> float:
    return float(np.mean(x)) if x.size else 0.0

  return pairs, {
    "reward": mean(judged["rewards"][np.isfinite(judged["rewards"])]),
    "log_reward": mean(scores[known]),
    "gap": mean(gaps),
    "unscored": float(np.sum(~known)),
    "prompts_left_out": float(np.sum(weight[:, 0] == 0)),
    "length": mean(np.sum(sampled.mask, axis=1)),
  }
