"""Conversations with what is true of them, before any spec is chosen."""

from collections.abc import Mapping
from typing import NamedTuple

from csrm_jax.spec import Rule, Truth


class Annotated(NamedTuple):
  """A conversation and its annotation (ALGORITHMS: `Row`).

  Attributes:
    id: unique.
    family: conversations that must not be split over training and test.
    messages: turns as (role, content); the last one is the assistant's.
    violated: by sub-category or rule id, as `spec.complies` reads it; a key
      that is absent or None is unknown.
    refusal: 1 if the last response declines to answer; None: unknown.
    severity: of the worst violation; None: unknown.
    helpfulness: higher is better; None: unknown.
    taxonomy: name of the `Taxonomy` that the keys of `violated` belong to.
    source: the set it comes from.
  """

  id: str
  family: str
  messages: tuple[tuple[str, str], ...]
  violated: Mapping[str, Truth]
  refusal: Truth
  severity: int | None
  helpfulness: float | None
  taxonomy: str
  source: str

  def turns(self) -> list[dict[str, str]]:
    """Messages of the data contract."""
    return [{"role": r, "content": c} for r, c in self.messages]


class Taxonomy(NamedTuple):
  """What can be ruled on, and how it may be worded.

  Attributes:
    name: unique.
    rules: forbid rules, one wording each; sub-categories carry severities.
    wordings: by rule id, further rules with the same id and meaning.
  """

  name: str
  rules: tuple[Rule, ...]
  wordings: Mapping[str, tuple[Rule, ...]]
