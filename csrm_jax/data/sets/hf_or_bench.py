"""OR-Bench as published: prompts that only sound toxic, and toxic ones."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.shapes import (
  HARMLESSNESS,
  pseudo,
  settled,
  text_id,
  wording,
)
from csrm_jax.data.sets.tables import records

FILES = ("or-bench/",)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Pseudo-responses under harmlessness.

  The files say which is which: or-bench-toxic is unsafe, the others are safe.
  The 1k hard prompts are among the 80k: such duplicates are counted.
  """
  name = "hf_or_bench"
  raws = settled(
    (
      raw | {"id": text_id(name, raw["prompt"]), "toxic": "toxic" in file.stem}
      for file, raw in records(
        path, name, FILES[0][:-1], ("prompt", "category"), {}
      )
    ),
    lambda raw: (raw["prompt"],),
    lambda raw: raw["toxic"],
    name=name,
    counts=counts,
  )
  for raw in raws:
    family = hash_family(raw["prompt"])
    yield {
      "id": raw["id"],
      "messages": pseudo(raw["prompt"]),
      "label": int(not raw["toxic"]),
      "spec": wording(HARMLESSNESS, seed, family),
      "source": name,
      "family": family,
    }
