"""The rule-based part of a reward: w . phi, w of the type a prompt wants."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from csrm_jax.eval.refusals import refuses
from csrm_jax.rules import propositions
from csrm_jax.rules.graders import Conversations, Grader
from csrm_jax.rules.response_types import Chooser
from csrm_jax.rules.weights import RuleWeights

# Probability that each last response violates what is asked of it.
Violation = Callable[[Conversations], Float[np.ndarray, " n"]]


class Graded(NamedTuple):
  """What the rules say of n responses.

  Attributes:
    rewards: w . phi of each, units of reward.
    types: response type that its prompt wants.
    classes: its most probable class.
    chances: of the propositions.
  """

  rewards: Float[np.ndarray, " n"]
  types: list[str]
  classes: list[str]
  chances: Float[np.ndarray, "n k"]


@dataclasses.dataclass(frozen=True)
class RuleReward:
  """All that turns conversations into rule-based rewards.

  Attributes:
    weights: fitted, see `weights.load`.
    grade: the grader of propositions.
    choose: the response type that each prompt wants.
    violation: in place of the grader for the proposition `violates`.
    violates: its name; "": the grader is asked about all.
  """

  weights: RuleWeights
  grade: Grader
  choose: Chooser
  violation: Violation | None = None
  violates: str = ""

  def __post_init__(self):
    if self.violates and self.violates not in self.weights.book.names:
      raise ValueError(
        f"no proposition {self.violates!r} in {self.weights.book.origin}; use"
        f" one of {', '.join(self.weights.book.names)}"
      )

  def graded(self, conversations: Conversations) -> Graded:
    """Rewards, types and classes of the last responses.

    Raises:
      ValueError: a prompt wants a type that has no weights.
    """
    book = self.weights.book
    types = self.choose([talk[:-1] for talk in conversations])
    chances = np.array(self.grade(book.propositions, conversations), np.float64)
    if self.violates and self.violation is not None:
      column = book.names.index(self.violates)
      chances[:, column] = self.violation(conversations)
    rewards = np.zeros(len(conversations))
    classes = [""] * len(conversations)
    for kind in dict.fromkeys(types):
      rows = np.array([i for i, t in enumerate(types) if t == kind])
      rewards[rows] = self.weights.rewards(kind, chances[rows])
      names = book.class_names(kind)
      likely = propositions.class_probabilities(book, kind, chances[rows])
      for row, best in zip(rows.tolist(), likely.argmax(1), strict=True):
        classes[row] = names[best]
    return Graded(rewards, types, classes, chances)

  def shares(
    self, conversations: Conversations, graded: Graded
  ) -> dict[str, tuple[int, int]]:
    """(count, of how many) of what a run should watch.

    Returns:
      `ideal/TYPE`: responses of the best class, of those whose prompts want
      this type; `over_refusal`: refusals (`eval.refusals`) where an answer is
      wanted; `refused`: where a refusal is. Types that do not occur are left
      out.
    """
    found: dict[str, tuple[int, int]] = {}
    says_no = [refuses(talk[-1]["content"]) for talk in conversations]
    for kind in self.weights.book.types:
      rows = [i for i, t in enumerate(graded.types) if t == kind]
      best = self.weights.book.class_names(kind)[0]
      if rows:
        count = sum(graded.classes[i] == best for i in rows)
        found[f"ideal/{kind}"] = (count, len(rows))
    for name, wanted in (("over_refusal", True), ("refused", False)):
      rows = [
        i for i, t in enumerate(graded.types) if (t == "comply") == wanted
      ]
      if rows:
        found[name] = (sum(says_no[i] for i in rows), len(rows))
    return found


def total(
  helpfulness: Callable[[Conversations], Float[np.ndarray, " n"]],
  rules: RuleReward,
  *,
  weight: float = 1.0,
) -> Callable[[Conversations], Float[np.ndarray, " n"]]:
  """R = h + weight x w . phi, of the last responses.

  Source: Mu et al. 2024 (arXiv:2411.01111), eq. 1.
  """

  def reward(conversations: Conversations) -> Float[np.ndarray, " n"]:
    helpful = np.asarray(helpfulness(conversations), np.float64)
    return helpful + weight * rules.graded(conversations).rewards

  return reward
