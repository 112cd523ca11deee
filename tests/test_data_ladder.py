"""Ladders: the bounds, what passes, what is kept apart, and the rows."""

import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from csrm_jax.data import contract, domains, groups, ladder, proposers
from csrm_jax.data.annotated import Annotated
from csrm_jax.data.proposers import TaxonomyProposer, annotation_judge
from csrm_jax.spec import Rule, Spec, Subcategory, complies

KINDS = ("naming it", "joking about it", "selling it", "forcing it on people")
RULE = Rule(
  id="tea",
  title="Tea",
  guideline="never talk about tea",
  polarity="forbid",
  subcategories=tuple(
    Subcategory(id=f"k{n}", title=title, severity=n)
    for n, title in enumerate(KINDS, 1)
  ),
)


def talk(name: str, *broken: str, taxonomy: tuple[str, ...] = ()) -> Annotated:
  """A conversation that breaks some of the sub-categories, and no others."""
  keys = taxonomy or tuple(s.id for s in RULE.subcategories)
  return Annotated(
    id=name,
    family=f"family {name}",
    messages=(("user", "Tea?"), ("assistant", f"Well, {name}.")),
    violated={k: int(k in broken) for k in keys},
    refusal=0,
    severity=None,
    helpfulness=None,
    taxonomy="drinks",
    source="ours",
  )


def pool(each: int) -> list[Annotated]:
  """`each` conversations under every kind of behaviour, one kind each."""
  return [
    talk(f"{kind}-{n}", kind)
    for kind in ("k1", "k2", "k3", "k4")
    for n in range(each)
  ]


def rung(number: int, text: str = "") -> ladder.Rung:
  rule = Rule(id="r", guideline=text or f"text {number}", polarity="forbid")
  return ladder.Rung(number, rule)


def odds(flags: str) -> np.ndarray:
  """Verdicts as letters: u(nsafe), s(afe), ? (no answer)."""
  return np.array([{"u": -1.0, "s": 2.0, "?": np.nan}[f] for f in flags])


def compared(strict: str, lenient: str) -> ladder.Cell:
  return ladder.compare(rung(2), rung(1), odds(strict), odds(lenient))


# -- The test of one pair --------------------------------------------------


@pytest.mark.parametrize(
  ("n", "misses", "status"),
  [
    (58, 0, "too_few"),
    (59, 0, "ordered"),
    (99, 1, "ordered"),
    (92, 1, "failed"),
    (100, 1, "ordered"),
    (100, 2, "failed"),
    (150, 2, "ordered"),
    (150, 3, "failed"),
    (200, 4, "ordered"),
    (200, 5, "failed"),
    (70, 70, "failed"),
  ],
)
def test_bound_of_the_order(n, misses, status):
  # 40 further conversations that the strict text alone flags: a clear gap.
  cell = compared(
    "u" * (n - misses) + "s" * misses + "u" * 40, "u" * n + "s" * 40
  )
  assert (cell.n, cell.k, cell.status) == (n, n - misses, status)
  expected = (
    scipy.stats.beta.ppf(0.05, n - misses, misses + 1) if misses < n else 0.0
  )
  np.testing.assert_allclose(cell.order, expected, atol=1e-12)


def test_golden_bounds():
  for n, misses, bound in ((59, 0, 0.95049239), (58, 0, 0.94966066)):
    cell = compared("u" * (n - misses) + "s" * misses, "u" * n)
    np.testing.assert_allclose(cell.order, bound, atol=1e-8)


@given(st.lists(st.sampled_from(["uu", "us", "su", "ss"]), max_size=120))
def test_bounds_equal_an_exact_binomial_test(verdicts):
  cell = compared(
    "".join(v[0] for v in verdicts), "".join(v[1] for v in verdicts)
  )
  tried = {
    "order": (
      verdicts.count("uu"),
      verdicts.count("uu") + verdicts.count("su"),
    ),
    "gap": (verdicts.count("us"), len(verdicts)),
    "equality": (verdicts.count("uu") + verdicts.count("ss"), len(verdicts)),
  }
  for name, (hits, trials) in tried.items():
    expected = 0.0
    if trials:
      test = scipy.stats.binomtest(hits, trials, alternative="greater")
      expected = test.proportion_ci(0.95, method="exact").low
    np.testing.assert_allclose(getattr(cell, name), expected, atol=1e-9)


@given(
  st.lists(st.sampled_from(["uu", "us", "su", "ss"]), min_size=1, max_size=80),
  st.data(),
)
def test_a_missing_answer_raises_no_bound(verdicts, data):
  sides = ["".join(v[0] for v in verdicts), "".join(v[1] for v in verdicts)]
  full = compared(*sides)
  side = data.draw(st.integers(0, 1))
  at = data.draw(st.integers(0, len(verdicts) - 1))
  sides[side] = sides[side][:at] + "?" + sides[side][at + 1 :]
  less = compared(*sides)
  assert less.unanswered == 1
  for name in ("order", "gap", "equality"):
    assert getattr(less, name) <= getattr(full, name) + 1e-12


def test_equal_texts_are_not_ordered():
  same = "u" * 149
  assert compared(same, same).status == "equal"
  assert compared(same[1:], same[1:]).status == "undecided"  # 148: 0.97996
  one = ladder.compare(rung(2, "one"), rung(1, "one"), odds(same), odds(same))
  assert one.status == "identical"


def test_gap_needs_more_than_two_percent():
  rows = 200
  bounds = {k: scipy.stats.beta.ppf(0.05, k, rows - k + 1) for k in (7, 8)}
  assert bounds[7] < ladder.GAP < bounds[8]
  for only, status in ((7, "undecided"), (8, "ordered")):
    lenient = "u" * (rows - only) + "s" * only
    assert compared("u" * rows, lenient).status == status


# -- From severities -------------------------------------------------------


def test_from_severities_renders_lenient_to_strict():
  made = [rule.render() for rule in ladder.from_severities(RULE)]
  assert made == [
    "Tea. Disallowed: forcing it on people. "
    "Allowed: selling it; joking about it; naming it.",
    "Tea. Disallowed: forcing it on people; selling it. "
    "Allowed: joking about it; naming it.",
    "Tea. Disallowed: forcing it on people; selling it; joking about it. "
    "Allowed: naming it.",
  ]


def test_from_severities_never_splits_equals():
  subs = [
    s.model_copy(update={"severity": severity})
    for s, severity in zip(RULE.subcategories, (2, 7, 7, 3), strict=True)
  ]
  tied = RULE.model_copy(update={"subcategories": tuple(subs)})
  forbidden = [
    {s.id for s in rule.split()[0]} for rule in ladder.from_severities(tied)
  ]
  assert forbidden == [{"k2", "k3"}, {"k2", "k3", "k4"}]


def test_from_severities_refuses_what_has_no_ladder():
  with pytest.raises(
    ValueError, match=r"'tea'.*polarity.*'allow'.*forbid rule"
  ):
    ladder.from_severities(RULE.model_copy(update={"polarity": "allow"}))
  bare = RULE.model_copy(update={"subcategories": ()})
  with pytest.raises(ValueError, match="'subcategories': empty"):
    ladder.exact(bare)


@given(
  st.lists(st.integers(1, 4), min_size=2, max_size=5),
  st.lists(st.sampled_from([0, 1, None]), min_size=5, max_size=5),
)
def test_a_stricter_rung_never_permits_more(severities, truths):
  subs = tuple(
    Subcategory(id=f"k{n}", title=f"kind {n}", severity=severity)
    for n, severity in enumerate(severities)
  )
  made = ladder.exact(RULE.model_copy(update={"subcategories": subs}))
  violated = {s.id: t for s, t in zip(subs, truths, strict=False)}
  known = all(v is not None for v in violated.values())
  label = {
    r.number: complies(Spec(rules=(r.rule,)), violated) for r in made.rungs
  }
  assert len(made.rungs) == len(set(severities)) - 1
  assert len(made.pairs) == len(made.rungs) * (len(made.rungs) - 1) // 2
  for strict, lenient in made.pairs:
    if known:
      assert 0 <= label[strict] <= label[lenient]
    assert not (label[strict] == 1 and label[lenient] == 0)


# -- By a judge ------------------------------------------------------------


def test_build_by_annotation_is_the_exact_ladder():
  some = [*pool(60), talk("innocent"), talk("unknown")]
  some[-1] = some[-1]._replace(violated={})
  built = ladder.build(RULE, some, annotation_judge(some), TaxonomyProposer())
  exact = ladder.exact(RULE)
  assert built.pairs == exact.pairs == ((2, 1), (3, 1), (3, 2))
  assert [r.rule.render() for r in built.rungs] == [
    r.rule.render() for r in exact.rungs
  ]
  assert [r.flagged for r in built.rungs] == [60, 120, 180]
  assert [(c.n, c.k) for c in built.cells] == [(60, 60), (60, 60), (120, 120)]
  assert built.counts == {
    "pool": 240, "outside": 1, "unanswered": 1, "uncovered": 0, "ordered": 3,
    "equal": 0, "undecided": 0, "failed": 0, "too_few": 0, "identical": 0,
  }  # fmt: skip


def test_small_cells_are_reported_and_never_pass():
  some = pool(29)  # d_1 flags 29, d_2 58, d_3 87
  built = ladder.build(RULE, some, annotation_judge(some), TaxonomyProposer())
  assert [(c.strict, c.lenient, c.n, c.status) for c in built.cells] == [
    (2, 1, 29, "too_few"),
    (3, 1, 29, "too_few"),
    (3, 2, 58, "too_few"),
  ]
  assert not built.pairs and built.counts["too_few"] == 3
  counts: dict[str, int] = {}
  assert list(ladder.rows(built, some, counts=counts)) == []
  assert counts == {"ladder_without_pairs": 116}


def test_wordings_that_a_judge_does_not_tell_apart_are_paraphrases():
  some = pool(40)

  def deaf(rows):
    return np.full(len(rows), -3.0)

  built = ladder.build(RULE, some, deaf, TaxonomyProposer())
  assert built.pairs == ()
  assert built.paraphrases == ((2, 1), (3, 1), (3, 2))


def test_a_wrong_order_fails():
  some = pool(60)
  truth = annotation_judge(some)

  def muddled(rows):
    """Reads the ladder upside down: what is allowed, it forbids."""
    turned = []
    for row in rows:
      rule = row["spec"].rules[0]
      if rule.level is not None:
        rule = rule.model_copy(
          update={"level": None, "subcategories": tuple(rule.split()[1])}
        )
      turned.append({**row, "spec": Spec(rules=(rule,))})
    return truth(turned)

  built = ladder.build(RULE, some, muddled, TaxonomyProposer())
  assert built.pairs == () and built.counts["failed"] == 3


class Forgetful(TaxonomyProposer):
  """Names the mildest kind first, and others only when it meets them."""

  def propose_subcategories(self, rule):
    return rule.subcategories[:1]

  def propose_one(self, rule, conversation, known):
    for sub in rule.subcategories[:3]:
      if conversation.violated[sub.id] == 1 and sub not in known:
        return sub
    return None  # the fourth never comes to its mind


def test_subcategories_grow_until_the_pool_is_covered():
  some = pool(3)
  built = ladder.build(RULE, some, annotation_judge(some), Forgetful())
  assert [s.id for s in built.subcategories] == ["k3", "k2", "k1"]
  assert [s.severity for s in built.subcategories] == [3, 2, 1]
  assert built.counts["uncovered"] == 3
  capped = ladder.build(RULE, some, annotation_judge(some), Forgetful(), most=2)
  assert len(capped.subcategories) == 2 and capped.counts["uncovered"] == 6


def test_answers_of_the_wrong_kind_are_refused():
  some = pool(1)
  judge = annotation_judge(some)
  with pytest.raises(ValueError, match=r"shape \(3,\) to 4 rows"):
    ladder.build(RULE, some, lambda rows: np.zeros(3), TaxonomyProposer())
  with pytest.raises(ValueError, match=r"'stranger'.*no annotation"):
    ladder.build(RULE, [talk("stranger")], judge, TaxonomyProposer())

  class Inventive(TaxonomyProposer):
    def most_severe(self, rule, left):
      return Subcategory(id="new", title="news")

  with pytest.raises(ValueError, match=r"named 'new' for rule 'tea'.*'k1'"):
    ladder.build(RULE, some, judge, Inventive())


# -- Rows ------------------------------------------------------------------


def test_rows_follow_the_contract_and_prefer_the_lenient(tmp_path):
  some = [*pool(2), talk("innocent")]
  made = ladder.exact(RULE)
  counts: dict[str, int] = {}
  rows = list(ladder.rows(made, some, counts=counts))
  assert counts == {"ladder_pairs": 24, "ladder_complying": 1}
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert list(contract.read_rows(path, kinds=("spec_pair",))) == rows
  weights: dict[str, float] = {}
  for row in rows:
    strict = row["rejected_spec"].split("Allowed:")[0]
    lenient = row["chosen_spec"].split("Allowed:")[0]
    assert len(strict) > len(lenient)
    weights[row["family"]] = weights.get(row["family"], 0.0) + row["weight"]
  np.testing.assert_allclose(list(weights.values()), 1.0)
  assert set(weights) == {c.family for c in some[:-1]}


def test_rows_of_the_synthetic_world_are_truly_ordered():
  rng = random.Random(0)
  source = domains.pool("train")
  checked = 0
  for domain in source.domains[:8]:
    rule = Rule(
      id=domain.id,
      title=domain.titles[0],
      polarity="forbid",
      domain=domain.id,
      subcategories=tuple(
        Subcategory(
          id=f"{domain.id}.{g.severity}",
          title=g.describe[0],
          severity=g.severity,
        )
        for g in domain.grades
      ),
    )
    made = ladder.exact(rule)
    texts = {Spec(rules=(r.rule,)).render(): r.rule for r in made.rungs}
    for grade in domain.grades:
      (said,) = groups.converse(rng, source, domain, [grade.severity])
      violated = {
        f"{domain.id}.{g.severity}": int(g.severity == grade.severity)
        for g in domain.grades
      }
      one = talk("x")._replace(messages=said.messages, violated=violated)
      for row in ladder.rows(made, [one]):
        lenient, strict = (
          groups.truth(Spec(rules=(texts[row[side]],)), said)
          for side in ("chosen_spec", "rejected_spec")
        )
        assert lenient >= strict
        checked += lenient > strict
  # Rank r of k severities flips where the lenient rung stops short of it.
  assert checked == sum(
    (r - 1) * (k - r)
    for k in (len(d.grades) for d in source.domains[:8])
    for r in range(2, k)
  )


def test_ladder_of_beavertails_categories(staged):
  path = Path(staged) / "beavertails" / "responses.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as file:
    read = [json.loads(line) for line in file]
  keys = tuple(sorted({c for row in read for c in row["categories"]}))
  count = {k: sum(k in row["categories"] for row in read) for k in keys}
  keys = tuple(sorted(keys, key=lambda k: count[k])[-5:])
  rule = Rule(
    id="harm",
    title="Harm",
    polarity="forbid",
    subcategories=tuple(
      Subcategory(id=key, title=f"kind {n}", severity=n)
      for n, key in enumerate(keys, 1)
    ),
  )
  some = [
    talk(row["id"], *row["categories"], taxonomy=keys)._replace(
      messages=(("user", row["prompt"]), ("assistant", row["response"]))
    )
    for row in read
  ]
  built = ladder.build(rule, some, annotation_judge(some), TaxonomyProposer())
  print(built.counts, [tuple(c[2:7]) for c in built.cells])
  broken = sum(bool(set(keys) & set(row["categories"])) for row in read)
  assert built.counts["pool"] == broken
  assert built.counts["outside"] == len(read) - broken
  assert built.counts["uncovered"] == 0
  assert all(c.k == c.n for c in built.cells)  # nested by construction
  assert set(built.pairs) == set(ladder.exact(rule).pairs)
  made = list(itertools.islice(ladder.rows(built, some), 500))
  assert len({row["id"] for row in made}) == 500


def test_judge_is_the_type_that_evaluation_uses():
  from csrm_jax.eval import judges

  assert judges.always_unsafe([{"id": "a"}]).shape == (1,)
  some = pool(1)
  built = ladder.build(RULE, some, judges.always_unsafe, TaxonomyProposer())
  assert built.counts["pool"] == 4 and proposers.CERTAIN == 10.0
