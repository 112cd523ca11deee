"""PyRIT's scorer evaluations: graded severity by human raters, and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import (
  drop,
  exchange,
  refusal_rows,
  settled,
  text_id,
)
from csrm_jax.spec import Rule, Spec, Subcategory

_DEFINITIONS = (
  "exploits",
  "hate_speech",
  "information_integrity",
  "privacy",
  "representational",
  "self_harm",
  "sexual",
  "violence",
)
_TASKS = ("harm_severity", "objective_achieved", "refusal")
FILES = (
  *(f"pyrit_scored/{task}.jsonl" for task in _TASKS),
  *(f"pyrit_scored/harm_definitions/{d}.yaml" for d in _DEFINITIONS),
)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Responses under thresholds on a written five-point scale; refusals.

  A response of level k is judged where k and up are forbidden and where only
  k + 1 and up are: two label rows and a spec pair. So every threshold sees as
  many responses just below as just above it. Labels are the share of raters
  that put the response below the threshold; `severity` is their mean level, 1
  to 5. Whether an attack's objective was achieved, or the response a refusal,
  is judged under "must answer" and "must decline".
  """
  name = "pyrit_scored"
  found = [find(path, name, file) for file in FILES]
  fields = ("id", "task", "harm_definition", "objective", "response")
  raws = settled(
    (
      raw
      for file in found[: len(_TASKS)]
      for raw in objects(file, (*fields, "human_scores"))
    ),
    lambda raw: (
      raw["task"],
      str(raw["harm_definition"]),
      raw["objective"],
      raw["response"],
    ),
    lambda raw: tuple(raw["human_scores"]),
    name=name,
    counts=counts,
  )
  scales = {
    file.stem: scale(yaml.safe_load(file.read_text("utf-8")), str(file))
    for file in found[len(_TASKS) :]
  }
  for raw in raws:
    if not raw["human_scores"]:
      drop(counts, name, "unrated")
      continue
    messages = exchange(raw["objective"], raw["response"])
    scores = raw["human_scores"]
    share = sum(scores) / len(scores)
    stem = f"{raw['id']}/{text_id(raw['response'])[:4]}"
    if raw["task"] == "refusal":
      yield from refusal_rows(stem, messages, share, name=name, seed=seed)
    elif raw["task"] == "objective_achieved":
      yield from refusal_rows(stem, messages, 1 - share, name=name, seed=seed)
    elif raw["harm_definition"] not in scales:
      raise ValueError(
        f"{name}: row {raw['id']!r}: field 'harm_definition': "
        f"{raw['harm_definition']!r}: must be one of {', '.join(scales)}"
      )
    else:
      specs = scales[raw["harm_definition"]]
      yield from _graded(raw, stem, messages, specs)


def scale(definition: Any, origin: str) -> dict[int, str]:
  """By threshold, 2 to 5: the spec that forbids this level and those above.

  Raises:
    ValueError: the definition has not the five levels.
  """
  levels = {
    int(level["score_value"]): level["description"]
    for level in definition.get("scale_descriptions", ())
  }
  if sorted(levels) != [1, 2, 3, 4, 5]:
    raise ValueError(
      f"{origin}: field 'scale_descriptions': levels {sorted(levels)}; there "
      "must be 1 to 5"
    )
  steps = tuple(
    Subcategory(id=str(k), title=text, severity=k) for k, text in levels.items()
  )
  title = definition["category"].replace("_", " ").capitalize()
  return {
    k: Spec(
      rules=(
        Rule(
          id="scale",
          title=title,
          polarity="forbid",
          level=k,
          subcategories=steps,
        ),
      )
    ).render()
    for k in (2, 3, 4, 5)
  }


def _graded(
  raw: Row,
  stem: str,
  messages: list[dict[str, str]],
  specs: dict[int, str],
) -> Iterator[Row]:
  levels = [1 + 4 * score for score in raw["human_scores"]]
  mean = sum(levels) / len(levels)
  common = {
    "messages": messages,
    "source": "pyrit_scored",
    "family": hash_family(raw["objective"]),
  }
  own = int(mean + 0.5)
  labels = {
    k: sum(level < k for level in levels) / len(levels)
    for k in (own, own + 1)
    if k in specs
  }
  for k, label in labels.items():
    yield {
      "id": f"{stem}/{k}",
      **common,
      "label": label,
      "severity": mean,
      "spec": specs[k],
    }
  if len(labels) == 2 and labels[own + 1] > labels[own]:
    yield {
      "id": f"{stem}/duo",
      **common,
      "chosen_spec": specs[own + 1],
      "rejected_spec": specs[own],
      "weight": labels[own + 1] - labels[own],
    }
