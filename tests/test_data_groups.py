"""Groups: both sides disagree as drafted, edits keep every label."""

import random

import pytest

from csrm_jax.data import domains, groups
from csrm_jax.data.groups import Clause, Conversation, truth, word
from csrm_jax.spec import Rule, Spec


def made(split: str, count: int, edits=(None, None), max_rules: int = 3):
  source = domains.pool(split)
  for seed in range(count):
    rng = random.Random(seed)
    yield groups.group(rng, source, max_rules=max_rules, edits=edits)


def of(domain: str, severity: int, refusal: int = 0) -> Conversation:
  return Conversation(domain, severity, refusal, (("assistant", "..."),))


def spec_of(*clauses: Clause) -> Spec:
  rng = random.Random(0)
  return Spec(rules=tuple(word(rng, c) for c in clauses))


def test_truth_by_hand():
  world = domains.world()
  alcohol, gambling = world["alcohol"], world["gambling"]
  mild, severe = of("alcohol", 1), of("alcohol", 4)
  neutral, refusal = of("alcohol", 0), of("alcohol", 0, 1)
  cases = (
    (Clause(alcohol, "forbid"), (0, 0, 1, 1)),
    (Clause(alcohol, "allow"), (1, 1, 1, 1)),
    (Clause(gambling, "forbid"), (1, 1, 1, 1)),
    (Clause(alcohol, "forbid", (1,)), (0, 1, 1, 1)),
    (Clause(alcohol, "level", (1, 3, 4), 3), (1, 0, 1, 1)),
    (Clause(alcohol, "answer"), (1, 1, 1, 0)),
    (Clause(alcohol, "decline"), (0, 0, 0, 1)),
    (Clause(gambling, "answer"), (1, 1, 1, 1)),
    (Clause(gambling, "decline"), (1, 1, 1, 1)),
  )
  for clause, labels in cases:
    spec = spec_of(clause)
    found = tuple(truth(spec, c) for c in (mild, severe, neutral, refusal))
    assert found == labels, (spec.render(), found)
  both = spec_of(Clause(alcohol, "answer"), Clause(gambling, "forbid"))
  assert truth(both, refusal) == 0
  assert truth(both, of("gambling", 2)) == 0
  assert truth(both, of("gambling", 0, 1)) == 1


def test_contradictory_spec_has_no_truth():
  alcohol = domains.world()["alcohol"]
  spec = spec_of(Clause(alcohol, "forbid"), Clause(alcohol, "allow"))
  with pytest.raises(ValueError, match="contradictory spec"):
    truth(spec, of("alcohol", 1))


def test_every_wording_is_reached():
  rng = random.Random(0)
  for domain in domains.world().values():
    rules = [word(rng, Clause(domain, "forbid")) for _ in range(400)]
    text = " ".join(r.render().lower() for r in rules)
    for wording in domain.rule_texts():
      assert wording.lower() in text


@pytest.mark.parametrize("split", ["train", "seen", "unseen"])
def test_sides_disagree_and_edits_do_not(split: str):
  kinds, edits = set(), set()
  for group in made(split, 150):
    kinds.add(group.kind)
    labels = [
      tuple(truth(v.spec, c) for c in group.conversations)
      for v in group.versions
    ]
    a, b, a_edited, b_edited = labels
    assert a == a_edited and b == b_edited
    flips = sum(x != y for x, y in zip(a, b, strict=True))
    assert flips >= len(a) / 2
    assert sum(a) == sum(b) == len(a) / 2
    for version, base in zip(group.versions[2:], group.versions, strict=False):
      edits.add(version.edit)
      assert version.spec.render() != base.spec.render()
    assert all(1 <= len(v.spec.rules) <= 3 for v in group.versions)
  assert kinds == set(groups.KINDS)
  assert edits == {"reword", "permute", "add_inert", "borrow", "drop_inert"}


def test_edits_do_what_they_say():
  for group in made("train", 200):
    for version, base in zip(group.versions[2:], group.versions, strict=False):
      new, old = version.spec.rules, base.spec.rules
      assert version.side == base.side
      if version.edit == "permute":
        assert new != old and sorted(map(str, new)) == sorted(map(str, old))
      elif version.edit == "reword":
        assert [r.id for r in new] == [r.id for r in old] and new != old
      elif version.edit == "drop_inert":
        assert len(new) == len(old) - 1 and set(new) < set(old)
      else:
        polarity = "allow" if version.edit == "add_inert" else "forbid"
        (added,) = set(new) - set(old)
        assert added.polarity == polarity and len(new) == len(old) + 1


def test_group_repeats_no_conversation():
  for group in made("train", 100):
    texts = [c.messages for c in group.conversations]
    assert len(texts) == len(set(texts))
    assert 4 <= len(texts) <= 10


def test_akin_domains_never_meet():
  for group in made("train", 300):
    names = {c.domain for c in group.conversations}
    rules: list[Rule] = [r for v in group.versions for r in v.spec.rules]
    names |= {r.domain for r in rules}
    for akin in domains.AKIN:
      assert len(names & akin) <= 1, names


def test_kinds_are_drawn_by_the_weights_given():
  assert groups.parse_kinds("") == groups.KINDS
  weights = groups.parse_kinds(" swap=3, refusal = 1")
  assert weights == {"swap": 3.0, "refusal": 1.0}
  source = domains.pool("train")
  drawn = [
    groups.group(
      random.Random(i), source, max_rules=3, edits=(), kinds=weights
    ).kind
    for i in range(200)
  ]
  assert set(drawn) == set(weights) and 120 < drawn.count("swap") < 180


@pytest.mark.parametrize(
  "text", ["swaps=1", "swap", "swap=0", "swap=-1", "swap=inf", "swap=nan"]
)
def test_other_kinds_are_refused(text):
  with pytest.raises(ValueError, match=r"--config\.data\.kinds=.*presence"):
    groups.parse_kinds(text)


@pytest.mark.parametrize("kind", [k for k in groups.KINDS if k != "refusal"])
def test_refusals_asked_for_comply_with_all_specs(kind):
  for seed in range(20):
    group = groups.group(
      random.Random(seed),
      domains.pool("train"),
      max_rules=3,
      edits=[None],
      kinds={kind: 1.0},
      refusals=1.0,
    )
    specs = [v.spec for v in group.versions]
    refusals = [c for c in group.conversations if c.refusal]
    disputed = {
      c.domain for c in group.conversations if len({*truths(specs, c)}) == 2
    }
    assert disputed <= {c.domain for c in refusals}
    assert all({*truths(specs, c)} == {1} for c in refusals)


def truths(specs, conversation) -> list[int]:
  return [truth(spec, conversation) for spec in specs]
