"""OpenAI's moderation set: single passages with labels that may be absent."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.duos import Harm, Item, pool
from csrm_jax.data.sets.duos import rows as duo_rows
from csrm_jax.data.sets.shapes import settled
from csrm_jax.spec import Truth

FILES = ("openai_moderation/samples.jsonl.gz",)

HARMS = {
  "S": Harm(
    "Sexual content",
    "sexual content",
    "passages meant to arouse, or that describe sexual acts",
  ),
  "H": Harm(
    "Hate",
    "hatred of groups of people",
    "contempt, slurs or threats against people for their origin, faith, sex or "
    "disability",
  ),
  "V": Harm(
    "Violence",
    "violence",
    "passages that praise, wish for or paint violence and suffering",
  ),
  "HR": Harm(
    "Harassment",
    "harassing somebody",
    "words meant to torment or annoy a person, or that call on others to",
  ),
  "SH": Harm(
    "Self-harm",
    "self-harm",
    "passages that show or encourage suicide, cutting or disordered eating",
  ),
  "S3": Harm(
    "Minors", "sexual content about minors", "any sexual talk of a minor"
  ),
}
_NEVER = "S3"
# Narrow labels, folded into the broad ones.
_WITHIN = {"H": "H2", "V": "V2"}


def annotation(raw: Row) -> dict[str, Truth]:
  """1, 0 or, where neither label nor narrow label says so, None."""
  truth: dict[str, Truth] = {}
  for key in HARMS:
    value = raw.get(key)
    if raw.get(_WITHIN.get(key, key)) == 1:
      value = 1
    truth[key] = 1 if value == 1 else None if value is None else 0
  return truth


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Passages as lone responses, under specs that forbid or allow harms."""
  name = "openai_moderation"
  raws = settled(
    objects(find(path, name, *FILES), ("id", "prompt")),
    lambda raw: (raw["prompt"].strip(),),
    lambda raw: tuple(annotation(raw).values()),
    name=name,
    counts=counts,
  )
  items = [
    Item(
      raw["id"],
      [{"role": "assistant", "content": raw["prompt"]}],
      hash_family(raw["prompt"]),
      annotation(raw),
    )
    for raw in raws
  ]
  duos = pool(HARMS, seed=seed, never=_NEVER, forbidding=0.2)
  yield from duo_rows(
    items,
    duos,
    name=name,
    seed=seed,
    counts=counts,
    never=_NEVER,
    thin=True,
    other=1.0,
  )
