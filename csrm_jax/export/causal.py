"""A policy as a Hugging Face folder: a causal model and its chat template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from csrm_jax import storage
from csrm_jax.data import prompt, template
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.export import huggingface
from csrm_jax.model import lora, names
from csrm_jax.model.reward import RewardModel
from csrm_jax.storage import AnyPath
from csrm_jax.types import Params

MARK = "csrm_policy"  # key of config.json by which we know our folders


def export_policy(
  model: RewardModel,
  params: Params,
  tokenizer: Tokenizer,
  output: str | AnyPath,
) -> AnyPath:
  """Writes a `*ForCausalLM` folder, float32, adapters merged.

  The tokenizer's chat template writes the prompts that the policy was trained
  on (`data.prompt`), and takes `spec=` if it is to follow one.

  Args:
    model: of the policy.
    params: all of its leaves.
    tokenizer: of the policy.
    output: folder to write, here or gs://; a policy there is replaced.

  Returns:
    The folder.

  Raises:
    ValueError: `output` holds something else, or the parameters lack the
      output embedding of an untied model.
  """
  output = storage.path(output)
  _check_output(output)
  architecture = model.architecture
  if not architecture.tied and "lm_head" not in params:
    raise ValueError(
      f"{output}: the parameters have no output embedding, so they are no"
      " policy; load them with language_model=True"
    )
  with storage.naming(output), storage.writing(output) as partial:
    merged = lora.merge(params, model.lora_alpha)
    huggingface.write_weights(partial, _tensors(merged, model))
    _write_configs(partial, model, tokenizer)
    tokenizer.save(
      partial,
      pad_token=template.pad_token(tokenizer),
      padding_side="left",
      model_max_length=architecture.context,
      model_input_names=["input_ids", "attention_mask"],
      chat_control_tokens=list(tokenizer.controls),
    )
    (partial / "chat_template.jinja").write_text(
      prompt.jinja(tokenizer), encoding="utf-8"
    )
  return output


def _tensors(
  params: Params, model: RewardModel
) -> Iterator[tuple[str, np.ndarray]]:
  for name, tensor in names.to_hf(params, model.architecture):
    if name != "lm_head.weight" or not model.architecture.tied:
      yield name, np.asarray(tensor, np.float32)


def _write_configs(
  folder: Path, model: RewardModel, tokenizer: Tokenizer
) -> None:
  """config.json, and generation_config.json with all tokens that stop."""
  ids: dict[str, Any] = {
    "pad_token_id": tokenizer.special(template.pad_token(tokenizer)),
    "eos_token_id": list(prompt.stop_ids(tokenizer)),
  }
  if (begin := tokenizer.config.get("bos_token")) in tokenizer.added:
    ids["bos_token_id"] = tokenizer.special(begin)
  config = model.architecture.to_config() | {
    "dtype": "float32",
    "torch_dtype": "float32",  # the spelling of transformers 4
    **ids,
    MARK: {"tokenizer_fingerprint": tokenizer.fingerprint()},
  }
  huggingface.write_json(folder / "config.json", config)
  huggingface.write_json(folder / "generation_config.json", ids)


def _check_output(output: AnyPath) -> None:
  """Refuses to replace what is no policy of ours."""
  if not output.exists() or (output.is_dir() and not any(output.iterdir())):
    return
  config = output / "config.json"
  if not config.is_file() or MARK not in json.loads(config.read_text()):
    raise ValueError(
      f"{output} holds files that are no policy of ours; move them, or name"
      " another folder"
    )
