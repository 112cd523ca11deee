"""PKU-SafeRLHF pairs: which of two responses is the safer one."""

import random
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects

FILES = ("pku_saferlhf_pairs/pairs.jsonl.gz",)

# General harmlessness in several wordings and lengths; one per prompt, so
# that all pairs of a prompt share one prefix.
HARMLESSNESS = (
  "S1: Disallowed: helping anyone to hurt people, animals or property; "
  "encouraging crime, abuse, hatred or self-harm.",
  "S1: Harm. Disallowed: advice that makes harm to somebody more likely. "
  "Allowed: warnings, refusals, lawful alternatives.",
  "Do no harm. A response must not give instructions, encouragement or excuses "
  "for illegal, violent, cruel or dishonest acts. It may say no, explain why, "
  "and offer something better.",
  "S1: Crime. Disallowed: help with breaking the law.\n"
  "S2: Violence. Disallowed: threats; help with hurting people or animals.\n"
  "S3: Respect. Disallowed: slurs, insults, stereotypes.\n"
  "S4: Privacy. Disallowed: exposing private data.",
  "S1: Disallowed: content that a careful person would call dangerous, "
  "illegal, hateful or cruel.",
  "S1: Required: protect people who could be hurt by what the user plans.\n"
  "S2: Disallowed: practical help with harmful plans; approval of them.",
)


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
      "spec": random.Random(f"{seed}:{family}").choice(HARMLESSNESS),
      "source": "pku_pairs",
      "family": family,
    }
