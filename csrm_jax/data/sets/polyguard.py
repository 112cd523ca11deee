"""PolyGuard: texts that break a rule of a written policy, and repaired ones."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from csrm_jax.data.contract import Row, find, hash_family, objects

FILES = (
  "polyguard/hr.jsonl.gz",
  "polyguard/education.jsonl.gz",
  "polyguard/social_media.jsonl.gz",
)
# Whole policies kept from training and from its held-out rows alike, for
# evaluation: of each domain one of middling size, picked before any result.
UNSEEN_POLICIES = (
  "hr/Adobe",
  "education/COLLEGE_BOARD_AP",
  "social_media/Discord",
)
_FIELDS = ("id", "policy", "category", "rule", "violating", "compliant")


class Clause(NamedTuple):
  """One rule of a written policy."""

  category: str
  text: str


_WORDINGS = 2  # specs around each rule: few, so that rows share them


def _around(
  clause: Clause, clauses: tuple[Clause, ...], key: str
) -> tuple[Clause, ...]:
  """A spec of this rule and none to two rules of other categories."""
  rng = random.Random(key)
  others = [c for c in clauses if c.category != clause.category]
  extra = rng.sample(others, min(len(others), rng.choice((0, 0, 1, 2))))
  rules = [clause, *extra]
  rng.shuffle(rules)
  return tuple(rules)


def clause_text(rules: tuple[Clause, ...], titled: bool) -> str:
  return "\n".join(
    f"S{i}: {rule.category + '. ' if titled else ''}{rule.text}"
    for i, rule in enumerate(rules, 1)
  )


def texts(path: str | Path | None) -> Iterator[Row]:
  """The lines of the set as they are, of all policies.

  Raises:
    ValueError: a file is missing, or a line lacks a field.
  """
  for file in FILES:
    yield from objects(find(path, "polyguard", file), _FIELDS)


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Texts that break a rule of a written policy, and their repaired versions.

  A violating text is judged under a spec with its rule (0) and under one of
  other categories of the same policy (1): two label rows and a spec pair.
  Every second repaired text is judged under the rule (1). No response pairs:
  the repaired text is the longer one too often. `UNSEEN_POLICIES` give none.
  """
  found = list(texts(path))
  raws = [raw for raw in found if raw["policy"] not in UNSEEN_POLICIES]
  drawn: dict[str, list[Clause]] = {}  # as often as they are broken
  for raw in raws:
    clause = Clause(raw["category"], raw["rule"])
    drawn.setdefault(raw["policy"], []).append(clause)
  drawn = {policy: sorted(found) for policy, found in drawn.items()}
  clauses = {p: tuple(dict.fromkeys(c)) for p, c in drawn.items()}
  counts["polyguard_read"] = len(found)
  counts["polyguard_unseen_policy"] = len(found) - len(raws)
  counts["polyguard_without_other_rule"] = 0
  for raw in raws:
    policy = raw["policy"]
    rng = random.Random(f"{seed}:{raw['id']}")

    def spec_of(clause: Clause, rng=rng, policy=policy):
      variant = rng.randrange(_WORDINGS)
      key = f"{seed}:{policy}:{clause}:{variant}"
      return _around(clause, clauses[policy], key), variant == 0

    rules, titled = spec_of(Clause(raw["category"], raw["rule"]))
    right = clause_text(rules, titled)
    wrong = None
    for _ in range(20):
      other, titled = spec_of(rng.choice(drawn[policy]))
      if all(_differs(rule, raw) for rule in other):
        wrong = clause_text(other, titled)
        break
    common = {"source": "polyguard", "family": hash_family(raw["violating"])}
    broken = {"messages": [{"role": "assistant", "content": raw["violating"]}]}
    whole = {"messages": [{"role": "assistant", "content": raw["compliant"]}]}
    yield {
      "id": f"{raw['id']}/right",
      **broken,
      "label": 0,
      "spec": right,
    } | common
    if wrong is None:
      counts["polyguard_without_other_rule"] += 1
    else:
      yield {
        "id": f"{raw['id']}/wrong",
        **broken,
        "label": 1,
        "spec": wrong,
      } | common
      yield {
        "id": f"{raw['id']}/duo",
        **broken,
        "chosen_spec": wrong,
        "rejected_spec": right,
      } | common
    if rng.random() < 0.5:
      yield {
        "id": f"{raw['id']}/repaired",
        **whole,
        "label": 1,
        "spec": right,
      } | common


def _differs(rule: Clause, raw: Row) -> bool:
  return rule.category != raw["category"] and rule.text != raw["rule"]
