"""The training run: prepare, restore, step, log, checkpoint, calibrate."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from csrm_jax import checkpoint, peers, sharding
from csrm_jax.config import Config, default
from csrm_jax.data import loader, template
from csrm_jax.data import prepare as preparation
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.eval import calibrate
from csrm_jax.losses import TERMS
from csrm_jax.model import reward
from csrm_jax.model.reward import LoadParams, RewardModel
from csrm_jax.train import optimizer as optimizers
from csrm_jax.train import step as steps
from csrm_jax.types import TrainState

# Keys that may change between the parts of one run without changing what it
# computes; any other difference would silently mix two recipes.
_FREE_KEYS = (
  "log_every",
  "checkpoint_every",
  "keep_checkpoints",
  "resume",
  "mesh",
  "data.path",
  "data.prepared",
)
_SKIPS_ALLOWED = 3  # non-finite steps in a row that stop a run


def fit(config: Config, workdir: str | Path) -> dict[str, Any]:
  """Trains as `config` says, resuming the workdir's newest checkpoint.

  Of several processes (`peers.joined`) each must call it, on a workdir that all
  see; process 0 prepares, logs and calibrates.

  Args:
    config: of `config.default()`.
    workdir: receives data/, checkpoints/, metrics.jsonl, TensorBoard events,
      config.json, model.json, the tokenizer, and result.json at the end.

  Returns:
    What result.json holds; without "params_sha256" if SIGTERM ended the run
    early (state is saved).

  Raises:
    ValueError: the workdir holds another recipe; batch and mesh do not fit;
      processes differ in what they were given or see.
    FloatingPointError: three steps in a row were not finite.
  """
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  peers.agree("config", json.dumps(config.to_dict(), sort_keys=True))
  peers.first("recipe", lambda: _check_recipe(config, workdir))
  tokenizer = load_tokenizer(config)
  data = Path(
    peers.first(
      "preparation", lambda: str(preparation.ensure(config, workdir, tokenizer))
    )
  )
  peers.agree("prepared rows", preparation.read_meta(data)["fingerprint"])
  model, load_params = make_model(config, tokenizer)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_rows(config.batch_rows, config.microbatches, mesh)
  peers.first(
    "description", lambda: _write_recipe(config, workdir, model, tokenizer)
  )
  optimizer = make_optimizer(config)

  with checkpoint.open_manager(workdir, keep=config.keep_checkpoints) as saved:
    state = _start(config, model, load_params, optimizer, mesh, saved)
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
    saved.wait_until_finished()
  counters = _counters(state)
  result = peers.first("summary", lambda: counters | _logged(workdir))
  if stopped:
    if peers.is_first():
      print(f"stopped at step {result['step']}; saved, run again to go on")
    return result
  result["params_sha256"] = checkpoint.params_sha256(state.params)
  del state

  def finish() -> dict[str, Any]:
    heldout = data / "heldout.jsonl"
    whole = result | calibrate.calibrate_workdir(workdir, heldout)
    _write_json(workdir / "result.json", whole)
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
  config: Config, model, load_params, optimizer, mesh, saved
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
    spent = _trim_log(workdir / "metrics.jsonl", first)
  began = mark = time.perf_counter()
  tokens, last_logged = 0.0, first
  with (
    _log(workdir) as log,
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
      if metrics["skipped_in_a_row"] >= _SKIPS_ALLOWED:
        raise FloatingPointError(
          f"step {k + 1}: loss or gradient not finite {_SKIPS_ALLOWED} times "
          f"in a row; lower optimizer.lr (now {config.optimizer.lr}) or look "
          f"at the rows of batches {k - 1} to {k + 1} in {data}"
        )
      tokens += metrics.pop("tokens")
      if (k + 1) % config.log_every == 0 or k + 1 == config.steps:
        now = time.perf_counter()
        speed = tokens / (now - mark)
        line = {"step": k + 1, **metrics, "lr": float(np.asarray(rate(k)))}
        line["tokens"] = float(state.tokens)
        line["tokens_per_second"] = speed
        line["seconds"] = spent + now - began
        log(line)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", tokens_s=f"{speed:.0f}")
        bar.update(k + 1 - last_logged)
        mark, tokens, last_logged = now, 0.0, k + 1
      if (k + 1) % config.checkpoint_every == 0:
        checkpoint.save(saved, k + 1, state)
      if preempted(k + 1):
        return state, k + 1 < config.steps
  return state, False


@contextmanager
def _log(workdir: Path) -> Iterator[Any]:
  """A function that appends one line of metrics to both logs."""
  if not peers.is_first():
    yield lambda line: None
    return
  from tensorboardX import SummaryWriter  # imports torch where it finds it

  board = SummaryWriter(str(workdir / "tensorboard"))
  with (workdir / "metrics.jsonl").open("a") as out:

    def log(line: dict[str, float | int]) -> None:
      out.write(json.dumps(line) + "\n")
      out.flush()
      for name, value in line.items():
        board.add_scalar(name, value, int(line["step"]))

    yield log
  board.close()


def _trim_log(path: Path, step: int) -> float:
  """Drops lines of steps after the checkpoint; returns the seconds spent.

  A run killed between two checkpoints repeats the steps since the first, and
  a line half written ends the file.
  """
  if not path.is_file():
    return 0.0
  kept = []
  for text in path.read_text().splitlines():
    try:
      line = json.loads(text)
    except json.JSONDecodeError:
      break
    if line["step"] <= step:
      kept.append(line)
  path.write_text("".join(json.dumps(line) + "\n" for line in kept))
  return kept[-1]["seconds"] if kept else 0.0


def _counters(state: TrainState) -> dict[str, Any]:
  return {
    "step": int(state.step),
    "tokens": float(state.tokens),
    "skipped": int(state.skipped),
  }


def _logged(workdir: Path) -> dict[str, Any]:
  text = (workdir / "metrics.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in text]
  last = [line["loss"] for line in lines[-10:]]
  return {"loss": float(np.mean(last)), "seconds": lines[-1]["seconds"]}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _check_recipe(config: Config, workdir: Path) -> None:
  """Refuses to resume a workdir that another recipe made.

  Raises:
    ValueError: names the first key that differs, with both values.
  """
  path = workdir / "config.json"
  if not path.is_file() or not (workdir / "checkpoints").is_dir():
    return
  if not config.resume:
    raise ValueError(
      f"{workdir}: holds a run already and config.resume is False; name a new "
      "--workdir, or delete this one"
    )
  # A key that came after the run began had what is its default now.
  before = _flat(default().to_dict()) | _flat(json.loads(path.read_text()))
  after = _flat(config.to_dict())
  for key in sorted(before.keys() | after.keys()):
    free = any(key == k or key.startswith(k + ".") for k in _FREE_KEYS)
    if not free and before.get(key) != after.get(key):
      raise ValueError(
        f"{workdir}: made with {key} = {before.get(key)!r}, now "
        f"{after.get(key)!r}; set it back to go on, or name a new --workdir"
      )


def _write_recipe(config, workdir, model: RewardModel, tokenizer) -> None:
  """config.json, model.json and the tokenizer; what `score.load` reads.

  Raises:
    ValueError: the workdir's model was trained on another prompt template.
  """
  path = workdir / "model.json"
  described = reward.describe(model)
  described["template_fingerprint"] = template.fingerprint(tokenizer)
  described["tokenizer_fingerprint"] = tokenizer.fingerprint()
  described["temperature"] = 1.0
  if path.is_file() and (workdir / "checkpoints").is_dir():
    before = json.loads(path.read_text())
    for name in ("template_fingerprint", "tokenizer_fingerprint"):
      if before.get(name) != described[name]:
        raise ValueError(
          f"{workdir}: {name} was {before.get(name)}, now {described[name]}; "
          "go on with the code and tokenizer that began it, or name a new "
          "--workdir"
        )
    described["temperature"] = before.get("temperature", 1.0)
  tokenizer.save(workdir)
  _write_json(workdir / "config.json", config.to_dict())
  _write_json(path, described)


def _write_json(path: Path, content: dict[str, Any]) -> None:
  """Writes beside and renames, so that a killed run leaves no half file."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=2) + "\n")
  os.replace(partial, path)
