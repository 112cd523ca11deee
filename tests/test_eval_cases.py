"""Cases: the synthetic suite with its truth, and edits that keep promises."""

import random

import numpy as np
import pytest

from csrm_jax.data import synthetic
from csrm_jax.eval import cases, measured
from csrm_jax.spec import Rule, Spec

SUITES = ("synthetic_seen", "synthetic_unseen")


@pytest.fixture(scope="module")
def made():
  return cases.synthetic("synthetic_unseen", size=80)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("size", [1, 60])
def test_synthetic_is_the_suite_of_that_name(name, size):
  rows = synthetic.suite(name, size=size, seed=3)
  got = cases.synthetic(name, size=size, seed=3)
  assert len(got) == len(rows) > 0
  for case, row in zip(got, rows, strict=True):
    assert case.id == row["id"] and case.family == row["family"]
    assert case.label == row["label"] and case.messages == row["messages"]
    assert case.spec.render() == row["spec"]
    assert (case.base, case.edit) == (row.get("base", ""), row["edit"])
    assert case.truth is not None and case.truth(case.spec) == case.label


def test_synthetic_refuses_other_names():
  with pytest.raises(ValueError, match="must be one of synthetic_seen"):
    cases.synthetic("train")


def test_from_rows_reads_specs_and_names_what_is_missing():
  rows = synthetic.suite("synthetic_seen", size=10)
  got = cases.from_rows(rows)
  assert [c.id for c in got] == [r["id"] for r in rows]
  assert all(c.truth is None and not c.spec.rules for c in got)
  rules = {"rules": [{"id": "a", "guideline": "x", "polarity": "forbid"}]}
  assert cases.from_rows([rows[0] | {"spec": rules}])[0].spec.rules
  for field in ("label", "spec", "messages"):
    broken = {k: v for k, v in rows[0].items() if k != field}
    with pytest.raises(ValueError, match=f"{rows[0]['id']}.*{field}"):
      cases.from_rows([broken])


def test_some_draws_conversations_with_all_their_edits_from_every_family(made):
  families = len({c.family for c in made})
  for count in (1, 10, len(made) // 2):
    few = cases.some(made, count)
    bases = {c.base or c.id for c in few}
    assert count <= len(few) < len(made)
    assert few == [c for c in made if (c.base or c.id) in bases]
    assert len({c.family for c in few}) == min(families, len(bases))
    smaller = cases.some(made, count - 1)
    assert {c.id for c in smaller} <= {c.id for c in few} or count == 1
  assert cases.some(made, 0) == list(made)


def test_distractors_and_rewordings_change_no_truth(made):
  rng = random.Random(0)
  polarities = set()
  for case in made:
    for spec in (
      cases.distracted(case, 80, rng),
      cases.distracted(case, 3, rng, polarity="forbid"),
      cases.reworded(case.spec, rng),
    ):
      assert spec is not None and case.truth is not None
      assert case.truth(spec) == case.label
    longer = cases.distracted(case, 80, rng).rules
    assert len(longer) == 80 + len(case.spec.rules)
    assert [r for r in longer if r in case.spec.rules] == list(case.spec.rules)
    polarities |= {r.polarity for r in longer if "distractor" in r.id}
    idle = {
      r.domain.removesuffix(".idle")
      for r in longer
      if r.id.startswith("distractor")
    }
    assert idle and not idle & case.about
  assert polarities == {"forbid", "allow"}
  bare = made[0]._replace(truth=None)
  added = cases.distracted(bare, 80, rng, polarity="forbid").rules
  assert {r.polarity for r in added if "distractor" in r.id} == {"allow"}
  with pytest.raises(ValueError, match="ask for fewer"):
    cases.distracted(bare, 5000, rng)


def test_rewording_changes_words(made):
  rng = random.Random(0)
  other = [cases.reworded(c.spec, rng) for c in made]
  changed = [
    o.render() != c.spec.render() for o, c in zip(other, made, strict=True) if o
  ]
  assert np.mean(changed) > 0.9
  own = Spec(rules=(Rule(id="x", guideline="lies", polarity="forbid"),))
  assert cases.reworded(own, rng) is None
  assert cases.reworded(Spec(), rng) is None
  assert cases.reframed(own).render() == "S1: Not permitted: lies."


def test_edits_of_one_rule():
  rules = tuple(
    Rule(id=i, guideline=i, polarity="forbid" if i < "c" else "require")
    for i in "abc"
  )
  spec = Spec(rules=rules)
  assert [r.id for r in cases.without(spec, 1).rules] == ["a", "c"]
  assert [r.id for r in cases.ordered(spec, (2, 0, 1)).rules] == ["c", "a", "b"]
  assert cases.allowing(spec, 0).rules[0].polarity == "allow"
  for first in (True, False):
    got = cases.contradicting(spec, 1, first=first).rules
    assert [r.polarity for r in got[1:3]] == (
      ["allow", "forbid"] if first else ["forbid", "allow"]
    )
    assert [got[0], got[3]] == [rules[0], rules[2]]
  turned = [r.polarity for r in cases.inverted(spec).rules]
  assert turned == ["allow", "allow", "forbid"]


def test_said_edits_the_last_turn_of_a_role_and_copies():
  messages = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
  ]
  got = cases.said(messages, "user", before="<", after=">")
  assert got and [m["content"] for m in got] == ["<a>", "b"]
  assert messages[0]["content"] == "a"
  assert cases.said(messages, "tool", after="x") is None


def test_remember_asks_each_row_once_and_keeps_order(made):
  asked = []

  def judge(rows):
    asked.extend(rows)
    return np.array([float(len(r["spec"])) for r in rows])

  rows = [measured.question(c) for c in made[:6]]
  told = measured.remember(judge)
  first = told([*rows, *rows[::-1]])
  np.testing.assert_array_equal(first[:6], first[6:][::-1])
  np.testing.assert_array_equal(told(rows), first[:6])
  assert len(asked) == len({(str(r["messages"]), r["spec"]) for r in rows})
  assert first[0] == len(rows[0]["spec"])


def test_ask_refuses_silence(made):
  rows = [measured.question(c) for c in made[:2]]
  with pytest.raises(ValueError, match=rows[0]["id"]):
    measured.ask(lambda rows: np.full(len(rows), np.nan), rows)


def test_mean_leaves_out_what_is_unknown():
  weight = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 5.0]])
  got = measured.mean(weight, [1.0, 3.0, np.nan])
  np.testing.assert_allclose(got, [2.0, 1.0])
  assert np.isnan(measured.mean(np.ones(1), [np.nan]))


def test_measured_intervals_cover_families_not_rows():
  values = np.repeat([0.0, 1.0], 50)
  one = measured.measured(
    lambda w: {
      "x": measured.mean(w, values),
      "y": np.full(w.shape[:-1], np.nan)[()],
    },
    ["a"] * 50 + ["b"] * 50,
  )
  assert one["x"] == 0.5 and one["n"] == 100 and one["families"] == 2
  assert one["intervals"]["x"] == [0.0, 1.0] and "y" not in one
