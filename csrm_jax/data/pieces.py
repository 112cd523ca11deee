"""Contract rows to pieces: tokens, and what sorts them into families.

What a row becomes depends on the row alone, whichever process makes it.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from csrm_jax.data import contract, spill, template
from csrm_jax.data.contract import Key, Row
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.spec import Spec

_MOST_SPECS = 4096  # parsed and kept

# Big-endian: the bytes of two sequences compare as their tokens do.
TOKEN = np.dtype(">i4")


class Recipe(NamedTuple):
  """What decides the records, once the rows are given.

  Attributes:
    tokenizer: of the backbone.
    seed: of held-out families, and of shuffled specs.
    heldout: share of families kept from training.
    max_tokens: of one sequence; longer ones are cut by `template.fit_to`.
    shape: row_length, slots and pairs of a record.
    quarantine: whether rows that cannot be cut to fit are put aside.
  """

  tokenizer: Tokenizer
  seed: int
  heldout: float
  max_tokens: int
  shape: dict[str, int]
  quarantine: bool


class Encoded(NamedTuple):
  """A row in tokens.

  Attributes:
    kind: "label", or the kind of its pairs; of "severity" all sequences are
      rungs of one ladder, the least compliant first.
    tokens: sequences as bytes; of a pair (winner, loser).
    label: NaN unless kind is "label".
    weight: examples that the row stands for.
    margin: log-odds.
  """

  kind: str
  tokens: tuple[bytes, ...]
  label: float
  weight: float
  margin: float


class Piece(NamedTuple):
  """A row in tokens, pickled, and all that sorting it needs.

  Pieces in order are families one after the other, each in order of its rows.
  """

  place: int  # of the family, see `spill.place`
  family: str
  key: Key
  source: str
  tokens: int  # of its sequences together
  encoded: bytes


class Chunk(NamedTuple):
  """What becomes of some rows."""

  pieces: list[Piece]
  bad: list[tuple[Key, Row, str]]  # with the reason
  counts: dict[str, int]


def is_heldout(family: str, *, seed: int, share: float) -> bool:
  """Whether a family is kept from training; a pure function of its name."""
  digest = hashlib.sha256(f"{seed}:{family}".encode()).digest()
  return int.from_bytes(digest[:8], "little") < share * 2**64


def add(counts: dict[str, int], more: Mapping[str, int]) -> None:
  """Adds counts to counts, key by key."""
  for name, n in more.items():
    counts[name] = counts.get(name, 0) + n


def encode(recipe: Recipe, rows: Iterable[tuple[Key, Row]]) -> Chunk:
  """Tokenises training rows.

  Raises:
    ValueError: a response and one rule alone exceed `recipe.max_tokens`, and
      bad rows are not put aside.
  """
  made = Chunk([], [], {})
  specs: dict[str, Spec] = {}
  for key, row in rows:
    try:
      encoded = _encode_row(recipe, row, specs, made.counts)
    except ValueError as error:
      if not recipe.quarantine:
        raise ValueError(f"row {row.get('id')!r}: {error}") from error
      made.bad.append((key, row, str(error)))
      continue
    add(made.counts, {f"rows_{contract.kind_of(row)}": 1})
    family = contract.family_of(row)
    tokens = sum(map(len, encoded.tokens)) // TOKEN.itemsize
    piece = Piece(
      spill.place(family),
      family,
      key,
      row.get("source", ""),
      tokens,
      pickle.dumps(tuple(encoded), pickle.HIGHEST_PROTOCOL),
    )
    made.pieces.append(piece)
  return made


def _encode_row(
  recipe: Recipe, row: Row, specs: dict[str, Spec], counts: dict[str, int]
) -> Encoded:
  def encoded(messages, spec) -> bytes:
    if spec is not None:
      name = spec if isinstance(spec, str) else json.dumps(spec, sort_keys=True)
      if name not in specs:
        if len(specs) >= _MOST_SPECS:
          specs.clear()
        specs[name] = Spec.parse(spec, origin=f"row {row.get('id')!r}")
      spec = specs[name]
    ids, cut = template.fit_to(
      recipe.tokenizer, messages, spec, recipe.max_tokens
    )
    add(counts, {f"cut_{name}": n for name, n in cut.items()})
    return np.array(ids, TOKEN).tobytes()

  def plain(kind: str, *tokens: bytes, label: float = float("nan")) -> Encoded:
    weight, margin = row.get("weight", 1.0), row.get("margin", 0.0)
    return Encoded(kind, tokens, label, float(weight), float(margin))

  kind = contract.kind_of(row)
  if kind == "label":
    tokens = encoded(row["messages"], row.get("spec"))
    return plain("label", tokens, label=float(row["label"]))
  if kind == "pair":
    # Helpfulness is read on the spec-free form, so the spec cannot leak in.
    spec = None if row["kind"] == "help" else row["spec"]
    sides = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected")]
    return plain(row["kind"], *(encoded(side, spec) for side in sides))
  if kind == "spec_pair":
    specs_of = (row["chosen_spec"], row["rejected_spec"])
    return plain("spec", *(encoded(row["messages"], s) for s in specs_of))
  rungs = [encoded(r["messages"], r.get("spec")) for r in row["ladder"]]
  return plain("severity", *rungs)


def by_family(pieces: Iterable[Piece]) -> Iterator[tuple[str, list[Piece]]]:
  """Families of pieces that come in order."""
  together: list[Piece] = []
  for piece in pieces:
    if together and piece.family != together[0].family:
      yield together[0].family, together
      together = []
    together.append(piece)
  if together:
    yield together[0].family, together
