"""DynaBench as published: dialogues under written policies, PASS or FAIL."""

import re
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.shapes import drop, settled, text_id
from csrm_jax.data.sets.tables import records

FILES = ("DynaBench/",)
_ROLES = {"User": "user", "Agent": "assistant"}


def turns(transcript: str) -> list[dict[str, str]]:
  """Messages of a transcript whose turns open with User: or Agent:."""
  parts = re.split(r"(?:^|\n)\s*'?(User|Agent)'?:", transcript)
  return [
    {"role": _ROLES[role], "content": said.strip()}
    for role, said in zip(parts[1::2], parts[2::2], strict=True)
    if said.strip()
  ]


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Label rows: the policy as it stands is the spec.

  The label is on the whole dialogue: a FAIL may be about an earlier turn, so
  score with the any-turn verdict. What the user says after the last response
  is cut off and counted.
  """
  name = "hf_dynabench"
  raws = settled(
    (
      raw | {"id": text_id(name, raw["policy"], raw["transcript"])}
      for _, raw in records(
        path, name, FILES[0][:-1], ("policy", "transcript", "label"), {}
      )
    ),
    lambda raw: (raw["policy"], raw["transcript"]),
    lambda raw: raw["label"],
    name=name,
    counts=counts,
  )
  for raw in raws:
    messages = turns(raw["transcript"])
    if messages and messages[-1]["role"] == "user":
      counts[f"{name}_cut_last_user_turn"] = (
        counts.get(f"{name}_cut_last_user_turn", 0) + 1
      )
      while messages and messages[-1]["role"] == "user":
        messages.pop()
    if not messages:
      drop(counts, name, "no_response")
      continue
    if raw["label"] not in ("PASS", "FAIL"):
      raise ValueError(
        f"{name}: policy {raw['policy'][:40]!r}: field 'label': "
        f"{raw['label']!r}: must be PASS or FAIL"
      )
    yield {
      "id": raw["id"],
      "messages": messages,
      "label": int(raw["label"] == "PASS"),
      "spec": raw["policy"],
      "source": name,
      "family": hash_family("\n".join(m["content"] for m in messages)),
    }
