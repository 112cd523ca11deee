"""Completions with their propositions: JSON lines, read and written.

The layout is that of the released gold set, so its files are read as they are:

  {"id", "prompt": [messages], "completion": [one message of the assistant],
   "response_type": wanted for the prompt, "propositions": {name: true | false},
   "probabilities"?: {name: 0..1}, "helpfulness"?: number}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from csrm_jax.data import contract
from csrm_jax.data.contract import hash_family
from csrm_jax.data.template import Message
from csrm_jax.rules import propositions
from csrm_jax.rules.propositions import Book

GOLD = ("rbr_gold/train.jsonl", "rbr_gold/test.jsonl")
BOOK = "rbr_gold/proposition_prompts.yaml"
FIELDS = ("id", "prompt", "completion", "response_type")


class Completion(NamedTuple):
  """One response to a prompt, and what is known of it.

  Attributes:
    id: of the row.
    messages: the prompt and the response.
    response_type: wanted for this prompt; of the book.
    truths: of each proposition, in the book's order; None: nobody looked.
    chances: likewise, by a grader.
    helpfulness: by a reward model; None: not asked.
  """

  id: str
  messages: list[Message]
  response_type: str
  truths: Bool[np.ndarray, " k"] | None = None
  chances: Float[np.ndarray, " k"] | None = None
  helpfulness: float | None = None

  @property
  def family(self) -> str:
    """The same for all completions of a prompt; case is no difference."""
    prompt = self.messages[:-1]
    return hash_family("\n".join(m["content"] for m in prompt))


def read(path: str | Path, book: Book) -> list[Completion]:
  """Reads completions; a response type may be written `Hard Refuse`.

  Raises:
    ValueError: file, line, field, value and remedy; also for an id that stands
      twice.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such file; give JSON lines of completions")
  made, seen = [], {}
  for number, raw in contract.raw_lines(path):
    where = f"{path}:{number}"
    row = contract.parse_line(raw, where)
    if not isinstance(row, dict):
      raise ValueError(f"{where}: no object; write one a line")
    for field in FIELDS:
      if field not in row:
        raise ValueError(f"{where}: field '{field}': missing; add it")
    first = seen.setdefault(row["id"], number)
    if first != number:
      raise ValueError(
        f"{where}: field 'id': {row['id']!r} stands in line {first} too"
      )
    made.append(_completion(row, book, where))
  return made


def _completion(row: dict[str, Any], book: Book, where: str) -> Completion:
  contract.check_messages(row["prompt"], "prompt", where, response=False)
  said = row["completion"]
  # An empty response is one that people marked too; the contract has none.
  if (
    not isinstance(said, list)
    or len(said) != 1
    or said[0].get("role") != "assistant"
    or not isinstance(said[0].get("content"), str)
  ):
    raise ValueError(
      f"{where}: field 'completion': {str(said)[:60]!r}: give a list of one"
      " message, the assistant's"
    )
  kind = str(row["response_type"]).lower().replace(" ", "_")
  if kind not in book.types:
    raise ValueError(
      f"{where}: field 'response_type': {row['response_type']!r}: use one of"
      f" {', '.join(book.types)}"
    )
  truths = _values(row, "propositions", book, where)
  chances = _values(row, "probabilities", book, where)
  return Completion(
    str(row["id"]),
    [*row["prompt"], *row["completion"]],
    kind,
    None if truths is None else np.array(truths, bool),
    None if chances is None else np.array(chances, np.float64),
    row.get("helpfulness"),
  )


def _values(
  row: dict[str, Any], field: str, book: Book, where: str
) -> list[Any] | None:
  """The values of all propositions; None if the field is left out."""
  found = row.get(field)
  if found is None:
    return None
  for name in book.names:
    if name not in found:
      raise ValueError(f"{where}: field '{field}.{name}': missing; add it")
    value = found[name]
    if field == "propositions" and not isinstance(value, bool):
      raise ValueError(
        f"{where}: field '{field}.{name}': {value!r}: use true or false"
      )
    number = isinstance(value, int | float)
    if field == "probabilities" and not (number and 0 <= value <= 1):
      raise ValueError(
        f"{where}: field '{field}.{name}': {value!r}: use 0 to 1"
      )
  return [found[name] for name in book.names]


def write(path: str | Path, rows: Sequence[Completion], book: Book) -> None:
  """Writes completions as `read` reads them."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  with Path(path).open("w", encoding="utf-8") as out:
    for row in rows:
      line: dict[str, Any] = {
        "id": row.id,
        "prompt": list(row.messages[:-1]),
        "completion": list(row.messages[-1:]),
        "response_type": row.response_type,
      }
      for field, values in (
        ("propositions", row.truths),
        ("probabilities", row.chances),
      ):
        if values is not None:
          line[field] = dict(zip(book.names, values.tolist(), strict=True))
      if row.helpfulness is not None:
        line["helpfulness"] = row.helpfulness
      out.write(json.dumps(line) + "\n")


def read_gold(folder: str | Path) -> tuple[Book, list[Completion]]:
  """The released book and all gold completions below a data folder.

  Raises:
    ValueError: a file is missing or wrong.
  """
  book = propositions.read(contract.find(folder, "rbr_gold", BOOK))
  files = [contract.find(folder, "rbr_gold", name) for name in GOLD]
  return book, [row for file in files for row in read(file, book)]


def truths(rows: Sequence[Completion]) -> Bool[np.ndarray, "n k"]:
  """Human labels of all; ValueError names the first without them."""
  for row in rows:
    if row.truths is None:
      raise ValueError(
        f"completion {row.id!r}: field 'propositions': missing; add what holds"
      )
  return np.array([row.truths for row in rows], bool)


def class_counts(
  book: Book, rows: Sequence[Completion]
) -> dict[str, dict[str, int]]:
  """Completions of each class, by response type, by their human labels."""
  counts: dict[str, dict[str, int]] = {}
  for kind in book.types:
    of_kind = [row for row in rows if row.response_type == kind]
    names = book.class_names(kind)
    counts[kind] = dict.fromkeys(names, 0)
    if of_kind:
      found = propositions.classify(book, kind, truths(of_kind))
      for number in found.tolist():
        counts[kind][names[number]] += 1
  return counts
