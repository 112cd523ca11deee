"""Updates on sampled responses: sample, judge, learn."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csrm_jax import sharding
from csrm_jax.align import evaluation, feedback, limits, ppo, prompts
from csrm_jax.align import setup as setups
from csrm_jax.align.ppo import AlignState, Episodes
from csrm_jax.align.rollout import Rollouts
from csrm_jax.align.setup import Setup
from csrm_jax.types import Params

# Of the multipliers' metrics, what a log line says of each constraint.
PER_CONSTRAINT = ("lam", "cost", "gap")
SECONDS = ("seconds_sample", "seconds_judge", "seconds_update")


def prepare(setup: Setup, optimizers: Any, state: AlignState) -> Any:
  """Compiles; returns the step of the loop in `run.py`."""
  config = setup.config
  shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  update = setups.compile_update(
    shape,
    setup.frozen,
    setup.mesh,
    agent=setup.agent,
    optimizer=optimizers,
    keywords=setups.update_keywords(config, setup.bound),
  )
  estimates = setups.compile_estimates(setup)

  def advance(state: AlignState, k: int) -> tuple[AlignState, dict[str, float]]:
    clock = [time.perf_counter()]
    sampled = sample(setup, state.params, step=k)
    clock.append(time.perf_counter())
    judged = judge(setup, sampled, step=k)
    clock.append(time.perf_counter())
    arrays = place(setup, sampled, judged)
    known = estimates(
      state.params, setup.frozen, arrays["tokens"], arrays["length"]
    )
    episodes = Episodes(**arrays, **known)
    indices = ppo.minibatches(
      jax.random.fold_in(jax.random.key(config.seed), k),
      episodes.tokens.shape[0],
      epochs=config.align.epochs,
      count=config.align.minibatches,
    )
    ptx = setup.imitated(k) if setup.imitated else None
    state, measured = update(state, setup.frozen, episodes, indices, ptx)
    line = _line(setup, sampled, judged, jax.device_get(measured))
    clock.append(time.perf_counter())
    line |= dict(zip(SECONDS, np.diff(clock).tolist(), strict=True))
    return state, line

  return advance


def sample(setup: Setup, trained: Params, *, step: int) -> Rollouts:
  """The responses that update `step` learns from."""
  align = setup.config.align
  asked = prompts.batch(
    setup.train,
    seed=setup.config.seed,
    step=step,
    count=align.prompts_per_step,
  )
  key = jax.random.fold_in(jax.random.key(setup.config.seed + 1), step)
  return setups.respond(setup, trained, asked, samples=align.samples, key=key)


def judge(
  setup: Setup, sampled: Rollouts, *, step: int
) -> dict[str, np.ndarray]:
  """Rewards [n], log-odds [n k] (NaN where not asked) and who was asked."""
  config = setup.config
  n, k = len(sampled.messages), len(setup.bound)
  rng = np.random.default_rng([config.seed, step])
  asked = feedback.observed(rng, n, k, config.align.judged)
  assert setup.reward is not None  # `set_up` sees to it
  return {
    "rewards": np.asarray(setup.reward(sampled.messages), np.float32),
    "log_odds": np.asarray(
      setup.compliance(sampled.messages, asked), np.float32
    ),
    "observed": asked.astype(np.float32),
  }


def place(
  setup: Setup, sampled: Rollouts, judged: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
  """Fields of `Episodes` that do not depend on the models, on the mesh."""
  form = setup.config.align.cost
  costs = limits.costs_of(jnp.asarray(judged["log_odds"]), form=form)
  fields = {
    "tokens": sampled.tokens,
    "length": sampled.length,
    "mask": sampled.mask,
    "group": sampled.prompt,
    "rewards": judged["rewards"],
    "costs": jnp.where(judged["observed"] > 0, costs, 0.0),
    "observed": judged["observed"],
  }
  rows = sharding.batch_sharding(setup.mesh)
  return {k: jax.device_put(jnp.asarray(v), rows) for k, v in fields.items()}


def _line(
  setup: Setup,
  sampled: Rollouts,
  judged: dict[str, np.ndarray],
  measured: dict[str, np.ndarray],
) -> dict[str, float]:
  """A line of metrics.jsonl; vectors become one number a constraint."""
  line: dict[str, float] = {}
  for name, value in measured.items():
    if np.ndim(value) == 0:
      line[name] = float(value)
      continue
    if name not in PER_CONSTRAINT:
      continue
    for constraint, x in zip(setup.bound, value, strict=True):
      line[f"{name}/{constraint.name}"] = float(x)
  line |= seen(setup, sampled, judged)
  line["loss"] = line["loss_policy"]
  line["cost"] = float(np.mean(measured["cost"]))
  return line


def seen(
  setup: Setup, sampled: Rollouts, judged: dict[str, np.ndarray]
) -> dict[str, float]:
  """What a log line says of the responses, whatever learns from them."""
  line: dict[str, float] = {}
  violated = judged["log_odds"] < 0  # NaN is not
  asked = judged["observed"] > 0
  for i, constraint in enumerate(setup.bound):
    count, total = int(violated[:, i].sum()), int(asked[:, i].sum())
    line |= evaluation.rate(f"violation/{constraint.name}", count, total)
  line["stopped"] = float(np.mean(sampled.stopped))
  line["reward_deviation"] = float(np.std(judged["rewards"]))
  return line
