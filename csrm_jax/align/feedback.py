"""What a response earns and what it costs: reward, and one cost a spec."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from csrm_jax.config import Config
from csrm_jax.data.template import Message
from csrm_jax.judge import Judge
from csrm_jax.score_cached import SpecCache
from csrm_jax.spec import Spec

Conversations = Sequence[Sequence[Message]]
# Helpfulness of each conversation's last response; any real scale.
RewardFunction = Callable[[Conversations], Float[np.ndarray, " n"]]
# Log-odds that each complies with each constraint, wherever asked (True).
ComplianceFunction = Callable[
  [Conversations, Bool[np.ndarray, "n k"]], Float[np.ndarray, "n k"]
]


class Constraint(NamedTuple):
  """One spec that responses should comply with.

  Attributes:
    name: in logs; of the spec's file, and of the rule where it is one rule.
    spec: the rules.
    limit: highest share of violating responses, in (0, 1).
  """

  name: str
  spec: Spec
  limit: float


def constraints(config: Config) -> list[Constraint]:
  """The constraints of `config.align`: one a spec file, or one a rule.

  Raises:
    ValueError: no spec, two of one name, or limits that are no rates or not
      one for all or one for each.
  """
  align = config.align
  files = [part.strip() for part in align.specs.split(",") if part.strip()]
  if not files:
    raise ValueError(
      "--config.align.specs is empty: name spec files, A.yaml,B.yaml; their"
      " rules are the constraints"
    )
  found: list[tuple[str, Spec]] = []
  for file in files:
    spec, name = Spec.read(file), Path(file).stem
    if align.per_rule:
      found += [(f"{name}/{r.id}", Spec(rules=(r,))) for r in spec.rules]
    else:
      found.append((name, spec))
  names = [name for name, _ in found]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(
        f"--config.align.specs={align.specs}: two constraints are named"
        f" {name!r}; rename a file or a rule"
      )
  limits = parse_limits(align.limits, len(found))
  return [
    Constraint(name, spec, limit)
    for (name, spec), limit in zip(found, limits, strict=True)
  ]


def policy_spec(config: Config, bound: Sequence[Constraint]) -> str | None:
  """What the policy reads of its specs; None unless it is to read them."""
  if not config.align.policy_reads_spec:
    return None
  return "\n".join(c.spec.render() for c in bound)


def parse_limits(text: str, count: int) -> list[float]:
  """Rates out of "0.05" (for all) or "0.05,0.2" (for each).

  Raises:
    ValueError: not one, not `count`, or not in (0, 1).
  """
  try:
    limits = [float(part) for part in text.split(",")]
  except ValueError:
    limits = []
  if len(limits) == 1:
    limits *= count
  if len(limits) != count or not all(0 < limit < 1 for limit in limits):
    raise ValueError(
      f"--config.align.limits={text}: give one rate in (0, 1), or one for each"
      f" of the {count} constraints, joined by commas"
    )
  return limits


def observed(
  rng: np.random.Generator, n: int, k: int, count: int
) -> Bool[np.ndarray, "n k"]:
  """Which constraints each of n responses is judged by.

  Args:
    rng: source of randomness.
    n: responses.
    k: constraints.
    count: of constraints a response, drawn without replacement; 0: all.
      Over all responses each is drawn equally often, up to one.
  """
  if not count or count >= k:
    return np.ones((n, k), bool)
  chosen = np.zeros((n, k), bool)
  deck: list[int] = []
  for row in chosen:
    # Of what is left, then of a new deck without what this row has already.
    taken = deck[:count]
    deck = deck[count:]
    if len(taken) < count:
      fresh = [int(i) for i in rng.permutation(k)]
      more = [i for i in fresh if i not in taken][: count - len(taken)]
      deck = [i for i in fresh if i not in more]
      taken += more
    row[taken] = True
  return chosen


def reward_of(model: Judge, *, spec: str = "") -> RewardFunction:
  """What a response earns: its helpfulness, or how well it keeps to a spec.

  Args:
    model: of `judge.load`.
    spec: file of rules to earn by, such as to answer what is asked: the reward
      is the log-odds of complying. "": helpfulness, read without any spec.

  Raises:
    ValueError: no spec, and the model has no trained helpfulness head.
  """
  if spec:
    cache = SpecCache(model, [Spec.read(spec)])
    return lambda conversations: cache.scores(conversations).log_odds[:, 0]
  if not model.has_helpfulness:
    raise ValueError(
      f"{model.path}: has no trained helpfulness head, so no reward; name a"
      " model trained on pairs of kind 'help' by --config.align.reward=DIR"
      " (configs/reward_smollm2.py trains one), or a spec to earn by with"
      " --config.align.reward_spec=FILE"
    )
  return SpecCache(model, []).helpfulness


def scaled(reward: RewardFunction, scale: float) -> RewardFunction:
  """The reward in another unit, such as its deviation at the start.

  A multiplier of 1 weighs a cost of 1 as a reward of 1: so the unit decides how
  long multipliers must grow before they matter.

  Raises:
    ValueError: a scale that is not above 0.
  """
  if not 0 < scale < float("inf"):
    raise ValueError(f"--config.align.reward_scale={scale}: use one above 0")
  if scale == 1.0:
    return reward
  return lambda conversations: scale * np.asarray(reward(conversations))


def compliance_of(
  judge: Judge | None, bound: Sequence[Constraint]
) -> ComplianceFunction:
  """The judge's calibrated log-odds, with the specs' prefixes kept.

  Without constraints there is nothing to ask, and no judge is needed.
  """
  if judge is None or not bound:
    return lambda conversations, asked: np.zeros(asked.shape, np.float32)
  cache = SpecCache(judge, [c.spec for c in bound])

  def compliance(
    conversations: Conversations, asked: Bool[np.ndarray, "n k"]
  ) -> Float[np.ndarray, "n k"]:
    return cache.scores(conversations, asked).log_odds

  return compliance
