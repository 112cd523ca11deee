"""CoSApien as published: prompts under the safety configs of five firms."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.shapes import drop, pseudo, settled, text_id
from csrm_jax.data.sets.tables import records

FILES = ("CoSApien/",)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Label rows: a pseudo-response under the firm's config as it stands.

  Only an allowed prompt complies; one that is allowed in part does not.
  """
  name = "hf_cosapien"
  raws = settled(
    (
      raw | {"id": text_id(name, raw["scenario"], raw["prompt"])}
      for _, raw in records(
        path, name, FILES[0][:-1], ("prompt", "scenario", "type"), {}
      )
    ),
    lambda raw: (raw["scenario"], raw["prompt"]),
    lambda raw: raw["type"],
    name=name,
    counts=counts,
  )
  for raw in raws:
    kind = raw["type"].strip().lower()
    if not kind.startswith(("allowed", "disallowed", "partial")):
      drop(counts, name, "unknown_type")
      continue
    yield {
      "id": raw["id"],
      "messages": pseudo(raw["prompt"]),
      "label": int(kind.startswith("allowed")),
      "spec": raw["scenario"],
      "source": name,
      "family": hash_family(raw["prompt"]),
    }
