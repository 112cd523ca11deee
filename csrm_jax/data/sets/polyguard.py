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


class _Clause(NamedTuple):
  """One rule of a written policy."""

  category: str
  text: str


_WORDINGS = 2  # specs around each rule: few, so that rows share them


def _around(
  clause: _Clause, clauses: tuple[_Clause, ...], key: str
) -> tuple[_Clause, ...]:
  """A spec of this rule and none to two rules of other categories."""
  rng = random.Random(key)
  others = [c for c in clauses if c.category != clause.category]
  extra = rng.sample(others, min(len(others), rng.choice((0, 0, 1, 2))))
  rules = [clause, *extra]
  rng.shuffle(rules)
  return tuple(rules)


def _clause_text(rules: tuple[_Clause, ...], titled: bool) -> str:
  return "\n".join(
    f"S{i}: {rule.category + '. ' if titled else ''}{rule.text}"
    for i, rule in enumerate(rules, 1)
  )


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Texts that break a rule of a written policy, and their repaired versions.

  A violating text is judged under a spec with its rule (0) and under one of
  other categories of the same policy (1): two label rows and a spec pair.
  Every second repaired text is judged under the rule (1). No response pairs:
  the repaired text is the longer one too often.
  """
  fields = ("id", "policy", "category", "rule", "violating", "compliant")
  raws = [
    raw
    for file in FILES
    for raw in objects(find(path, "polyguard", file), fields)
  ]
  drawn: dict[str, list[_Clause]] = {}  # as often as they are broken
  for raw in raws:
    clause = _Clause(raw["category"], raw["rule"])
    drawn.setdefault(raw["policy"], []).append(clause)
  drawn = {policy: sorted(found) for policy, found in drawn.items()}
  clauses = {p: tuple(dict.fromkeys(c)) for p, c in drawn.items()}
  counts["polyguard_read"] = len(raws)
  counts["polyguard_without_other_rule"] = 0
  for raw in raws:
    policy = raw["policy"]
    rng = random.Random(f"{seed}:{raw['id']}")

    def spec_of(clause: _Clause, rng=rng, policy=policy):
      variant = rng.randrange(_WORDINGS)
      key = f"{seed}:{policy}:{clause}:{variant}"
      return _around(clause, clauses[policy], key), variant == 0

    rules, titled = spec_of(_Clause(raw["category"], raw["rule"]))
    right = _clause_text(rules, titled)
    wrong = None
    for _ in range(20):
      other, titled = spec_of(rng.choice(drawn[policy]))
      if all(_differs(rule, raw) for rule in other):
        wrong = _clause_text(other, titled)
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


def _differs(rule: _Clause, raw: Row) -> bool:
  return rule.category != raw["category"] and rule.text != raw["rule"]
