"""The alignment run: step after step, log, evaluate, checkpoint."""

import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from csrm_jax import checkpoint, peers, sharding, storage
from csrm_jax.align import agent as agents
from csrm_jax.align import (
  constitutional,
  distilling,
  evaluation,
  limits,
  offline,
  online,
  selecting,
  supervised,
)
from csrm_jax.align import setup as setups
from csrm_jax.align.feedback import ComplianceFunction, RewardFunction
from csrm_jax.align.ppo import AlignState
from csrm_jax.align.setup import Setup
from csrm_jax.config import Config
from csrm_jax.export import causal
from csrm_jax.model.reward import DTYPES
from csrm_jax.storage import AnyPath
from csrm_jax.train import workdir as workdirs
from csrm_jax.types import TrainState

METHODS = (
  *setups.WITH_CRITICS,
  *setups.WITHOUT_CRITICS,
  *setups.WITHOUT_MULTIPLIERS,
  *setups.UNTRAINED,
)
POLICY = "policy"  # folder of the workdir, for transformers and for more rounds
State = AlignState | TrainState
# One update: the state after it, and a line of metrics.jsonl.
Advance = Callable[[Any, int], tuple[Any, dict[str, float]]]
# What the progress bar shows, where the line has it.
_SHOWN = ("reward", "cost", "loss", "accuracy")


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
      config.json, and at the end result.json and policy/, a Hugging Face
      folder. Methods "best_of_n" and "constitutional" train nothing, see
      `selecting.run` and `constitutional.run`.
    reward: in place of the reward model's helpfulness.
    compliance: in place of the judge's log-odds.

  Returns:
    What result.json (best_of_n.json, constitutional.json) holds; without
    "params_sha256" if SIGTERM ended the run early (state is saved).

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
  for key, allowed in (
    ("method", METHODS),
    ("cost", limits.FORMS),
    ("judge_dtype", DTYPES),
  ):
    if align[key] not in allowed:
      raise ValueError(
        f"--config.align.{key}={align[key]}: use one of {', '.join(allowed)}"
      )
  if config.model.adapter:
    raise ValueError(
      f"--config.model.adapter={config.model.adapter}: launch/train.py alone"
      " goes on from an adapter; a policy begins at --config.model.path"
    )
  if not align.temperature > 0:
    raise ValueError(
      f"--config.align.temperature={align.temperature}: use one above 0; the"
      " greedy choice has no gradient"
    )
  if align.method == "distill":
    distilling.check(config)
  if align.method == "best_of_n":
    selecting.check(config)
  if align.method == "constitutional":
    constitutional.check(config)
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
  if config.align.method in setups.UNTRAINED:
    storage.write_json(workdir / "config.json", config.to_dict())
    held = sharding.shardings(params, setup.mesh)
    placed = jax.device_put(params, held)
    if config.align.method == "best_of_n":
      return selecting.run(setup, placed)
    return constitutional.run(setup, placed)
  optimizer = setups.make_optimizers(config)
  with checkpoint.opened(workdir, keep=config.keep_checkpoints) as saved:
    state = setups.start(setup, optimizer, params, saved)
    del params
    storage.write_json(workdir / "config.json", config.to_dict())
    advance = _prepare(setup, optimizer, state)
    state, stopped = _run(setup, state, saved, advance)
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
  causal.export_policy(
    setup.networks.policy,
    agents.join(state.params["policy"], setup.frozen["policy"]),
    setup.tokenizer,
    workdir / POLICY,
  )
  result["params_sha256"] = checkpoint.params_sha256(state.params)
  storage.write_json(workdir / "result.json", result)
  return result


def _prepare(setup: Setup, optimizer: Any, state: State) -> Advance:
  if isinstance(state, AlignState):
    return online.prepare(setup, optimizer, state)
  if setup.config.align.method == setups.SUPERVISED:
    return supervised.prepare(setup, optimizer, state)
  if setup.config.align.method in setups.OFFLINE:
    return offline.prepare(setup, optimizer, state)
  return distilling.prepare(setup, optimizer, state)


def _run(
  setup: Setup, state: State, saved: Any, advance: Advance
) -> tuple[State, bool]:
  """Updates to the end or to SIGTERM; returns (state, whether stopped)."""
  config = setup.config
  first = int(state.step)
  spent = workdirs.trim_log(setup.workdir, first)
  evaluation.trim(setup.workdir, first)
  began = time.perf_counter()
  every = config.align.evaluate_every if setup.heldout else 0
  with (
    workdirs.open_log(setup.workdir) as log,
    peers.preempted() as preempted,
    tqdm(total=config.steps, initial=first, desc="align", unit="step") as bar,
  ):
    if first == 0 and every:
      evaluation.evaluate(setup, state.params, step=0)
    for k in range(first, config.steps):
      state, line = advance(state, k)
      if line["skipped_in_a_row"] >= config.skips_allowed:
        raise FloatingPointError(
          f"update {k + 1}: loss or gradient not finite"
          f" {config.skips_allowed} times in a row (skips_allowed ="
          f" {config.skips_allowed}); lower optimizer.lr (now"
          f" {config.optimizer.lr}) or align.critic_lr"
        )
      seconds = spent + time.perf_counter() - began
      log.add(line | {"step": k + 1, "seconds": seconds})
      bar.set_postfix({n: f"{line[n]:.3f}" for n in _SHOWN if n in line})
      bar.update()
      last = k + 1 == config.steps
      if every and ((k + 1) % every == 0 or last):
        evaluation.evaluate(setup, state.params, step=k + 1)
      if (k + 1) % config.checkpoint_every == 0:
        log.keep()
        checkpoint.save(saved, k + 1, state)
      if preempted(k + 1):
        return state, not last
  return state, False
