"""XSTest: who refuses what only sounds dangerous, and what really is."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import (
  FITTING,
  HARMLESSNESS,
  exchange,
  pseudo,
  refusal_rows,
  settled,
  text_id,
  wording,
)
from csrm_jax.data.sets.tables import records

HF_FILES = ("XSTest/",)
FILES = ("xstest_completions/completions.jsonl.gz",)
_VOTES = ("annotation_1", "annotation_2", "final_label")
_FULL, _REFUSED, _PART = (
  "1_full_compliance",
  "2_full_refusal",
  "3_partial_refusal",
)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Completions under "must answer", "must decline" and "must fit".

  Labels are means over two annotators and the adjudicated label, so they are
  soft where annotators disagree. A partial refusal breaks both of the first
  two: it refuses in part, and answers in part.
  """
  name = "xstest_completions"
  fields = ("id", "prompt_label", "prompt", "completion", *_VOTES)
  raws = settled(
    objects(find(path, name, *FILES), fields),
    lambda raw: (raw["prompt"], raw["completion"]),
    lambda raw: tuple(sorted(raw[v] for v in _VOTES)),
    name=name,
    counts=counts,
  )
  for raw in raws:
    votes = [raw[field] for field in _VOTES]
    if not {*votes} <= {_FULL, _REFUSED, _PART} or (
      raw["prompt_label"] not in ("safe", "unsafe")
    ):
      raise ValueError(
        f"{name}: row {raw['id']!r}: field 'final_label' or 'prompt_label': "
        f"{votes}, {raw['prompt_label']!r}; use the original file"
      )
    messages = exchange(raw["prompt"], raw["completion"])
    answered, refused = (votes.count(v) / 3 for v in (_FULL, _REFUSED))
    yield from refusal_rows(
      raw["id"],
      messages,
      1 - answered,
      declined=refused,
      name=name,
      seed=seed,
    )
    family = hash_family(raw["prompt"])
    yield {
      "id": f"{raw['id']}/must_fit",
      "messages": messages,
      "label": answered if raw["prompt_label"] == "safe" else refused,
      "spec": wording(FITTING, seed, f"{family}:fit"),
      "source": name,
      "family": family,
    }


def hf_rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """The published prompts, as pseudo-responses under harmlessness.

  Where the file has no labels, types that begin with "contrast" are unsafe.
  """
  name = "hf_xstest"
  raws = settled(
    (
      raw | {"id": text_id(name, raw["prompt"])}
      for _, raw in records(
        path, name, HF_FILES[0][:-1], ("prompt", "type"), {}
      )
    ),
    lambda raw: (raw["prompt"],),
    lambda raw: (raw.get("label"), raw["type"]),
    name=name,
    counts=counts,
  )
  for raw in raws:
    unsafe = raw["type"].startswith("contrast")
    label = raw.get("label") or ("unsafe" if unsafe else "safe")
    if label not in ("safe", "unsafe"):
      raise ValueError(
        f"{name}: prompt {raw['prompt'][:40]!r}: field 'label': {label!r}: "
        "must be 'safe' or 'unsafe'"
      )
    family = hash_family(raw["prompt"])
    yield {
      "id": raw["id"],
      "messages": pseudo(raw["prompt"]),
      "label": int(label == "safe"),
      "spec": wording(HARMLESSNESS, seed, family),
      "source": name,
      "family": family,
    }
