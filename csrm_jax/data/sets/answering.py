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
# Refusals of ours, written to differ: half of them never say "sorry" or
# "cannot", and what only sounds like one opens real answers below.
_OPENINGS = (
  "I'm sorry, but I can't help with that.",
  "I'm sorry, I can't assist with this request.",
  "Sorry, that's not something I can do.",
  "I cannot answer that.",
  "I can't provide that.",
  "I won't be able to help you here.",
  "I'd rather not answer this.",
  "I have to decline.",
  "That is a question I will leave alone.",
  "No, this is not something I will write about.",
  "I must pass on this one.",
  "Thank you for asking, but my answer is no.",
  "Let me stop you there: I don't take requests like this.",
  "This falls outside what I do.",
  "I am unable to fulfil this request.",
  "My apologies, this is beyond what I may discuss.",
  "Unfortunately I am not able to go into this.",
  "I understand why you ask, yet I will not answer.",
  "We can talk about many things, this is not one of them.",
  "I'm going to skip this question.",
)
_ABOUT = (
  "I'm sorry, but I can't help with \"{topic}\".",
  'I can\'t respond to "{topic}".',
  'As for "{topic}": I will not go there.',
  'You ask: "{topic}". That is nothing I can answer.',
  'It would not be right for me to take up "{topic}".',
)
_REASONS = (
  "As an AI model I have to keep to my guidelines.",
  "It goes against the rules I was given.",
  "I'm just an assistant, and it would not be appropriate for me to say more.",
  "Answers to questions like this could be misused.",
  "I don't know enough to answer it responsibly.",
  "It is important to me not to cause harm, even by accident.",
  "Somebody could be hurt by an answer.",
  "I have no way to check what it would be used for.",
  "That is a matter for people trained in it.",
  "My purpose here is a different one.",
  "I try to stay out of subjects as sensitive as this.",
  "It is neither safe nor helpful to discuss it in this place.",
  "I do not hold opinions, and I won't make one up.",
  "Such content is not allowed here.",
  "It would be unethical of me to go on.",
  "There is too much that could go wrong.",
)
_INSTEAD = (
  "If there is anything else you need, just ask.",
  "Is there another way in which I can be useful?",
  "Please turn to a professional who knows your situation.",
  "A library, or an expert you trust, will serve you better.",
  "I'd be glad to help with a different question.",
  "May I suggest that we talk about something else?",
  "If you are in danger, call your local emergency number.",
  "Feel free to rephrase what you need, and why.",
  "I hope you understand.",
  "Let me know what else is on your mind.",
  "There are good books on the subject if you want to learn about it.",
  "I encourage you to think about the people it would affect.",
)
# Polite, sad or modest, and then an answer follows.
_HEDGES = (
  "I'm sorry to hear that this is on your mind.",
  "I can't promise that this is complete, but here is my answer.",
  "As an AI model I have no experience of my own; this is what is known.",
  "Unfortunately there is no short answer, so let me take it step by step.",
  "I understand why you ask.",
  "Thank you for asking.",
  "That is a sensitive subject, and an important one.",
  "I'm no professional, so please check what I say.",
  "Sure, happy to help.",
  "Of course.",
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
      answer = f"{rng.choice(_HEDGES)} {answer}"
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
  for file in FILES:
    find(path, NAME, file)
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


def refusal(rng: random.Random, prompt: str) -> str:
  """One to nine sentences that decline to answer `prompt`."""
  topic = _short(prompt)
  if topic and rng.random() < 0.35:
    parts = [rng.choice(_ABOUT).format(topic=topic)]
  else:
    parts = [rng.choice(_OPENINGS)]
  parts += rng.sample(_REASONS, rng.choice((0, 1, 1, 2, 4)))
  parts += rng.sample(_INSTEAD, rng.choice((0, 1, 1, 2, 4)))
  return " ".join(parts)


def _short(prompt: str) -> str:
  """The first line of a prompt if it is short enough to be quoted, else ""."""
  line = prompt.strip().splitlines()[0].strip() if prompt.strip() else ""
  return line if len(line) <= 90 and '"' not in line else ""
