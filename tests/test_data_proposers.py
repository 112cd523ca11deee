"""Rules that a conversation breaks or keeps: proposed, then checked."""

import collections

import numpy as np
import pytest

from csrm_jax.data import proposers
from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.proposers import TaxonomyProposer, annotation_judge, checked
from csrm_jax.spec import Rule, Spec, Subcategory, complies


def forbid(name: str, text: str = "") -> Rule:
  return Rule(id=name, guideline=text or f"all {name}", polarity="forbid")


NAMES = ("tea", "milk", "rum", "gin")
TAXONOMY = Taxonomy(
  "drinks",
  tuple(forbid(name) for name in NAMES),
  {"rum": (forbid("rum", "any talk of rum"), forbid("rum", "rum drinks"))},
)
EMPTY = Spec()


def talk(name: str, **violated: int | None) -> Annotated:
  turns = (("user", "A drink?"), ("assistant", f"Sure, {name}."))
  return Annotated(name, name, turns, violated, 0, None, None, "drinks", "ours")


DRINKERS = [talk(f"c{n}", tea=0, milk=None, rum=1, gin=1) for n in range(60)]


@pytest.mark.parametrize(
  ("broken", "expected"), [(True, {"rum", "gin"}), (False, {"tea"})]
)
def test_taxonomy_proposes_what_the_annotation_knows(broken, expected):
  proposer = TaxonomyProposer(TAXONOMY)
  made = [proposer.propose_rule(c, EMPTY, broken=broken) for c in DRINKERS]
  assert {rule.id for rule in made if rule} == expected
  wanted = 0 if broken else 1
  for rule, c in zip(made, DRINKERS, strict=True):
    assert rule and complies(Spec(rules=(rule,)), c.violated) == wanted
  if broken:  # every wording is used
    texts = collections.Counter(r.guideline for r in made if r)
    assert set(texts) == {"all gin", "all rum", "any talk of rum", "rum drinks"}


def test_taxonomy_leaves_out_what_the_spec_says():
  proposer = TaxonomyProposer(TAXONOMY)
  spec = Spec(rules=(forbid("rum", "in other words"),))
  made = {
    rule.id
    for c in DRINKERS
    if (rule := proposer.propose_rule(c, spec, broken=True))
  }
  assert made == {"gin"}
  both = Spec(text=f"S1: {forbid('gin').render()}\nS2: Disallowed: ALL RUM.")
  assert proposer.propose_rule(DRINKERS[0], both, broken=True) is None


def test_choices_depend_on_the_seed_and_the_conversation_alone():
  def made(seed, some):
    proposer = TaxonomyProposer(TAXONOMY, seed)
    return {c.id: proposer.propose_rule(c, EMPTY, broken=True) for c in some}

  assert made(0, DRINKERS) == made(0, DRINKERS[::-1])
  assert made(0, DRINKERS) != made(1, DRINKERS)


def test_a_level_must_part_allowed_from_forbidden():
  subs = [Subcategory(id=n, title=n, severity=2) for n in ("a", "b")]
  rule = Rule(id="r", polarity="forbid", subcategories=tuple(subs))
  with pytest.raises(ValueError, match=r"'r'.*'b'.*severity 2.*level 2"):
    TaxonomyProposer().write_guideline(rule, subs[:1], subs[1:])


def test_checked_keeps_what_the_judge_confirms():
  items = [(c, EMPTY) for c in DRINKERS]
  items.append((talk("sober", rum=0, gin=0, milk=0, tea=0), EMPTY))

  def judge(rows):
    """Sees rum, but takes gin for water and gives no answer to c3."""
    rum = np.array([row["spec"].rules[0].id == "rum" for row in rows])
    told = np.array([row["id"] != "c3" for row in rows])
    return np.where(told, np.where(rum, -2.0, 2.0), np.nan)

  counts: dict[str, int] = {}
  proposer = TaxonomyProposer(TAXONOMY)
  made = checked(items, judge, proposer, broken=True, counts=counts)
  assert len(made) == 61 and made[3] is made[60] is None
  assert {rule.id for rule in made if rule} == {"rum"}
  proposed = [proposer.propose_rule(c, s, broken=True) for c, s in items]
  rum = [i for i, r in enumerate(proposed) if r and r.id == "rum" and i != 3]
  assert [i for i, r in enumerate(made) if r] == rum
  assert counts == {
    "agreed": len(rum), "disagreed": 59 - len(rum), "unanswered": 1,
    "not_proposed": 1,
  }  # fmt: skip


def test_checked_rules_that_are_kept():
  items = [(c, EMPTY) for c in DRINKERS]
  judge = annotation_judge(DRINKERS)
  counts: dict[str, int] = {}
  made = checked(
    items, judge, TaxonomyProposer(TAXONOMY), broken=False, counts=counts
  )
  assert {rule.id for rule in made if rule} == {"tea"}
  assert counts == {"agreed": 60}


class Parrot(TaxonomyProposer):
  def propose_rule(self, conversation, spec, *, broken):
    return spec.rules[0]


def test_a_rule_of_the_spec_is_no_proposal():
  counts: dict[str, int] = {}
  items = [(DRINKERS[0], Spec(rules=(forbid("rum"),)))]
  judge = annotation_judge(DRINKERS)
  assert checked(items, judge, Parrot(), broken=True, counts=counts) == [None]
  assert counts == {"already_in_spec": 1}


def test_annotation_judge():
  judge = annotation_judge(DRINKERS)

  def asked(spec) -> float:
    return float(judge([{"id": "c0", "messages": [], "spec": spec}])[0])

  assert asked(Spec(rules=(forbid("rum"),))) == -proposers.CERTAIN
  assert asked({"rules": [forbid("tea").model_dump()]}) == proposers.CERTAIN
  assert np.isnan(asked(Spec(rules=(forbid("milk"),))))
  assert np.isnan(asked("No rum."))  # of a plain text nothing is known
  water = Spec(rules=(forbid("water"),))
  assert np.isnan(asked(water))
  assumed = annotation_judge(DRINKERS, missing=0)
  row = {"id": "c0", "messages": [], "spec": water}
  assert assumed([row])[0] == proposers.CERTAIN
