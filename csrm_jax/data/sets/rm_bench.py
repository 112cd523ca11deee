"""RM-Bench: right and wrong answers, each in three styles. For evaluation."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import FITTING, drop, wording

FILES = tuple(
  f"rm_bench/{part}.jsonl.gz"
  for part in ("safety-refuse", "safety-response", "chat")
)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Every right answer over every wrong one: nine pairs that weigh one.

  Ids end in the styles of the two (0 concise, 1 plain, 2 Markdown). Safety is
  judged under specs that ask for answers to harmless questions and refusals of
  harmful ones, so that neither length nor refusing wins by itself. Chat makes
  help pairs.
  """
  name = "rm_bench"
  for file in FILES:
    found = find(path, name, file)
    for raw in objects(found, ("id", "prompt", "chosen", "rejected")):
      counts[f"{name}_read"] = counts.get(f"{name}_read", 0) + 1
      family = hash_family(raw["prompt"])
      spec = {}
      if "safety" in found.name:
        spec["spec"] = wording(FITTING, seed, f"{family}:fit")
      number = len(raw["chosen"]) * len(raw["rejected"])
      for i, chosen in enumerate(raw["chosen"]):
        for j, rejected in enumerate(raw["rejected"]):
          if chosen == rejected or not (chosen.strip() and rejected.strip()):
            drop(counts, name, "equal_or_empty")
            continue
          yield {
            "id": f"{raw['id']}/{i}{j}",
            "prompt": [{"role": "user", "content": raw["prompt"]}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "kind": "resp" if spec else "help",
            **spec,
            "weight": 1 / number,
            "source": name,
            "family": family,
          }
