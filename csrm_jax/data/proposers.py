"""What proposes sub-categories, guidelines and rules, for a judge to confirm.

Source: CSRM (arXiv:2605.30487), configuration-targeted augmentation.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.spec import Rule, Spec, Subcategory, Truth, complies

Row = Mapping[str, Any]
# Rows with `id`, `messages`, `spec` to log-odds of compliance; NaN: no answer.
Judge = Callable[[Sequence[Row]], Float[np.ndarray, " n"]]
# What the annotation says, as log-odds: p = 4.5e-5 or 1 - 4.5e-5.
CERTAIN = 10.0


@runtime_checkable
class Proposer(Protocol):
  """What `ladder.build` and `checked` ask for candidates."""

  def propose_subcategories(self, rule: Rule) -> Sequence[Subcategory]:
    """The kinds of behaviour that a rule covers, in any order."""
    ...

  def propose_one(
    self, rule: Rule, conversation: Annotated, known: Sequence[Subcategory]
  ) -> Subcategory | None:
    """One more, that the conversation falls under; None: there is none."""
    ...

  def most_severe(self, rule: Rule, left: Sequence[Subcategory]) -> Subcategory:
    """The worst of those left."""
    ...

  def write_guideline(
    self,
    rule: Rule,
    forbidden: Sequence[Subcategory],
    allowed: Sequence[Subcategory],
  ) -> Rule:
    """The rule reworded, to forbid some and allow others; severe ones first."""
    ...

  def propose_rule(
    self, conversation: Annotated, spec: Spec, *, broken: bool
  ) -> Rule | None:
    """A rule outside the spec that the last response breaks, or keeps."""
    ...


def checked(
  items: Sequence[tuple[Annotated, Spec]],
  judge: Judge,
  proposer: Proposer,
  *,
  broken: bool,
  counts: dict[str, int] | None = None,
) -> list[Rule | None]:
  """A rule for each conversation, where proposer and judge agree on it.

  The judge must know by other means than the proposer: an annotation that
  checks its own proposals always agrees.

  Args:
    items: conversations, each with the spec that the rule must add to.
    judge: the independent check.
    proposer: of the candidates.
    broken: whether the last response breaks the rule (p+) or keeps it (p-).
    counts: receives agreed, disagreed, unanswered (by the judge), not_proposed
      and already_in_spec, which add up to the number of items.

  Returns:
    Rules in the order of `items`; None where there is none.

  Raises:
    ValueError: the judge does not answer with one number for each row.
  """
  fates = [""] * len(items)
  rules: list[Rule | None] = [None] * len(items)
  for at, (conversation, spec) in enumerate(items):
    rule = proposer.propose_rule(conversation, spec, broken=broken)
    if rule is None:
      fates[at] = "not_proposed"
    elif _holds(spec, rule):
      fates[at] = "already_in_spec"
    else:
      rules[at] = rule
  asked = [at for at, rule in enumerate(rules) if rule is not None]
  pairs = [(items[at][0], rules[at]) for at in asked]
  for at, z in zip(asked, ask_judge(judge, pairs), strict=True):
    agrees = (z < 0) == broken
    fates[at] = "agreed" if agrees else "disagreed"
    if np.isnan(z):
      fates[at] = "unanswered"
    if fates[at] != "agreed":
      rules[at] = None
  if counts is not None:
    for fate in fates:
      counts[fate] = counts.get(fate, 0) + 1
  return rules


def ask_judge(
  judge: Judge, pairs: Sequence[tuple[Annotated, Rule | None]]
) -> Float[np.ndarray, " n"]:
  """Log-odds that each conversation complies with its rule alone.

  Raises:
    ValueError: the judge does not answer with one number for each row.
  """
  if not pairs:
    return np.zeros(0)
  rows = [
    {"id": c.id, "messages": c.turns(), "spec": Spec(rules=(rule,))}
    for c, rule in pairs
    if rule is not None
  ]
  log_odds = np.asarray(judge(rows), np.float64)
  if log_odds.shape != (len(pairs),):
    raise ValueError(
      f"judge: answers of shape {log_odds.shape} to {len(pairs)} rows; return "
      "one log-odds for each row (NaN: no answer)"
    )
  return log_odds


def _holds(spec: Spec, rule: Rule) -> bool:
  """Whether the spec has the rule already, by its id or by its text."""
  text = rule.render().lower()
  if spec.text:
    return text in spec.text.lower()
  return any(r.id == rule.id or r.render().lower() == text for r in spec.rules)


def annotation_judge(
  conversations: Sequence[Annotated], *, missing: Truth = None
) -> Judge:
  """The annotation as a judge: `spec.complies` under the row's spec.

  Args:
    conversations: that rows name by `id`.
    missing: truth of keys that an annotation leaves out.

  Returns:
    A judge: +-CERTAIN, NaN where the annotation does not tell. It raises a
    ValueError on a row whose id is unknown.
  """
  known = {c.id: c for c in conversations}

  def judge(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    result = np.full(len(rows), np.nan)
    for at, row in enumerate(rows):
      found = known.get(row["id"])
      if found is None:
        raise ValueError(
          f"row {row['id']!r}: field 'id': no annotation has it; give "
          "annotation_judge the conversations that it is asked about"
        )
      label = complies(
        Spec.parse(row["spec"]),
        found.violated,
        refusal=found.refusal,
        missing=missing,
      )
      if label >= 0:
        result[at] = CERTAIN if label else -CERTAIN
    return result

  return judge


# -- Without a language model ----------------------------------------------


_NO_TAXONOMY = Taxonomy("", (), {})


@dataclass(frozen=True)
class TaxonomyProposer:
  """Knows a rule's own sub-categories, their severities and the annotation.

  Attributes:
    taxonomy: rules that `propose_rule` chooses from; a ladder needs none.
    seed: of the choices; each depends on it and the conversation's id alone.
  """

  taxonomy: Taxonomy = _NO_TAXONOMY
  seed: int = 0

  def propose_subcategories(self, rule: Rule) -> Sequence[Subcategory]:
    """The rule's own."""
    return rule.subcategories

  def propose_one(
    self, rule: Rule, conversation: Annotated, known: Sequence[Subcategory]
  ) -> Subcategory | None:
    """None: `propose_subcategories` named all there are."""
    del rule, conversation, known
    return None

  def most_severe(self, rule: Rule, left: Sequence[Subcategory]) -> Subcategory:
    """By severity; of equals the first."""
    del rule
    return max(left, key=lambda s: s.severity)

  def write_guideline(
    self,
    rule: Rule,
    forbidden: Sequence[Subcategory],
    allowed: Sequence[Subcategory],
  ) -> Rule:
    """The rule, its guideline replaced by a level between the two lists.

    Raises:
      ValueError: an allowed sub-category is as severe as a forbidden one.
    """
    level = min(s.severity for s in forbidden)
    for sub in allowed:
      if sub.severity >= level:
        raise ValueError(
          f"rule {rule.id!r}: subcategory {sub.id!r}: severity {sub.severity} "
          f"is allowed at level {level}; allow only milder ones"
        )
    ranked = (*forbidden, *allowed)
    return rule.model_copy(
      update={"guideline": "", "level": level, "subcategories": ranked}
    )

  def propose_rule(
    self, conversation: Annotated, spec: Spec, *, broken: bool
  ) -> Rule | None:
    """One of the taxonomy's rules by the annotation, in one of its wordings.

    None where the annotation decides no rule outside the spec that way.
    """
    wanted = 0 if broken else 1
    found = [
      rule
      for rule in self.taxonomy.rules
      if not _holds(spec, rule)
      and complies(Spec(rules=(rule,)), conversation.violated) == wanted
    ]
    if not found:
      return None
    key = f"{self.seed}:{conversation.id}:{wanted}"
    rule = found[number_of(key) % len(found)]
    worded = (rule, *self.taxonomy.wordings.get(rule.id, ()))
    return worded[number_of(key + ":wording") % len(worded)]


def number_of(key: str) -> int:
  """A 48-bit hash of a text, equal on every machine."""
  return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)
