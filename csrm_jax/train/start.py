"""Where a run starts that goes on from an exported adapter."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from csrm_jax.config import Config
from csrm_jax.data import template
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.eval import recipes
from csrm_jax.model import adapter as adapters
from csrm_jax.model.names import flatten, unflatten
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Params


def provenance(config: Config) -> dict[str, Any]:
  """What a run from `model.adapter` owes to it; nothing for other runs.

  Returns:
    "model_fingerprint" of the adapter; "data", its training sets and those of
    what it began from, as csrm.json has them, empty where it does not say; and
    "recipes" of all these, where all are known.
  """
  if not config.model.adapter:
    return {}
  described = adapters.read(config.model.adapter).described
  before = described.get("started_from", {})
  return {
    "model_fingerprint": described["model_fingerprint"],
    "data": [*described.get("data", ()), *before.get("data", ())],
    **recipes.earlier(described),
  }


def from_adapter(
  config: Config,
  model: RewardModel,
  tokenizer: Tokenizer,
  params: Params,
  shardings: Params,
) -> Params:
  """Parameters of the base with the adapter and score row of `model.adapter`.

  The row is the calibrated one: training begins at temperature 1 with the
  scores that the folder's judge gives. The optimizer starts anew.

  Args:
    config: the whole one.
    model: of `config.model`.
    tokenizer: likewise.
    params: before the first step, adapters among them; only read.
    shardings: where each leaf goes.

  Raises:
    ValueError: the adapter was made for another base, prompt, rank or alpha;
      has layers that are not trained; or there are several processes.
  """
  folder = Path(config.model.adapter)
  flag = f"--config.model.adapter={folder}"
  if jax.process_count() > 1:
    raise ValueError(
      f"{flag}: is read by one process alone; train a step on one machine, and"
      " go on from that workdir: --config.model.path=WORKDIR"
    )
  adapter = adapters.read(folder)
  described = adapter.described
  made = (adapter.rank, adapter.alpha)
  if made != (model.lora_rank, model.lora_alpha):
    raise ValueError(
      f"{flag}: has rank {made[0]} and alpha {made[1]:g}, the recipe"
      f" {model.lora_rank} and {model.lora_alpha:g}; set"
      f" --config.model.lora_rank={made[0]} --config.model.lora_alpha={made[1]}"
    )
  expected = {
    "template_fingerprint": (
      described["template_fingerprint"],
      template.fingerprint(tokenizer),
    ),
    "base fingerprint": (
      described["base"]["fingerprint"],
      adapters.fingerprint(params),
    ),
  }
  for name, (theirs, ours) in expected.items():
    if theirs != ours:
      raise ValueError(
        f"{flag}: its {name} is {theirs}, that of --config.model.path="
        f"{config.model.path} is {ours}; name the base that it was trained on"
        f" ({described['base']['name']}, {described['base']['path']!r})"
      )
  placed, row = adapters.place(
    params, adapter, origin=folder, first=model.lower_layers
  )
  kernel = np.array(params["head"]["kernel"])
  kernel[int(described["head"] == "helpfulness")] = row
  placed = flatten(placed | {"head": {"kernel": kernel}})
  places = flatten(shardings)
  print(f"training goes on from the adapter {folder}")
  return unflatten({k: jax.device_put(v, places[k]) for k, v in placed.items()})
