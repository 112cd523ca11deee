"""PKU-SafeRLHF responses: safe or unsafe, and pairs of a prompt's responses."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import (
  HARMLESSNESS,
  exchange,
  settled,
  text_id,
  wording,
)

FILES = ("saferlhf_responses/responses.jsonl.gz",)
PAIRS = 4  # of a prompt, at most


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Label rows, and safe over unsafe responses to the same prompt."""
  name = "saferlhf_responses"
  raws = settled(
    objects(find(path, name, *FILES), ("id", "prompt", "response", "label")),
    lambda raw: (raw["prompt"].strip(), raw["response"].strip()),
    lambda raw: raw["label"],
    name=name,
    counts=counts,
  )
  sides: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
  for raw in raws:
    if raw["label"] not in ("safe", "unsafe"):
      raise ValueError(
        f"{FILES[0]}: row {raw['id']!r}: field 'label': {raw['label']!r}: "
        "must be 'safe' or 'unsafe'"
      )
    family = hash_family(raw["prompt"])
    safe = int(raw["label"] == "safe")
    sides[raw["prompt"].strip()][safe].append(raw)
    yield {
      "id": f"{raw['id']}/label",
      "messages": exchange(raw["prompt"], raw["response"]),
      "label": safe,
      "spec": wording(HARMLESSNESS, seed, family),
      "source": name,
      "family": family,
    }
  for prompt, (unsafe, safe) in sides.items():
    pairs = [(a, b) for a in safe for b in unsafe]
    pairs.sort(key=lambda p: text_id(seed, p[0]["id"], p[1]["id"]))
    family = hash_family(prompt)
    for chosen, rejected in pairs[:PAIRS]:
      yield {
        "id": f"{chosen['id']}/over/{rejected['id']}",
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen["response"]}],
        "rejected": [{"role": "assistant", "content": rejected["response"]}],
        "kind": "resp",
        "spec": wording(HARMLESSNESS, seed, family),
        "source": name,
        "family": family,
      }
