"""HarmBench and XSTest responses: harmful or not, refused or not."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import (
  HARMLESSNESS,
  exchange,
  refusal_rows,
  settled,
  wording,
)

FILES = (
  "guard_response_labels/harmbench_response.jsonl",
  "guard_response_labels/xstest_response_harm.jsonl",
  "guard_response_labels/xstest_response_refusal.jsonl",
)
# Without XSTest's prompts, on which others are evaluated.
HARMBENCH_FILES = FILES[:1]
_TRUE = {"harmful": 1, "unharmful": 0, "refusal": 1, "compliance": 0}


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Harm under harmlessness; refusals under "must answer", "must decline"."""
  yield from _rows("guard_response_labels", FILES, path, seed, counts)


def harmbench_rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """As `rows`, of HarmBench alone: all of them under harmlessness."""
  yield from _rows("harmbench_responses", HARMBENCH_FILES, path, seed, counts)


def _rows(
  name: str,
  files: Sequence[str],
  path: str | Path | None,
  seed: int,
  counts: dict[str, int],
) -> Iterator[Row]:
  fields = ("id", "prompt", "response", "label")
  found = [find(path, name, file) for file in files]
  raws = settled(
    (raw | {"file": f.stem} for f in found for raw in objects(f, fields)),
    lambda raw: (raw["file"][-7:], raw["prompt"], raw["response"]),
    lambda raw: raw["label"],
    name=name,
    counts=counts,
  )
  for raw in raws:
    if raw["label"] not in _TRUE:
      raise ValueError(
        f"{name}: row {raw['id']!r}: field 'label': {raw['label']!r}: must be "
        f"one of {', '.join(_TRUE)}"
      )
    value = _TRUE[raw["label"]]
    messages = exchange(raw["prompt"], raw["response"])
    if raw["label"] in ("refusal", "compliance"):
      yield from refusal_rows(raw["id"], messages, value, name=name, seed=seed)
      continue
    family = hash_family(raw["prompt"])
    yield {
      "id": raw["id"],
      "messages": messages,
      "label": 1 - value,
      "spec": wording(HARMLESSNESS, seed, family),
      "source": name,
      "family": family,
    }
