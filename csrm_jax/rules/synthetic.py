"""Completions composed so that wanted propositions of our book hold.

Weights can be fitted on them without anybody marking anything. Topics, prompts
and what may not be said are those of the synthetic world; the sentences that
make a proposition true stand below. Every truth is drawn first, then written.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from csrm_jax.data.domains import AKIN, HELD_BACK, SLOT, Domain, world
from csrm_jax.data.template import Message
from csrm_jax.rules import propositions
from csrm_jax.rules.completions import Completion
from csrm_jax.rules.phrases import BOUNDARY, CLOSING, OPENING, PART, WRITER
from csrm_jax.rules.propositions import Book

# How a response treats the request, and what then holds.
CONTENTS: Mapping[str, tuple[str, ...]] = {
  "none": (),
  "part": ("answers_part",),
  "full": ("answers", "answers_part"),
  "crosses": ("answers", "answers_part", "crosses"),
  "wanders": ("wanders",),
}
# How often a sentence is there, before the wanted class is asked for.
OFTEN = {"regrets": 0.5, "declines": 0.5}
SELDOM = 0.2
TRIES = 4096  # draws of truths until a class comes up


class Asked(NamedTuple):
  """A prompt and what responses to it may be made of.

  Attributes:
    prompt: one message of the user.
    name: unique.
    response_type: wanted for it.
    topic: of the rule, in small letters.
    texts: for "full", "crosses" and "wanders", what may be said.
  """

  prompt: list[Message]
  name: str
  response_type: str
  topic: str
  texts: Mapping[str, tuple[str, ...]]


def prompts(
  domains: Sequence[str] = (), *, heldout: bool = False, seed: int = 0
) -> list[Asked]:
  """Prompts of the world, each wanted in every response type.

  Where the type is "comply" the topic is allowed: mild answers are right, the
  worst grade still is not. Of each domain there are, beside, prompts that share
  its words but ask for nothing that any rule could mind: answering them is
  right, whatever the rule, and refusing is over-refusal.

  Args:
    domains: of the world; empty: all for training.
    heldout: templates that are held back (every fourth) instead of the rest.
    seed: of the fillings.

  Raises:
    ValueError: no such domain.
  """
  known = world()
  for name in domains:
    if name not in known:
      raise ValueError(f"no domain {name!r}; use some of {', '.join(known)}")
  names = domains or [d.id for d in known.values() if d.split == "train"]
  found = []
  for name in names:
    domain = known[name]
    for i, template in enumerate(domain.prompts):
      if ((i + 1) % HELD_BACK == 0) != heldout:
        continue
      for kind in ("comply", "hard", "soft"):
        found.append(_of_world(domain, template, i, kind, seed))
    found += _boundary(domain, heldout, seed)
  return found


def _of_world(
  domain: Domain, template: str, index: int, kind: str, seed: int
) -> Asked:
  rng = random.Random(f"rules/{seed}/{domain.id}/{index}")
  slots = {name: rng.choice(texts) for name, texts in domain.slots.items()}

  def fill(text: str, of: Mapping[str, str] = slots) -> str:
    text = SLOT.sub(lambda m: of[m.group(1)], text)
    return text[0].upper() + text[1:]

  def graded(keep: Callable[[int], bool]) -> tuple[str, ...]:
    # A question in an answer would make another proposition true.
    return tuple(
      fill(text)
      for grade in domain.grades
      if keep(grade.severity)
      for text in grade.responses
      if "?" not in text
    )

  other = _far(domain, rng)
  strange = {name: rng.choice(texts) for name, texts in other.slots.items()}
  most = max(grade.severity for grade in domain.grades)
  mild = kind == "comply"
  return Asked(
    [{"role": "user", "content": fill(template)}],
    f"{domain.id}/{index}/{kind}",
    kind,
    domain.titles[0].lower(),
    {
      # Where the topic is forbidden no full answer is sound.
      "full": graded(lambda s: s <= 2) if mild else (),
      "crosses": graded(lambda s: s == most if mild else s >= 2),
      "wanders": tuple(
        fill(t, strange) for t in other.grades[0].responses if "?" not in t
      ),
    },
  )


def _far(domain: Domain, rng: random.Random) -> Domain:
  """Another domain, whose texts nobody could take for an answer here."""
  return rng.choice(
    [
      other
      for other in world().values()
      if other.id != domain.id
      and other.split == domain.split
      and not any({domain.id, other.id} <= akin for akin in AKIN)
    ]
  )


def _boundary(domain: Domain, heldout: bool, seed: int) -> Iterator[Asked]:
  """Harmless questions about the words of a topic, with their answers."""
  rng = random.Random(f"rules/boundary/{seed}/{domain.id}/{heldout}")
  other = _far(domain, rng)
  slots = {name: rng.choice(texts) for name, texts in other.slots.items()}
  strange = tuple(
    SLOT.sub(lambda m: slots[m.group(1)], text)
    for text in other.grades[0].responses
    if "?" not in text
  )
  for i, (question, answer) in enumerate(BOUNDARY):
    if ((i + 1) % HELD_BACK == 0) != heldout:
      continue
    words = rng.sample(domain.vocabulary, 2)
    yield Asked(
      [{"role": "user", "content": question.format(*words)}],
      f"{domain.id}/boundary{i}",
      "comply",
      domain.titles[0].lower(),
      {"full": (answer(*words),), "crosses": (), "wanders": strange},
    )


# ------------------------------------------------------------------- composing


def draw(
  book: Book, asked: Asked, wanted: str, rng: np.random.Generator
) -> tuple[str, Bool[np.ndarray, " k"]] | None:
  """(content, truths) of a completion of the wanted class.

  None if no content of this prompt can be of that class.
  """
  names = list(book.names)
  contents = [
    name
    for name in CONTENTS
    if name in ("none", "part") or asked.texts.get(name)
  ]
  chosen = rng.integers(0, len(contents), TRIES)
  often = np.array([OFTEN.get(name, SELDOM) for name in names])
  truths = rng.random((TRIES, len(names))) < often
  for content, holds in CONTENTS.items():
    for name in ("answers", "answers_part", "crosses", "wanders"):
      if content in contents:
        rows = chosen == contents.index(content)
        truths[rows, names.index(name)] = name in holds
  number = book.class_names(asked.response_type).index(wanted)
  right = propositions.classify(book, asked.response_type, truths) == number
  # Something must be said.
  right &= truths.any(axis=1)
  for row in np.flatnonzero(right)[:1].tolist():
    return contents[chosen[row]], truths[row]
  return None


def write(
  book: Book,
  asked: Asked,
  content: str,
  truths: Bool[np.ndarray, " k"],
  rng: random.Random,
) -> str:
  """A response in which just these propositions hold."""
  holds = dict(zip(book.names, truths.tolist(), strict=True))
  said = [rng.choice(texts) for name, texts in OPENING.items() if holds[name]]
  if content == "part":
    said.append(rng.choice(PART))
  elif content != "none":
    said.append(rng.choice(asked.texts[content]))
  said += [rng.choice(texts) for name, texts in CLOSING.items() if holds[name]]
  return " ".join(said).replace("{topic}", asked.topic)


def instruction(
  book: Book, asked: Asked, content: str, truths: Bool[np.ndarray, " k"]
) -> str:
  """What to ask a language model for such a response (LLM mode)."""
  pairs = list(zip(book.propositions, truths.tolist(), strict=True))
  listed = {
    answer: "\n".join(f"- {p.question}" for p, holds in pairs if holds is want)
    for answer, want in (("yes", True), ("no", False))
  }
  model = ""
  if asked.texts.get(content):
    model = f"Its content should be like this: {asked.texts[content][0]}\n\n"
  return WRITER.format(
    user=asked.prompt[-1]["content"], content=model, **listed
  )


def compose(
  book: Book,
  asked: Sequence[Asked],
  *,
  per_class: int = 1,
  seed: int = 0,
  ask: Callable[[str], str] | None = None,
  counts: dict[str, int] | None = None,
) -> list[Completion]:
  """Completions of every class of every prompt, as far as there are any.

  Args:
    book: ours, or one with the same propositions.
    asked: of `prompts`.
    per_class: completions of each class.
    seed: of truths and wordings.
    ask: LLM mode: a model's answer to `instruction`, in place of our
      sentences. Its truths are what was asked for; whether the model did it
      nobody looked.
    counts: receives `composed`, `impossible` (class and prompt without any
      content) and `repeated` (texts that came twice, left out).

  Raises:
    ValueError: a book with other propositions, or a model that says nothing.
  """
  known = {*OPENING, *CLOSING, *CONTENTS["crosses"], "wanders"}
  if set(book.names) != known:
    raise ValueError(
      f"{book.origin}: completions can be composed for these propositions"
      f" alone: {', '.join(sorted(known))}; bring rows of your own"
    )
  tally = {"composed": 0, "impossible": 0, "repeated": 0}
  made: list[Completion] = []
  for one in asked:
    seen: set[str] = set()
    for wanted in book.class_names(one.response_type):
      for i in range(per_class):
        name = f"{one.name}/{wanted}/{i}"
        rng: Any = random.Random(f"compose/{seed}/{name}")
        found = draw(
          book, one, wanted, np.random.default_rng(rng.getrandbits(64))
        )
        if found is None:
          tally["impossible"] += 1
          continue
        text = write(book, one, *found, rng)
        if ask is not None:
          text = ask(instruction(book, one, *found)).strip()
          if not text:
            raise ValueError(f"{name}: the model wrote nothing; use another")
        if text in seen:
          tally["repeated"] += 1
          continue
        seen.add(text)
        messages = [*one.prompt, {"role": "assistant", "content": text}]
        made.append(Completion(name, messages, one.response_type, found[1]))
        tally["composed"] += 1
  if counts is not None:
    for name, number in tally.items():
      counts[name] = counts.get(name, 0) + number
  return made
