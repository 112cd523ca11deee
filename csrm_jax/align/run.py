"""The alignment run: sample, judge, update, log, evaluate, checkpoint."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from csrm_jax import checkpoint, peers, sharding, storage
from csrm_jax.align import evaluation, feedback, limits, ppo, prompts
from csrm_jax.align import setup as setups
from csrm_jax.align.feedback import ComplianceFunction, RewardFunction
from csrm_jax.align.ppo import AlignState, Episodes
from csrm_jax.align.rollout import Rollouts
from csrm_jax.align.setup import Setup
from csrm_jax.config import Config
from csrm_jax.storage import AnyPath
from csrm_jax.train import workdir as workdirs

METHODS = ("ppo", "shaping", "plain", *setups.WITHOUT_CRITICS)
# Of the multipliers' metrics, what a log line says of each constraint.
PER_CONSTRAINT = ("lam", "cost", "gap")


def align(
  config: Config,
  workdir: str | AnyPath,
  *,
  reward: RewardFunction | None = None,
  compliance: ComplianceFunction | None = None,
) -> dict[str, Any]:
  """Aligns the policy of `config.model` to the specs of `config.align`.

  Resumes the workdir's newest checkpoint.

  Args:
    config: of `config.default()`.
    workdir: a folder, or gs://BUCKET/FOLDER; receives checkpoints/,
      metrics.jsonl, evaluations.jsonl, responses.jsonl, TensorBoard events,
      config.json, and result.json at the end.
    reward: in place of the reward model's helpfulness.
    compliance: in place of the judge's log-odds.

  Returns:
    What result.json holds; without "params_sha256" if SIGTERM ended the run
    early (state is saved).

  Raises:
    ValueError: a key of `config.align` is wrong; the workdir holds another
      recipe; a model or file is not there.
    FloatingPointError: `skips_allowed` updates in a row were not finite.
  """
  workdir = storage.path(workdir)
  _check(config)
  with storage.naming(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    workdirs.check_recipe(config, workdir)
    return _align(config, workdir, reward, compliance)


def _check(config: Config) -> None:
  align = config.align
  for key, allowed in (("method", METHODS), ("cost", limits.FORMS)):
    if align[key] not in allowed:
      raise ValueError(
        f"--config.align.{key}={align[key]}: use one of {', '.join(allowed)}"
      )
  if not align.temperature > 0:
    raise ValueError(
      f"--config.align.temperature={align.temperature}: use one above 0; the"
      " greedy choice has no gradient"
    )
  if peers.several():
    raise ValueError(
      "launch/align.py runs in one process, on all devices that it sees; this"
      " job has several: start one"
    )


def _align(
  config: Config,
  workdir: AnyPath,
  reward: RewardFunction | None,
  compliance: ComplianceFunction | None,
) -> dict[str, Any]:
  setup, params = setups.set_up(config, workdir, reward, compliance)
  optimizer = setups.make_optimizers(config)
  with checkpoint.opened(workdir, keep=config.keep_checkpoints) as saved:
    state = setups.start(setup, optimizer, params, saved)
    del params
    storage.write_json(workdir / "config.json", config.to_dict())
    state, stopped = _run(setup, optimizer, state, saved)
    checkpoint.save(saved, int(state.step), state)
    checkpoint.finish(saved)
  result: dict[str, Any] = {
    "step": int(state.step),
    "tokens": float(state.tokens),
    "skipped": int(state.skipped),
  }
  result |= workdirs.logged(workdir)
  if stopped:
    print(f"stopped at step {result['step']}; saved, run again to go on")
    return result
  result["params_sha256"] = checkpoint.params_sha256(state.params)
  storage.write_json(workdir / "result.json", result)
  return result


def _run(
  setup: Setup, optimizer: Any, state: AlignState, saved: Any
) -> tuple[AlignState, bool]:
  """Updates to the end or to SIGTERM; returns (state, whether stopped)."""
  config = setup.config
  shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  update = setups.compile_update(
    shape,
    setup.frozen,
    setup.mesh,
    agent=setup.agent,
    optimizer=optimizer,
    keywords=setups.update_keywords(config, setup.bound),
  )
  estimates = setups.compile_estimates(setup)
  first = int(state.step)
  spent = workdirs.trim_log(setup.workdir, first)
  evaluation.trim(setup.workdir, first)
  began = time.perf_counter()
  with (
    workdirs.open_log(setup.workdir) as log,
    peers.preempted() as preempted,
    tqdm(total=config.steps, initial=first, desc="align", unit="step") as bar,
  ):
    if first == 0 and config.align.evaluate_every:
      evaluation.evaluate(setup, state, step=0)
    for k in range(first, config.steps):
      clock = [time.perf_counter()]
      sampled = sample(setup, state, step=k)
      clock.append(time.perf_counter())
      judged = judge(setup, sampled, step=k)
      clock.append(time.perf_counter())
      arrays = place(setup, sampled, judged)
      known = estimates(
        state.params, setup.frozen, arrays["tokens"], arrays["length"]
      )
      episodes = Episodes(**arrays, **known)
      n = episodes.tokens.shape[0]
      indices = ppo.minibatches(
        jax.random.fold_in(jax.random.key(config.seed), k),
        n,
        epochs=config.align.epochs,
        count=config.align.minibatches,
      )
      ptx = setup.imitated(k) if setup.imitated else None
      state, measured = update(state, setup.frozen, episodes, indices, ptx)
      line = _line(setup, sampled, judged, jax.device_get(measured))
      clock.append(time.perf_counter())
      if line["skipped_in_a_row"] >= config.skips_allowed:
        raise FloatingPointError(
          f"update {k + 1}: loss or gradient not finite"
          f" {config.skips_allowed} times in a row (skips_allowed ="
          f" {config.skips_allowed}); lower optimizer.lr (now"
          f" {config.optimizer.lr}) or align.critic_lr"
        )
      names = ("seconds_sample", "seconds_judge", "seconds_update")
      line |= dict(zip(names, np.diff(clock).tolist(), strict=True))
      line |= {"step": k + 1, "seconds": spent + clock[-1] - began}
      log.add(line)
      bar.set_postfix(
        reward=f"{line['reward']:.3f}", cost=f"{line['cost']:.3f}"
      )
      bar.update()
      last = k + 1 == config.steps
      every = config.align.evaluate_every
      if every and ((k + 1) % every == 0 or last):
        evaluation.evaluate(setup, state, step=k + 1)
      if (k + 1) % config.checkpoint_every == 0:
        log.keep()
        checkpoint.save(saved, k + 1, state)
      if preempted(k + 1):
        return state, not last
  return state, False


def sample(setup: Setup, state: AlignState, *, step: int) -> Rollouts:
  """The responses that update `step` learns from."""
  align = setup.config.align
  asked = prompts.batch(
    setup.train,
    seed=setup.config.seed,
    step=step,
    count=align.prompts_per_step,
  )
  key = jax.random.fold_in(jax.random.key(setup.config.seed + 1), step)
  return setups.respond(setup, state, asked, samples=align.samples, key=key)


def judge(
  setup: Setup, sampled: Rollouts, *, step: int
) -> dict[str, np.ndarray]:
  """Rewards [n], log-odds [n k] (NaN where not asked) and who was asked."""
  config = setup.config
  n, k = len(sampled.messages), len(setup.bound)
  rng = np.random.default_rng([config.seed, step])
  asked = feedback.observed(rng, n, k, config.align.judged)
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
  violated = judged["log_odds"] < 0  # NaN is not
  asked = judged["observed"] > 0
  for i, constraint in enumerate(setup.bound):
    count, total = int(violated[:, i].sum()), int(asked[:, i].sum())
    line |= evaluation.rate(f"violation/{constraint.name}", count, total)
  line["loss"] = line["loss_policy"]
  line["cost"] = float(np.mean(measured["cost"]))
  line["stopped"] = float(np.mean(sampled.stopped))
  line["reward_deviation"] = float(np.std(judged["rewards"]))
  return line
