"""Real answers against what is plainly no answer, as help pairs.

A thousand pairs of two honest answers do not teach a reward model that an
answer should be about its question: a policy that is trained for such a reward
finds that out. So each preferred answer also stands against the answer to
another question, a refusal, its own words in another order, and its own first
words over and over.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find
from csrm_jax.data.sets import answering, preference_general
from csrm_jax.data.sets.shapes import drop

NAME = "contrasts"
FILES = preference_general.FILES
_WORDS = (8, 60)  # of both sides, as sampled responses end anywhere
_LEAST = 4  # words, of an answer that can be put out of order


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Four help pairs for each prompt with a preferred answer."""
  for file in FILES:
    find(path, NAME, file)
  found: dict[str, Row] = {}
  for row in preference_general.rows(path, seed=seed, counts={}):
    if row["kind"] != "help" or len(row["prompt"]) != 1:
      continue
    counts[f"{NAME}_read"] = counts.get(f"{NAME}_read", 0) + 1
    if row["family"] in found:
      drop(counts, NAME, "prompt_again")
    elif len(_said(row).split()) < _LEAST:
      drop(counts, NAME, "short")
    else:
      found[row["family"]] = row
  known = list(found.values())
  for i, row in enumerate(known):
    rng = random.Random(f"{seed}/{NAME}/{row['id']}")
    prompt, answer = row["prompt"][0]["content"], _said(row)
    worse = {
      "refusal": answering.refusal(rng, prompt),
      "disordered": _disordered(rng, answer),
      "repeated": _repeated(rng, answer),
    }
    if len(known) > 1:
      other = known[(i + rng.randrange(1, len(known))) % len(known)]
      worse["other"] = _said(other)
    for kind, text in worse.items():
      count = rng.randint(*_WORDS)
      yield {
        "id": f"{row['id']}-{kind}",
        "prompt": row["prompt"],
        "chosen": [_message(_cut(answer, count))],
        "rejected": [_message(_cut(text, count))],
        "kind": "help",
        "source": NAME,
        "family": row["family"],
      }


def _said(row: Row) -> str:
  return row["chosen"][0]["content"]


def _message(text: str) -> dict[str, str]:
  return {"role": "assistant", "content": text}


def _cut(text: str, count: int) -> str:
  """The first words of a text, its line breaks kept."""
  end, left = 0, text
  for word in text.split()[:count]:
    end += left.index(word) + len(word)
    left = text[end:]
  return text[:end]


def _disordered(rng: random.Random, answer: str) -> str:
  words = answer.split()
  for _ in range(8):
    mixed = rng.sample(words, len(words))
    if mixed != words:
      return " ".join(mixed)
  return " ".join(words[::-1]) + " " + words[0]  # all words are the same


def _repeated(rng: random.Random, answer: str) -> str:
  words = answer.split()
  first = words[: rng.randint(2, min(8, len(words) - 1))]
  return " ".join(first * (1 + _WORDS[1] // len(first)))
