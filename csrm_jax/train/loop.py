"""The training run: prepare, restore, step, log, checkpoint, calibrate."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from csrm_jax import checkpoint, peers, sharding, storage
from csrm_jax.config import Config
from csrm_jax.data import loader, template
from csrm_jax.data import prepare as preparation
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.eval import calibrate
from csrm_jax.losses import TERMS
from csrm_jax.model import reward
from csrm_jax.model.reward import LoadParams, RewardModel
from csrm_jax.storage import AnyPath
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import start
from csrm_jax.train import step as steps
from csrm_jax.train import workdir as workdirs
from csrm_jax.types import TrainState


def fit(config: Config, workdir: str | AnyPath) -> dict[str, Any]:
  """Trains as `config` says, resuming the workdir's newest checkpoint.

  Of several processes (`peers.joined`) each must call it, on a workdir that all
  see; process 0 prepares, logs and calibrates.

  Args:
    config: of `config.default()`.
    workdir: a folder, or gs://BUCKET/FOLDER; receives data/, checkpoints/,
      metrics.jsonl, TensorBoard events, config.json, model.json, the
      tokenizer, and result.json at the end.

  Returns:
    What result.json holds; without "params_sha256" if SIGTERM ended the run
    early (state is saved).

  Raises:
    ValueError: the workdir holds another recipe, template or data, or a damaged
      checkpoint; batch and mesh do not fit; processes differ in what they were
      given or see; the disk is full.
    FloatingPointError: `skips_allowed` steps in a row were not finite.
  """
  workdir = storage.path(workdir)
  with storage.naming(workdir):
    return _fit(config, workdir)


def _fit(config: Config, workdir: AnyPath) -> dict[str, Any]:
  workdir.mkdir(parents=True, exist_ok=True)
  peers.agree("config", json.dumps(config.to_dict(), sort_keys=True))
  peers.first("recipe", lambda: workdirs.check_recipe(config, workdir))
  tokenizer = load_tokenizer(config)
  data = workdirs.local_rows(
    peers.first(
      "preparation", lambda: workdirs.ensure_rows(config, workdir, tokenizer)
    )
  )
  rows = preparation.read_meta(data)["fingerprint"]
  peers.agree("prepared rows", rows)
  model, load_params = make_model(config, tokenizer)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_rows(config.batch_rows, config.microbatches, mesh)
  peers.first(
    "description",
    lambda: workdirs.write_recipe(
      config, workdir, model, tokenizer, data_fingerprint=rows
    ),
  )
  optimizer = make_optimizer(config)

  with checkpoint.opened(workdir, keep=config.keep_checkpoints) as saved:
    state = _start(
      config, model, load_params, tokenizer, optimizer, mesh, saved
    )
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )
    step = steps.compile_step(
      abstract,
      mesh,
      model=model,
      optimizer=optimizer,
      microbatches=config.microbatches,
      **loss_keywords(config),
    )
    state, stopped = _run(config, workdir, data, mesh, saved, state, step)
    checkpoint.save(saved, int(state.step), state)
    checkpoint.finish(saved)
  counters = _counters(state)
  result = peers.first("summary", lambda: counters | workdirs.logged(workdir))
  if stopped:
    if peers.is_first():
      print(f"stopped at step {result['step']}; saved, run again to go on")
    return result
  result["params_sha256"] = checkpoint.params_sha256(state.params)
  result |= {"processes": jax.process_count(), "devices": jax.device_count()}
  del state

  def finish() -> dict[str, Any]:
    heldout = data / "heldout.jsonl"
    whole = result | calibrate.calibrate_workdir(workdir, heldout)
    storage.write_json(workdir / "result.json", whole)
    return whole

  return peers.first("calibration", finish)


def load_tokenizer(config: Config) -> Tokenizer:
  """The tokenizer that goes with `config.model`."""
  path = config.model.tokenizer
  if path == "auto":
    path = config.model.path
  if not path:
    raise ValueError(
      "model.path is empty: give --config.model.path=FOLDER, the weights and"
      f" tokenizer of {config.model.size or 'a backbone'}"
    )
  return tokenizers.load("smollm2" if path == "random" else path)


def make_model(
  config: Config, tokenizer: Tokenizer
) -> tuple[RewardModel, LoadParams]:
  """The model of `config.model` over this tokenizer's verdict words."""
  safe, unsafe = template.verdict_ids(tokenizer)
  return reward.make(
    config.model,
    vocab_size=tokenizer.vocab_size,
    safe_ids=safe,
    unsafe_ids=unsafe,
    row_length=config.data.row_length,
  )


def make_optimizer(config: Config):
  """The optimizer of `config.optimizer` over `config.steps`."""
  return optimizers.make_optimizer(steps=config.steps, **config.optimizer)


def loss_keywords(config: Config) -> dict[str, Any]:
  """Keywords of `train_step` from `config.loss`."""
  loss = config.loss
  return {
    "weights": {name: loss[name] for name in TERMS},
    "label_smoothing": loss.label_smoothing,
    "focal": loss.focal,
    "brier": loss.brier,
    "temperature": loss.temperature,
  }


def _start(
  config: Config, model, load_params, tokenizer, optimizer, mesh, saved
) -> TrainState:
  """The newest checkpoint, or the state before step 0, sharded."""
  key = jax.random.key(config.seed)

  def fresh(params):
    return steps.init_state(params, model, optimizer)

  params_shape = jax.eval_shape(model.init, key)
  shape = jax.eval_shape(fresh, params_shape)
  held = sharding.shardings(shape, mesh)
  latest = saved.latest_step()
  peers.agree("newest checkpoint", str(latest))
  if latest is not None:
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shape,
      held,
    )
    return checkpoint.restore(saved, latest, abstract)
  params = load_params(key, held.params)
  if config.model.adapter:
    params = start.from_adapter(config, model, tokenizer, params, held.params)
  return jax.jit(fresh, out_shardings=held, donate_argnums=0)(params)


def _run(config, workdir, data, mesh, saved, state, step):
  """Steps to the end or to SIGTERM; returns (state, whether stopped).

  Every process takes every step; losses are sums over all of them.
  """
  rows = loader.open_rows(data, seed=config.seed)
  rate = optimizers.schedule(
    lr=config.optimizer.lr,
    steps=config.steps,
    warmup=config.optimizer.warmup,
    final_lr=config.optimizer.final_lr,
  )
  first = int(state.step)
  spent = 0.0
  if peers.is_first():
    spent = workdirs.trim_log(workdir, first)
  began = mark = time.perf_counter()
  tokens, last_logged = 0.0, first
  with (
    workdirs.open_log(workdir) as log,
    peers.preempted() as preempted,
    tqdm(
      total=config.steps,
      initial=first,
      desc="train",
      unit="step",
      disable=not peers.is_first(),
    ) as bar,
  ):
    for k in range(first, config.steps):
      batch = loader.batch_at(
        rows,
        k,
        batch_rows=config.batch_rows,
        sharding=sharding.batch_sharding(mesh),
      )
      state, metrics = step(state, batch)
      metrics = {name: float(x) for name, x in metrics.items()}
      if metrics["skipped_in_a_row"] >= config.skips_allowed:
        raise FloatingPointError(_not_finite(config, data, k))
      tokens += metrics.pop("tokens")
      if (k + 1) % config.log_every == 0 or k + 1 == config.steps:
        now = time.perf_counter()
        speed = tokens / (now - mark)
        line = {"step": k + 1, **metrics, "lr": float(np.asarray(rate(k)))}
        line["tokens"] = float(state.tokens)
        line["tokens_per_second"] = speed
        line["seconds"] = spent + now - began
        log.add(line)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", tokens_s=f"{speed:.0f}")
        bar.update(k + 1 - last_logged)
        mark, tokens, last_logged = now, 0.0, k + 1
      if (k + 1) % config.checkpoint_every == 0:
        log.keep()  # ahead of the checkpoint: its steps are not logged again
        checkpoint.save(saved, k + 1, state)
      if preempted(k + 1):
        return state, k + 1 < config.steps
  return state, False


def _not_finite(config: Config, data: Path, k: int) -> str:
  """What to say once too many steps in a row, step k the last, were skipped."""
  number = loader.record_numbers(data, seed=config.seed)
  count = config.skips_allowed
  first = (k + 1 - count) * config.batch_rows
  found = [number(i) for i in range(first, (k + 1) * config.batch_rows)]
  shown = ", ".join(map(str, found[:64])) + (", ..." if found[64:] else "")
  return (
    f"step {k + 1}: loss or gradient not finite {count} times in a row "
    f"(skips_allowed = {count}); lower optimizer.lr (now {config.optimizer.lr})"
    f" or look at the rows: records {shown} of {data / loader.RECORDS}"
  )


def _counters(state: TrainState) -> dict[str, Any]:
  return {
    "step": int(state.step),
    "tokens": float(state.tokens),
    "skipped": int(state.skipped),
  }
