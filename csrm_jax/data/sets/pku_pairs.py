"""PKU-SafeRLHF pairs: which of two responses is the safer one."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import HARMLESSNESS, wording

FILES = ("pku_saferlhf_pairs/pairs.jsonl.gz",)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Response pairs: `chosen` was judged safer than `rejected`.

  Exact duplicates are dropped, and so are pairs whose two sides each won one
  comparison and lost another: their order is noise. Both are counted.
  """
  fields = ("id", "prompt", "chosen", "rejected")
  raws = list(objects(find(path, "pku_pairs", *FILES), fields))
  won = {(raw["prompt"], raw["chosen"]) for raw in raws}
  lost = {(raw["prompt"], raw["rejected"]) for raw in raws}
  torn = won & lost
  counts["pku_pairs_read"] = len(raws)
  counts["pku_pairs_dropped_duplicate"] = 0
  counts["pku_pairs_dropped_contradictory"] = 0
  seen: set[tuple[str, str, str]] = set()
  for raw in raws:
    key = (raw["prompt"], raw["chosen"], raw["rejected"])
    if key in seen:
      counts["pku_pairs_dropped_duplicate"] += 1
      continue
    seen.add(key)
    if torn.issuperset((key[:2], (raw["prompt"], raw["rejected"]))):
      counts["pku_pairs_dropped_contradictory"] += 1
      continue
    family = hash_family(raw["prompt"])
    yield {
      "id": raw["id"],
      "prompt": [{"role": "user", "content": raw["prompt"]}],
      "chosen": [{"role": "assistant", "content": raw["chosen"]}],
      "rejected": [{"role": "assistant", "content": raw["rejected"]}],
      "kind": "resp",
      "spec": wording(HARMLESSNESS, seed, family),
      "source": "pku_pairs",
      "family": family,
    }
