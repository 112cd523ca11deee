"""Rule-based rewards of an alignment run: what `config.align` asks for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from csrm_jax.align.feedback import (
  Constraint,
  Conversations,
  compliance_of,
)
from csrm_jax.config import Config
from csrm_jax.judge import Judge
from csrm_jax.rules import named, response_types, weights
from csrm_jax.rules.reward import RuleReward, Violation


def rules_of(
  config: Config, judge: Judge | None, bound: Sequence[Constraint]
) -> RuleReward | None:
  """The rule-based reward of a run; None if it asks for none.

  The specs of the constraints choose the type that each prompt wants, so
  another spec file acts by other weights, without fitting anything anew.

  Args:
    config: `align.rules`, `align.rules_grader` and `align.rules_violation`.
    judge: of the run: finds each prompt's rule, and grades unless another is
      named.
    bound: the constraints.

  Raises:
    ValueError: no specs, a folder that is missing, or a response type that the
      specs may want and no weights are there for.
  """
  align = config.align
  if not align.rules:
    return None
  if judge is None or not bound:
    raise ValueError(
      f"--config.align.rules={align.rules} without specs: name some by"
      " --config.align.specs=A.yaml; their rules say which responses are wanted"
    )
  made = weights.load(align.rules)
  specs = [constraint.spec for constraint in bound]
  found = [side for spec in specs for side in response_types.sides(spec)]
  for kind in sorted({side.response_type for side in found} | {"comply"}):
    if kind not in made.weights:
      raise ValueError(
        f"--config.align.rules={align.rules}: no weights for response type"
        f" {kind!r}, which --config.align.specs={align.specs} may want; it has"
        f" {', '.join(made.weights)}. Fit them on completions of that type"
      )
  return RuleReward(
    weights=made,
    grade=named.grader(align.rules_grader, judge=judge, book=made.book),
    choose=response_types.chooser(judge, specs),
    violation=_violation(judge, bound) if align.rules_violation else None,
    violates=align.rules_violation,
  )


def _violation(judge: Judge, bound: Sequence[Constraint]) -> Violation:
  """Probability that the worst of all specs is violated."""
  compliance = compliance_of(judge, bound)

  def violation(conversations: Conversations) -> Float[np.ndarray, " n"]:
    every = np.ones((len(conversations), len(bound)), bool)
    worst = compliance(conversations, every).min(axis=1)
    return np.exp(-np.logaddexp(0.0, worst.astype(np.float64)))

  return violation
