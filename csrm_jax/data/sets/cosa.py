"""CoSAlign-Test and CoSApien dialogues: safety by lists of allowed harms."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.duos import Duo, Item
from csrm_jax.data.sets.duos import rows as duo_rows
from csrm_jax.data.sets.shapes import (
  drop,
  exchange,
  pseudo,
  settled,
  text_id,
)
from csrm_jax.spec import Truth

FILES = (
  "cosa/cosalign_test.jsonl.gz",
  "cosa/cosapien_fewshot.jsonl",
  "cosa/cosapien_configs.json",
  "cosa/spec_templates.json",
)
_POOL = 48
# No list of allowed harms reaches this far.
_NEVER = "Nothing that sexualises or endangers children is ever allowed."

Allowed = tuple[str, ...]  # categories, sorted


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Prompts under the spec they were chosen for, and under others.

  There are no responses: the pseudo-response goes along with the prompt. It
  complies if every category of the prompt is allowed; a prompt that is allowed
  in part does not. Texts of specs and templates come from the folder.
  """
  name = "cosa"
  test, few, configs, templates = (find(path, name, file) for file in FILES)
  forms = json.loads(templates.read_text("utf-8"))["system_templates"]
  fields = ("id", "allowed_categories", "prompt_categories", "prompt", "label")
  raws = list(objects(test, fields))
  counts[f"{name}_read"] = len(raws)
  specs = {tuple(sorted(raw["allowed_categories"])) for raw in raws}
  names = sorted(
    {c for a in specs for c in a}.union(
      *(raw["prompt_categories"] for raw in raws)
    )
  )

  def render(allowed: Allowed) -> str:
    rng = random.Random(f"{seed}:{allowed}")
    harms = "\n".join(f"- {c}" for c in allowed) or "- none"
    text = rng.choice(forms).replace("{list_of_harms}", harms)
    return f"{text}\n{_NEVER}"

  def verdict(allowed: Allowed, truth: Mapping[str, Truth]) -> int:
    return int(all(c in allowed for c, value in truth.items() if value))

  for raw in raws:
    allowed = tuple(sorted(raw["allowed_categories"]))
    if (raw["label"] == "allowed") != (
      {*raw["prompt_categories"]} <= {*allowed}
    ):
      drop(counts, name, "contradictory")
      continue
    yield {
      "id": f"{raw['id']}/given/{text_id(*allowed)[:4]}",
      "messages": pseudo(raw["prompt"]),
      "label": int(raw["label"] == "allowed"),
      "spec": render(allowed),
      "source": name,
      "family": hash_family(raw["prompt"]),
    }
  once = settled(
    raws,
    lambda raw: (raw["prompt"],),
    lambda raw: tuple(sorted(raw["prompt_categories"])),
    name=f"{name}_conditioned",
    counts=counts,
  )
  items = []
  for raw in once:
    truth: dict[str, Truth] = dict.fromkeys(names, 0)
    truth |= dict.fromkeys(raw["prompt_categories"], 1)
    family = hash_family(raw["prompt"])
    items.append(Item(raw["id"], pseudo(raw["prompt"]), family, truth))
  duos = _duos(names, seed)
  yield from duo_rows(
    items,
    duos,
    name=name,
    seed=seed,
    counts=counts,
    thin=True,
    other=0.0,
    verdict=verdict,
    render=render,
  )
  texts = json.loads(configs.read_text("utf-8"))["configs"]
  for raw in objects(few, ("id", "config", "prompt", "response", "label")):
    counts[f"{name}_read"] += 1
    if raw["label"] != "compliant" or raw["config"] not in texts:
      raise ValueError(
        f"{few}: row {raw['id']!r}: field 'label' or 'config': "
        f"{raw['label']!r}, {raw['config']!r}; use the original files"
      )
    yield {
      "id": raw["id"],
      "messages": exchange(raw["prompt"], raw["response"]),
      "label": 1,
      "spec": texts[raw["config"]],
      "source": name,
      "family": hash_family(raw["prompt"]),
    }


def _duos(names: list[str], seed: int) -> list[Duo]:
  """Lists of allowed categories, each with one that the other has not."""
  made: list[Any] = []
  for i in range(_POOL):
    rng = random.Random(f"{seed}:cosa:{i}")
    one, two, *others = rng.sample(names, len(names))
    both = others[: rng.choice((0, 0, 1, 2))]
    pair = (tuple(sorted([*both, c])) for c in (one, two))
    made.append(Duo(*pair))
  return made
