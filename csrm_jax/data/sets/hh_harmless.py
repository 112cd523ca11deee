"""HH-RLHF, harmless-base: which of two endings people found less harmful."""

import re
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import HARMLESSNESS, drop, wording

FILES = ("hh_harmless/pairs.jsonl.gz",)
_ROLES = {"Human": "user", "Assistant": "assistant"}


def turns(text: str) -> list[dict[str, str]]:
  """Messages of a dialogue whose turns open with Human: or Assistant:."""
  parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
  return [
    {"role": _ROLES[role], "content": said.strip()}
    for role, said in zip(parts[1::2], parts[2::2], strict=True)
  ]


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Response pairs; dialogues that part before the last turn are dropped."""
  name = "hh_harmless"
  raws = list(objects(find(path, name, *FILES), ("id", "chosen", "rejected")))
  counts[f"{name}_read"] = len(raws)
  found = []
  for raw in raws:
    chosen, rejected = turns(raw["chosen"]), turns(raw["rejected"])
    if not chosen or chosen[:-1] != rejected[:-1]:
      drop(counts, name, "other_history")
    elif not all(m["content"] for m in (*chosen, *rejected)):
      drop(counts, name, "empty")
    elif {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
      drop(counts, name, "no_response")
    else:
      found.append((raw["id"], chosen, rejected))
  ways = {(str(chosen), str(rejected)) for _, chosen, rejected in found}
  seen = set()
  for stem, chosen, rejected in sorted(found, key=lambda f: f[0]):
    way = (str(chosen), str(rejected))
    if way[::-1] in ways or way[0] == way[1]:
      drop(counts, name, "contradictory")
      continue
    if way in seen:
      drop(counts, name, "duplicate")
      continue
    seen.add(way)
    family = hash_family("\n".join(m["content"] for m in chosen[:-1]))
    yield {
      "id": stem,
      "prompt": chosen[:-1],
      "chosen": chosen[-1:],
      "rejected": rejected[-1:],
      "kind": "resp",
      "spec": wording(HARMLESSNESS, seed, family),
      "source": name,
      "family": family,
    }
