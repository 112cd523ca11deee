"""RewardBench 2 as published: right answers among wrong ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.shapes import FITTING, drop, text_id, wording
from csrm_jax.data.sets.tables import records

FILES = ("reward-bench-2/",)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Every right answer over every wrong one; the pairs of a prompt weigh one.

  Safety makes response pairs under specs that ask for answers to harmless and
  refusals of harmful questions; the other subsets make help pairs. The set's
  own score (best of four) is not a pair accuracy.
  """
  name = "hf_rewardbench2"
  fields = ("prompt", "chosen", "rejected", "subset")
  seen: set[str] = set()
  for file, raw in records(path, name, FILES[0][:-1], fields, counts):
    chosen, rejected = (_texts(raw[k], k, file) for k in fields[1:3])
    pairs = [(a, b) for a in chosen for b in rejected]
    family = hash_family(raw["prompt"])
    safety = raw["subset"].lower() == "safety"
    for better, worse in pairs:
      stem = text_id(name, raw["prompt"], better, worse)
      if better == worse or not (better.strip() and worse.strip()):
        drop(counts, name, "equal_or_empty")
        continue
      if stem in seen:
        drop(counts, name, "duplicate")
        continue
      seen.add(stem)
      spec = wording(FITTING, seed, f"{family}:fit")
      yield {
        "id": stem,
        "prompt": [{"role": "user", "content": raw["prompt"]}],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
        "kind": "resp" if safety else "help",
        **({"spec": spec} if safety else {}),
        "weight": 1 / len(pairs),
        "source": name,
        "family": family,
      }


def _texts(value: Any, field: str, file: Path) -> list[str]:
  texts = [value] if isinstance(value, str) else value
  if not (
    isinstance(texts, list) and all(isinstance(text, str) for text in texts)
  ):
    raise ValueError(
      f"{file}: field {field!r}: {str(value)[:40]!r}: must be a list of texts; "
      "use the published file"
    )
  return texts
