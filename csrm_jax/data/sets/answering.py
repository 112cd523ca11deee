"""Real questions, answered or refused, under rules that demand either.

Sets of responses judge harm; hardly one has rules that a polite refusal breaks.
So real prompts and their real answers are set against refusals of ours, each
under a rule that demands an answer and one that demands a refusal.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets import guard_response_labels, preference_general
from csrm_jax.data.sets.refusals import hedge, refusal
from csrm_jax.data.sets.shapes import drop, wording

NAME = "answering"
FILES = (*preference_general.FILES, *guard_response_labels.HARMBENCH_FILES)
# Others than `shapes.ANSWER` and `shapes.DECLINE`: those measure.
ANSWER = (
  "S1: Required: an answer to the user's question.",
  "S1: Disallowed: refusals of any kind. Allowed: every answer.",
  "The assistant always answers. Turning a user away, with or without reasons, "
  "is a violation.",
  "S1: Helpfulness. Required: do what the user asks for. Disallowed: excuses, "
  "changing the subject, sending the user elsewhere instead.",
  "Users pay for answers. Whoever gets none, only an apology, has been failed.",
  "S1: Disallowed: saying no to a request.\n"
  "S2: Disallowed: leaving a question without an answer.",
  "Requests are to be met, whatever they are about. It counts against a "
  "response if it declines.",
  "S1: Over-caution. Disallowed: withholding an answer for fear of misuse.",
)
DECLINE = (
  "S1: Required: a refusal of the user's request.",
  "S1: Disallowed: answers of any kind. Allowed: refusals.",
  "The assistant never answers here. Giving the user what was asked for, in "
  "whole or in part, is a violation.",
  "S1: Silence. Required: turn the user away. Disallowed: content that serves "
  "the request.",
  "This service is suspended. Whoever gets an answer has been served by "
  "mistake.",
  "S1: Disallowed: saying yes to a request.\n"
  "S2: Disallowed: answering a question.",
  "Requests are to be declined, whatever they are about. It counts against a "
  "response if it complies.",
  "S1: Caution. Disallowed: handing out what the user asked for.",
)
# An answer that opens like this might be a refusal: it is left out.
_DOUBTFUL = re.compile(
  r"\b(sorry|apolog|can(?:'|’)?t\b|cannot|unable|as an ai|won(?:'|’)?t|"
  r"not able|decline|inappropriate|illegal|unethical|i don(?:'|’)?t)",
  re.IGNORECASE,
)
_HEDGED = 0.3  # share of answers that open as a refusal might


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Eight rows a prompt: an answer and a refusal, under both specs.

  Four label rows, two response pairs and two spec pairs, so that neither the
  text nor the spec alone tells a label.
  """
  for stem, prompt, answer in _answered(path, seed, counts):
    family = hash_family(prompt)
    rng = random.Random(f"{seed}:{NAME}:{family}")
    if rng.random() < _HEDGED:
      answer = f"{hedge(rng)} {answer}"
    asked = [{"role": "user", "content": prompt}]
    says = {
      "answer": [{"role": "assistant", "content": answer}],
      "decline": [{"role": "assistant", "content": refusal(rng, prompt)}],
    }
    specs = {
      "answer": wording(ANSWER, seed, f"{family}:answer"),
      "decline": wording(DECLINE, seed, f"{family}:decline"),
    }
    common = {"source": NAME, "family": family}
    for wanted, other in (("answer", "decline"), ("decline", "answer")):
      for given in says:
        yield {
          "id": f"{stem}/{given}/must_{wanted}",
          **common,
          "messages": asked + says[given],
          "label": int(given == wanted),
          "spec": specs[wanted],
        }
      yield {
        "id": f"{stem}/must_{wanted}",
        **common,
        "prompt": asked,
        "chosen": says[wanted],
        "rejected": says[other],
        "kind": "resp",
        "spec": specs[wanted],
      }
      yield {
        "id": f"{stem}/{wanted}/duo",
        **common,
        "messages": asked + says[wanted],
        "chosen_spec": specs[wanted],
        "rejected_spec": specs[other],
      }


def _answered(
  path: str | Path | None, seed: int, counts: dict[str, int]
) -> Iterator[tuple[str, str, str]]:
  """(id, prompt, answer), one of each prompt, without doubtful answers.

  Answers are those that people preferred for their helpfulness, and those in
  which HarmBench's annotators found the harm that was asked for.
  """
  found: list[tuple[str, str, str]] = []
  for row in preference_general.rows(path, seed=seed, counts={}):
    if row["kind"] == "help" and len(row["prompt"]) == 1:
      asked, said = row["prompt"][0]["content"], row["chosen"][0]["content"]
      found.append((row["id"], asked, said))
  (file,) = guard_response_labels.HARMBENCH_FILES
  fields = ("id", "prompt", "response", "label")
  for raw in objects(find(path, NAME, file), fields):
    if raw["label"] == "harmful" and raw["response"].strip():
      found.append((raw["id"], raw["prompt"], raw["response"]))
  counts[f"{NAME}_read"] = len(found)
  seen: set[str] = set()
  for stem, prompt, answer in sorted(found):
    family = hash_family(prompt)
    if _DOUBTFUL.search(answer[:300]):
      drop(counts, NAME, "perhaps_refusal")
    elif family in seen:
      drop(counts, NAME, "prompt_again")
    else:
      seen.add(family)
      yield stem, prompt, answer
