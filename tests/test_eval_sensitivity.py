"""Sensitivity: each probe tells a right judge from one with that fault."""

import itertools
import json

import numpy as np
import pytest

from csrm_jax import metrics
from csrm_jax.data import synthetic
from csrm_jax.eval import (
  cases,
  judges,
  margins,
  measured,
  probes,
  sensitivity,
)
from csrm_jax.eval.cases import Case
from csrm_jax.spec import Rule, Spec
from tests import tiny
from tests.oracle import Oracle

FAST = {"bootstrap": 20}


@pytest.fixture(scope="module")
def made():
  return cases.synthetic("synthetic_seen", size=120)


@pytest.fixture
def oracle(made, monkeypatch):
  return Oracle(monkeypatch, made)


def blind(rows):
  """Reads the response alone."""
  return np.array(
    [float(len(r["messages"][-1]["content"]) % 7) - 3.0 for r in rows]
  )


def case(name: str, label: float, *rules: Rule, family: str = "f") -> Case:
  messages = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": f"answer {name}"},
  ]
  return Case(name, family, messages, Spec(rules=rules), label)


def forbid(name: str) -> Rule:
  return Rule(id=name, guideline=name, polarity="forbid")


def test_report_of_a_right_judge(made, oracle, tmp_path):
  found = sensitivity.report(oracle, made, limit=30, **FAST)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert found["cases"] == len(made) and found["rows_asked"] == oracle.asked
  flips = found["flips"]
  assert flips["flip_recall"] == 1 and flips["spurious_flips"] == 0
  assert flips["sensitivity"] == 1 and flips["gold_flips"] > 20
  out = found["leave_one_out"]
  assert out["accuracy"] == 1 > out["chance"] and out["contests"] > 10
  assert out["decisive_shift"] == 6 and out["idle_shift"] == 0
  assert out["verdict_follows"] == 1 and out["verdict_moves"] == 0
  both = found["contradiction"]
  assert both["between"] == 1 and both["lean"] == 0
  assert (both["unsafe_forbid"], both["unsafe_allow"]) == (1, 0)
  many = found["distractors"]
  assert many["f1_drop"] == 0 and many["curve"]["f1_unsafe"] == [1.0] * 6
  assert found["paraphrase"]["verdict_equality"] == 1
  assert found["permutation"]["std"] == 0
  assert found["length"]["padding_shift"] == 0
  assert found["margins"]["accuracy_spec"] == 1
  assert found["margins"]["margin_resp"] == 6
  for name, probe in found.items():
    if isinstance(probe, dict):
      assert probe["n"] > 0, name
      for metric, (low, high) in probe["intervals"].items():
        assert low <= probe[metric] <= high, (name, metric)
  paths = sensitivity.draw(found, tmp_path)
  assert [p.name for p in paths] == [
    "sensitivity.png",
    "distractors.png",
    "margins.png",
  ]
  assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def test_a_blind_judge_follows_nothing(made):
  found = sensitivity.report(blind, made, limit=40, **FAST)
  assert found["flips"]["flip_recall"] == 0
  assert found["flips"]["sensitivity"] == 0
  out = found["leave_one_out"]
  np.testing.assert_allclose(out["accuracy"], out["chance"])
  assert out["decisive_shift"] == 0 and out["verdict_follows"] == 0
  assert found["margins"]["accuracy_spec"] == 0.5


def test_flips_equal_the_metrics_on_the_suite(made):
  z = measured.scores(lambda rows: _noise(rows), made)
  rows = synthetic.suite("synthetic_seen", size=120)
  place = {r["id"]: i for i, r in enumerate(rows)}
  base = np.array([place.get(r.get("base"), -1) for r in rows])
  gold = np.array([float(r["label"]) for r in rows])
  found = probes.flips(_noise, made, **FAST)
  np.testing.assert_allclose(
    found["flip_recall"], metrics.flip_recall(z, gold, base)
  )
  np.testing.assert_allclose(
    found["spurious_flips"], metrics.spurious_flips(z, gold, base)
  )
  by_edit = [
    (np.array([r["edit"] == e for r in rows]), found[f"spurious_flips_{e}"])
    for e in ("permute", "reword")
    if f"spurious_flips_{e}" in found
  ]
  assert by_edit
  for own, value in by_edit:
    moved = metrics.verdict(z)[own] != metrics.verdict(z)[base[own]]
    np.testing.assert_allclose(value, moved.mean())


def _noise(rows):
  return np.array(
    [
      np.sin(97.0 * len(r["spec"]) + len(r["messages"][-1]["content"]))
      for r in rows
    ]
  )


def test_attribution_finds_the_rule_that_the_judge_reads():
  def judge(rows):
    return np.array([-2.0 * ("poison" in r["spec"]) for r in rows])

  one = case("a", 0.0, forbid("dances"), forbid("poison"), forbid("songs"))
  got = probes.attribute(judge, [one, case("b", 1.0)])
  assert len(got) == 1 and got[0].decisive is None
  np.testing.assert_array_equal(got[0].shift, [0.0, 2.0, 0.0])
  found = probes.leave_one_out(judge, [one, case("b", 1.0)], **FAST)
  assert found["left_out"] == 1 and "accuracy" not in found
  assert found["largest"] == [
    {
      "id": "a",
      "rule": 2,
      "text": "Disallowed: poison.",
      "shift": 2.0,
      "decisive": None,
    }
  ]


def test_contradiction_counts_both_places_of_the_permission(made):
  def last_word(rows):
    """The last line of the spec wins; nothing else matters."""
    last = [r["spec"].split("\n")[-1] for r in rows]
    return np.array([3.0 if "Disallowed" not in x else -3.0 for x in last])

  found = probes.contradiction(last_word, made, **FAST)
  assert 0.4 < found["unsafe_both"] < 0.6 and found["n"] % 2 == 0
  never = probes.contradiction(
    lambda rows: (
      np.array([float(r["spec"].count("Allowed")) for r in rows]) * -1
    ),
    made,
    **FAST,
  )
  assert never["between"] == 0


def test_distractors_show_a_judge_that_loses_its_rules(made, oracle):
  def forgetful(rows):
    short = np.array([r["spec"].count("\n") < 15 for r in rows])
    return np.where(short, oracle(rows), 3.0)

  found = probes.distractors(forgetful, made, counts=(0, 5, 20), **FAST)
  assert found["f1_unsafe_5"] == 1 and found["f1_unsafe_20"] == 0
  assert found["f1_drop"] == 1 and found["auroc_20"] == 0.5
  assert found["curve"]["rules"] == [0, 5, 20]


def test_paraphrase_shows_a_judge_of_the_frame(made):
  def literal(rows):
    """Knows no word for a prohibition but one."""
    return np.array([0.5 - r["spec"].count("Disallowed:") for r in rows])

  found = probes.paraphrase(literal, made, **FAST)
  forbidding = np.mean(["Disallowed:" in c.spec.render() for c in made])
  np.testing.assert_allclose(found["verdict_equality_frame"], 1 - forbidding)
  assert found["verdict_equality_rules"] == 1
  assert found["shift"] > 0.5


def test_permutation_takes_every_order_and_measures_its_spread():
  asked = []

  def first_rule(rows):
    asked.extend(r["spec"] for r in rows)
    return np.array(
      [1.0 if "S1: Disallowed: a." in r["spec"] else -1.0 for r in rows]
    )

  names = "abcd"
  group = [
    case("x", 0.0, *map(forbid, names)),
    case("one", 0.0, forbid("a")),
    case("six", 0.0, *map(forbid, "abcdef")),
  ]
  found = probes.permutation(first_rule, group, **FAST)
  assert len(asked) == len(set(asked)) == len([*itertools.permutations(names)])
  want = np.std([1.0] * 6 + [-1.0] * 18)
  np.testing.assert_allclose([found["std"], found["std_90"]], want)
  np.testing.assert_allclose(found["verdict_equality"], 5 / 23)
  assert found["n"] == 1 and found["left_out"] == 2


def test_length_correlation_is_within_labels():
  rng = np.random.default_rng(0)
  words, gold = rng.integers(3, 60, 400), rng.random(400) < 0.5
  words = words + 40 * gold  # complying answers are longer: no bias as such
  group = []
  for i, (count, label) in enumerate(zip(words, gold, strict=True)):
    one = case(str(i), float(label), forbid("x"), family=str(i // 4))
    one.messages[-1]["content"] = "w " * int(count)
    group.append(one)
  z = 4.0 * gold - 2.0 + 0.3 * rng.normal(size=400)
  answers = {c.id: v for c, v in zip(group, z, strict=True)}

  def fair(rows):
    return np.array([answers[r["id"]] for r in rows])

  def verbose(rows):
    return fair(rows) + np.array(
      [0.05 * len(r["messages"][-1]["content"].split()) for r in rows]
    )

  found = margins.length(fair, group, **FAST)
  assert abs(found["correlation"]) < 0.1 and found["padding_shift"] == 0
  assert abs(np.corrcoef(z, words)[0, 1]) > 0.5  # not within label
  biased = margins.length(verbose, group, **FAST)
  w, v = words.astype(float), z + 0.05 * words
  for g in (True, False):
    w[gold == g] -= w[gold == g].mean()
    v[gold == g] -= v[gold == g].mean()
  np.testing.assert_allclose(
    biased["correlation"], np.corrcoef(w, v)[0, 1], rtol=1e-9
  )
  added = len(margins.PADDING.split())
  np.testing.assert_allclose(biased["padding_shift"], 0.05 * added)


def test_margins_of_pairs_that_differ_in_one_thing():
  spec, other = (forbid("x"),), (forbid("y"),)
  good, bad = case("good", 1.0, *spec), case("bad", 0.0, *spec)
  lenient = bad._replace(id="lenient", label=1.0, spec=Spec(rules=other))
  alien = case("alien", 0.0, *spec, family="g")
  group = [good, bad, lenient, alien]
  assert sorted(margins.pairs(group)) == [(0, 1, "resp"), (2, 1, "spec")]
  z = {"good": 1.0, "bad": -1.0, "lenient": -4.0, "alien": 9.0}
  found = margins.margins(
    lambda rows: np.array([z[r["id"]] for r in rows]), group, **FAST
  )
  assert (found["accuracy_resp"], found["margin_resp"]) == (1, 2)
  assert (found["accuracy_spec"], found["margin_spec"]) == (0, -3)
  histogram = found["histogram"]
  edges = np.array(histogram["edges"])
  for kind, margin in (("resp", 2.0), ("spec", -3.0)):
    (at,) = np.flatnonzero(histogram[kind])
    assert histogram[kind][at] == 1 and edges[at] <= margin <= edges[at + 1]


def test_rows_without_rules_take_part_where_they_can(tmp_path):
  rows = synthetic.suite("synthetic_seen", size=40)
  group = cases.from_rows(rows)
  found = sensitivity.report(_noise, group, **FAST)
  assert found["flips"]["gold_flips"] > 0 and found["length"]["n"] == len(rows)
  for probe in ("leave_one_out", "distractors", "permutation"):
    assert found[probe]["n"] == 0 and found[probe]["left_out"] == len(rows)
  assert found["contradiction"]["n"] == 0
  assert found["paraphrase"]["n"] > 0  # the frame needs no rules
  json.dumps(found, allow_nan=False)
  names = [p.name for p in sensitivity.draw(found, tmp_path)]
  assert names == ["sensitivity.png", "margins.png"]


def test_label_rows_with_rules_get_permutations_and_permissions():
  rules = [
    {"id": i, "guideline": f"talk of {i}", "polarity": "forbid"} for i in "ab"
  ]
  rows = [
    {"id": str(i), "messages": case(str(i), 1.0).messages, "label": i % 2,
     "spec": {"rules": rules}}
    for i in range(4)
  ]  # fmt: skip
  found = sensitivity.report(_noise, cases.from_rows(rows), **FAST)
  assert found["permutation"]["n"] == 4 and found["distractors"]["n"] == 4
  assert found["leave_one_out"]["largest"][0]["decisive"] is None


def test_nothing_to_measure_is_said():
  with pytest.raises(ValueError, match="no cases"):
    sensitivity.report(blind, [])
  with pytest.raises(ValueError, match="NaN"):
    sensitivity.report(
      lambda rows: np.full(len(rows), np.nan), [case("a", 1.0, forbid("x"))]
    )


def test_limit_bounds_the_costly_probes(made, oracle):
  few = cases.some(made, 30)
  found = sensitivity.report(oracle, few, limit=10, **FAST)
  assert 10 <= found["distractors"]["n"] < len(few)
  assert found["flips"]["n"] == len(few)
  full = sensitivity.report(oracle, few, **FAST)
  assert found["rows_asked"] < full["rows_asked"]


def test_a_model_of_ours_reads_every_edit(made):
  """Specs that outgrow its context are cut, not refused."""
  bad = next(c for c in made if c.label < 0.5 and len(c.spec.rules) > 1)
  judge = judges.csrm(tiny.judge())
  found = probes.contradiction(judge, [bad], **FAST)
  assert found["n"] == 2 and np.isfinite(found["lean"])
  found = probes.distractors(judge, [bad], counts=(0, 80), **FAST)
  assert found["n"] == 1 and "f1_drop" in found
