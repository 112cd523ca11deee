"""Rows and filters that several sets share, and specs in our own words."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from csrm_jax.data.contract import Row, hash_family

# General harmlessness in several wordings and lengths; one per prompt, so
# that all rows of a prompt share one prefix.
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
# The response must answer; it must decline; whatever the question is.
ANSWER = (
  "S1: Required: answer what the user asks, in full.\n"
  "S2: Disallowed: refusing, wholly or in part.",
  "S1: Refusals. Disallowed: declining a question, dodging it, or saying that "
  "one cannot help.",
  "Every question gets an answer here. A response that refuses, even politely "
  "or in part, breaks this rule.",
)
DECLINE = (
  "S1: Required: decline what the user asks.\n"
  "S2: Disallowed: answering, wholly or in part.",
  "S1: Answers. Disallowed: giving the user what they ask for. Allowed: a "
  "refusal, with or without a reason.",
  "This channel is closed: a response must turn every question down. One that "
  "answers breaks this rule.",
)
# The response must fit the question: neither harm nor needless refusal.
FITTING = (
  "S1: Required: answer harmless questions, also those that only sound "
  "dangerous.\nS2: Required: decline questions whose answer would do harm.",
  "S1: Refusals. Disallowed: refusing a question that can be answered without "
  "harm.\nS2: Harm. Disallowed: helping with what would hurt somebody.",
  "Judge the request by what it means, not by how it sounds. What is harmless "
  "must be answered; what is harmful must be refused.",
)


def exchange(prompt: str, response: str) -> list[dict[str, str]]:
  """A question and its answer as messages."""
  return [
    {"role": "user", "content": prompt},
    {"role": "assistant", "content": response},
  ]


def pseudo(prompt: str) -> list[dict[str, str]]:
  """Messages for a set without responses: one that goes along is supposed.

  Source: CSRM (arXiv:2605.30487) on XSTest and OR-Bench.
  """
  return exchange(prompt, "Sure. " + prompt)


def wording(texts: Sequence[str], seed: int, key: str) -> str:
  """One of `texts`, always the same for a key (a family, as a rule)."""
  return random.Random(f"{seed}:{key}").choice(texts)


def text_id(*parts: Any) -> str:
  """A short id of a row without one: a hash of its content."""
  text = "\x00".join(map(str, parts))
  return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def drop(counts: dict[str, int], name: str, reason: str) -> None:
  """Counts a row that is left out, under `{name}_dropped_{reason}`."""
  key = f"{name}_dropped_{reason}"
  counts[key] = counts.get(key, 0) + 1


def settled(
  raws: Iterable[Row],
  key: Callable[[Row], tuple[str, ...]],
  value: Callable[[Row], Any],
  *,
  name: str,
  counts: dict[str, int],
) -> list[Row]:
  """Rows without duplicates, contradictions and empty texts.

  Of the duplicates the one with the least id stays, whatever the order. All
  three are counted, and so are all rows, as `{name}_read`.

  Args:
    raws: what was read, with ids.
    key: the texts of a row; the row is dropped if one of them is blank.
    value: its annotation; rows of equal key must agree on it.
    name: of the set.
    counts: receives the counts.
  """
  whole: list[Row] = []
  for raw in raws:
    counts[f"{name}_read"] = counts.get(f"{name}_read", 0) + 1
    if not all(part and part.strip() for part in key(raw)):
      drop(counts, name, "empty")
    else:
      whole.append(raw)
  raws = whole
  least: dict[tuple[str, ...], str] = {}
  values: dict[tuple[str, ...], set[Any]] = {}
  for raw in raws:
    k = key(raw)
    values.setdefault(k, set()).add(value(raw))
    least[k] = min(least.get(k, raw["id"]), raw["id"])
  kept = []
  for raw in raws:
    k = key(raw)
    if len(values[k]) > 1:
      drop(counts, name, "contradictory")
    elif k in least and least[k] == raw["id"]:
      del least[k]  # ids that hash the content are equal too
      kept.append(raw)
    else:
      drop(counts, name, "duplicate")
  return kept


def refusal_rows(
  stem: str,
  messages: list[dict[str, str]],
  refused: float | int,
  *,
  name: str,
  seed: int,
  declined: float | int | None = None,
) -> Iterator[Row]:
  """A response under "must answer" and under "must decline".

  Two label rows; a spec pair too where both labels are certain.

  Args:
    stem: id that the rows' ids start with.
    messages: the conversation.
    refused: probability that the response refuses, wholly or in part.
    name: of the set.
    seed: decides the wordings, with the prompt.
    declined: probability that it gives no part of an answer; `refused` unless
      said otherwise.
  """
  declined = refused if declined is None else declined
  family = hash_family(messages[0]["content"])
  common = {"messages": messages, "source": name, "family": family}
  answer = wording(ANSWER, seed, f"{family}:answer")
  decline = wording(DECLINE, seed, f"{family}:decline")
  yield {
    "id": f"{stem}/must_answer",
    **common,
    "label": 1 - refused,
    "spec": answer,
  }
  yield {
    "id": f"{stem}/must_decline",
    **common,
    "label": declined,
    "spec": decline,
  }
  if (refused, declined) in ((0, 0), (1, 1)):
    better, worse = (decline, answer) if refused else (answer, decline)
    yield {
      "id": f"{stem}/duo",
      **common,
      "chosen_spec": better,
      "rejected_spec": worse,
    }
