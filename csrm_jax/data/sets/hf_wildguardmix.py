"""WildGuardMix as published: harm of prompts and responses, and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.shapes import (
  HARMLESSNESS,
  drop,
  exchange,
  pseudo,
  refusal_rows,
  settled,
  text_id,
  wording,
)
from csrm_jax.data.sets.tables import records

FILES = ("wildguardmix/",)
_NAME = "hf_wildguardmix"
_LABELS = {
  "prompt_harm_label": ("unharmful", "harmful"),
  "response_harm_label": ("unharmful", "harmful"),
  "response_refusal_label": ("compliance", "refusal"),
}


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Responses under harmlessness, "must answer" and "must decline".

  A row without a response is judged by its prompt, as a pseudo-response. A
  label that is absent is not made up; where the file says which share of the
  annotators agreed, the label is that share.
  """
  fields = ("prompt", "response", *_LABELS)
  raws = settled(
    (
      raw | {"id": text_id(_NAME, raw["prompt"], raw["response"])}
      for _, raw in records(path, _NAME, FILES[0][:-1], fields, {})
    ),
    lambda raw: (raw["prompt"], raw["response"] or "no response"),
    lambda raw: tuple(raw[field] for field in _LABELS),
    name=_NAME,
    counts=counts,
  )
  for raw in raws:
    messages = pseudo(raw["prompt"])
    if raw["response"]:
      messages = exchange(raw["prompt"], raw["response"])
    family = hash_family(raw["prompt"])
    side = "response" if raw["response"] else "prompt"
    harm = probability(raw, f"{side}_harm")
    if harm is None:
      drop(counts, _NAME, "unlabelled")
    else:
      yield {
        "id": f"{raw['id']}/{side}",
        "messages": messages,
        "label": 1 - harm,
        "spec": wording(HARMLESSNESS, seed, family),
        "source": _NAME,
        "family": family,
      }
    refused = probability(raw, "response_refusal")
    if raw["response"] and refused is not None:
      yield from refusal_rows(
        raw["id"], messages, refused, name=_NAME, seed=seed
      )


def probability(raw: Row, what: str) -> float | None:
  """Of harm or refusal; None if the row does not say.

  Raises:
    ValueError: the label is none of the published ones.
  """
  label: Any = raw[f"{what}_label"]
  if label in (None, ""):
    return None
  if label not in _LABELS[f"{what}_label"]:
    raise ValueError(
      f"{_NAME}: prompt {raw['prompt'][:40]!r}: field '{what}_label': "
      f"{label!r}: must be one of {', '.join(_LABELS[f'{what}_label'])}"
    )
  sure = 1.0
  agreement: Any = raw.get(f"{what}_agreement")
  if isinstance(agreement, float | int) and 0.5 <= agreement <= 1:
    sure = float(agreement)
  return sure if label == _LABELS[f"{what}_label"][1] else 1 - sure
