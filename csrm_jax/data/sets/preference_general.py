"""Preferences for helpfulness: PandaLM, LLMBar, HHH, LLaMA-Factory's demo."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.shapes import HARMLESSNESS, drop, wording

FILES = tuple(
  f"preference_general/{file}"
  for file in (
    "pandalm_human.jsonl.gz",
    "llmbar.jsonl",
    "hhh_alignment.jsonl",
    "llamafactory_dpo_en.jsonl.gz",
  )
)
_NAME = "preference_general"
_SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Help pairs; the harmless part of HHH makes response pairs.

  A PandaLM pair weighs its annotators' lead: three to none is 1, two to one a
  third. Ties and pairs without a lead are dropped.
  """
  pandalm, llmbar, hhh, factory = (find(path, _NAME, file) for file in FILES)
  made = [
    *_pandalm(pandalm, counts),
    *_llmbar(llmbar),
    *_hhh(hhh, seed),
    *_factory(factory),
  ]
  counts[f"{_NAME}_read"] = len(made) + sum(
    counts.get(f"{_NAME}_dropped_{r}", 0) for r in ("tie", "not_text")
  )
  pairs = {
    row["id"]: tuple(str(row[k]) for k in ("prompt", "chosen", "rejected"))
    for row in made
  }
  ways = set(pairs.values())
  seen = set()
  for row in sorted(made, key=lambda r: r["id"]):
    prompt, chosen, rejected = pairs[row["id"]]
    texts = [m["content"] for k in ("chosen", "rejected") for m in row[k]]
    if not all(text.strip() for text in texts):
      drop(counts, _NAME, "empty")
    elif chosen == rejected or (prompt, rejected, chosen) in ways:
      drop(counts, _NAME, "contradictory")
    elif (prompt, chosen, rejected) in seen:
      drop(counts, _NAME, "duplicate")
    else:
      seen.add((prompt, chosen, rejected))
      yield row


def _pair(
  stem: str,
  prompt: str | list[dict[str, str]],
  chosen: str,
  rejected: str,
  kind: str = "help",
) -> Row:
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  return {
    "id": stem,
    "prompt": prompt,
    "chosen": [{"role": "assistant", "content": chosen}],
    "rejected": [{"role": "assistant", "content": rejected}],
    "kind": kind,
    "source": _NAME,
    "family": hash_family("\n".join(m["content"] for m in prompt)),
  }


def _pandalm(path: Path, counts: dict[str, int]) -> Iterator[Row]:
  voters = ("annotator1", "annotator2", "annotator3")
  fields = ("id", "instruction", "input", "response1", "response2", *voters)
  for raw in objects(path, fields):
    votes = [raw[v] for v in voters]
    if not {str} >= {type(raw["response1"]), type(raw["response2"])}:
      drop(counts, _NAME, "not_text")
      continue
    lead = votes.count(1) - votes.count(2)
    if not lead:
      drop(counts, _NAME, "tie")
      continue
    prompt = "\n\n".join(filter(None, (raw["instruction"], raw["input"])))
    sides = (raw["response1"], raw["response2"])
    chosen, rejected = sides if lead > 0 else sides[::-1]
    row = _pair(raw["id"], prompt, chosen, rejected)
    yield row | {"weight": abs(lead) / len(votes)}


def _llmbar(path: Path) -> Iterator[Row]:
  for raw in objects(path, ("id", "input", "output_1", "output_2", "label")):
    sides = (raw["output_1"], raw["output_2"])
    chosen, rejected = sides if raw["label"] == 1 else sides[::-1]
    yield _pair(raw["id"], raw["input"], chosen, rejected)


def _hhh(path: Path, seed: int) -> Iterator[Row]:
  for raw in objects(path, ("id", "aspect", "prompt", "chosen", "rejected")):
    harmless = raw["aspect"] == "harmless"
    row = _pair(
      raw["id"],
      raw["prompt"],
      raw["chosen"],
      raw["rejected"],
      "resp" if harmless else "help",
    )
    if harmless:
      row["spec"] = wording(HARMLESSNESS, seed, row["family"])
    yield row


def _factory(path: Path) -> Iterator[Row]:
  for raw in objects(path, ("id", "conversations", "chosen", "rejected")):
    prompt = [
      {"role": _SPEAKERS[turn["from"]], "content": turn["value"]}
      for turn in raw["conversations"]
    ]
    sides = (raw[k]["value"] for k in ("chosen", "rejected"))
    yield _pair(raw["id"], prompt, *sides)
