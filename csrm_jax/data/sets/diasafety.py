"""DiaSafety: short chat replies, each judged for one kind of harm."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.duos import Harm, Item, pool
from csrm_jax.data.sets.duos import rows as duo_rows
from csrm_jax.data.sets.shapes import exchange, settled
from csrm_jax.spec import Truth

FILES = tuple(f"diasafety/{s}.jsonl.gz" for s in ("train", "val", "test"))

HARMS = {
  "Offending User": Harm(
    "Rudeness",
    "insulting the person one talks to",
    "mocking, belittling or abusing the user, or wishing them ill",
  ),
  "Risk Ignorance": Harm(
    "Warning signs",
    "brushing aside that the user may be in danger",
    "cheering on or passing over talk of self-harm, illness or danger that "
    "calls for concern",
  ),
  "Unauthorized Expertise": Harm(
    "Diagnosis",
    "playing the doctor",
    "telling the user which illness they have or which medicine or treatment "
    "to take, as only a physician should",
  ),
  "Toxicity Agreement": Harm(
    "Applause",
    "agreeing with hateful or hostile words",
    "taking the user's side, or laughing along, when they insult, threaten or "
    "wish harm to others",
  ),
  "Biased Opinion": Harm(
    "Prejudice",
    "prejudice against a group",
    "sweeping judgements on people for their origin, sex, faith, politics or "
    "looks",
  ),
}
# A reply was judged for one category alone. Of an unsafe one, what is far from
# it in meaning counts as absent; all else is unknown.
_HOSTILE = {"Offending User", "Toxicity Agreement", "Biased Opinion"}
_FAR = {
  "Unauthorized Expertise": _HOSTILE,
  "Risk Ignorance": {"Biased Opinion"},
  "Offending User": {"Unauthorized Expertise"},
  "Toxicity Agreement": {"Unauthorized Expertise"},
  "Biased Opinion": {"Unauthorized Expertise", "Risk Ignorance"},
}


def annotation(category: str, unsafe: bool) -> dict[str, Truth]:
  """1, 0 or None for each of the five."""
  truth: dict[str, Truth] = dict.fromkeys(HARMS)
  if unsafe:
    truth |= dict.fromkeys(_FAR[category], 0)
  truth[category] = 1 if unsafe else 0
  return truth


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Label rows and spec pairs; safe replies under their category's rule."""
  name = "diasafety"
  fields = ("id", "prompt", "response", "category", "label")
  found = [find(path, name, file) for file in FILES]
  raws = settled(
    (raw for file in found for raw in objects(file, fields)),
    lambda raw: (raw["prompt"], raw["response"], raw["category"]),
    lambda raw: raw["label"],
    name=name,
    counts=counts,
  )
  items = []
  for raw in raws:
    if raw["category"] not in HARMS or raw["label"] not in ("safe", "unsafe"):
      raise ValueError(
        f"{name}: row {raw['id']!r}: field 'category' or 'label': "
        f"{raw['category']!r}, {raw['label']!r}; use the original files"
      )
    items.append(
      Item(
        raw["id"],
        exchange(raw["prompt"], raw["response"]),
        hash_family(raw["prompt"]),
        annotation(raw["category"], raw["label"] == "unsafe"),
      )
    )
  duos = pool(HARMS, seed=seed, forbidding=0.0)
  yield from duo_rows(
    items, duos, name=name, seed=seed, counts=counts, thin=True
  )
