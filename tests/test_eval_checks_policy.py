"""Checks of a policy: exact values, marks, worst examples."""

import numpy as np
import pytest

from csrm_jax.eval import checks_policy, checks_response, margins
from csrm_jax.eval.checks_policy import Sample
from csrm_jax.spec import Rule, Spec

SPEC = Spec(rules=(Rule(id="x", guideline="x", polarity="forbid"),))
HOW = {"bootstrap": 30, "seed": 0}


def sample(i: int, response: str, allowed: bool | None = None) -> Sample:
  prompt = [{"role": "user", "content": f"question {i}"}]
  return Sample(str(i), f"f{i}", prompt, SPEC, "", response, allowed)


def response(row) -> str:
  return row["messages"][-1]["content"]


def text(row) -> str:
  return " ".join(m["content"] for m in row["messages"])


def gold(rows):
  """Violates what says "bad"."""
  return np.array([-2.0 if "bad" in response(r) else 2.0 for r in rows])


def made(*responses: str):
  samples = [sample(i, r) for i, r in enumerate(responses)]
  return checks_policy.cases_of(samples, responses, gold)


def test_cases_hold_gold_verdicts_and_refusals():
  cases = made("a bad answer", "I'm sorry, but I can't help.", "")
  np.testing.assert_allclose(
    [c.label for c in cases], 1 / (1 + np.exp([2.0, -2.0, -2.0]))
  )
  assert [c.refusal for c in cases] == [0, 1, 1]
  assert cases[0].messages == [
    {"role": "user", "content": "question 0"},
    {"role": "assistant", "content": "a bad answer"},
  ]


def test_over_refusal_counts_where_an_answer_is_allowed():
  no = "I'm sorry, but I can't help."
  cases = made(no, no, "yes", "yes", no, no)
  allowed = [True, True, True, True, False, None]

  def judge(rows):
    return np.array([float(r["id"]) for r in rows])

  found = checks_policy.over_refusal(judge, cases, allowed, **HOW)
  assert found["value"] == 0.5 and found["passed"] is False
  assert found["n"] == 4 and found["also"]["refused_disallowed"] == 1.0
  low, high = found["interval"]
  assert 0 <= low < 0.5 < high <= 1
  assert [w["id"] for w in found["worst"]] == ["1", "0"]  # liked best first
  assert found["worst"][0] == {
    "id": "1",
    "log_odds": 1.0,
    "prompt": "question 1",
    "response": no,
  }
  none = checks_policy.over_refusal(judge, cases, [None] * 6, **HOW)
  assert none["value"] is None and none["passed"] is None and none["n"] == 0
  assert none["worst"] == []


@pytest.mark.parametrize("kind", checks_policy.CLAIMS)
@pytest.mark.parametrize("size", [0.1, 0.5, -0.5])
def test_sycophancy_is_the_text_that_moves_z_most(kind, size):
  cases = made("one", "two", "three")

  def judge(rows):
    claim = checks_policy.CLAIMS[kind]
    return np.array([1.0 + size * (claim in text(r)) for r in rows])

  found = checks_policy.sycophancy(judge, cases, **HOW)
  np.testing.assert_allclose(found["value"], size)
  assert found["passed"] is (abs(size) <= 0.2)
  for name in checks_policy.CLAIMS:
    np.testing.assert_allclose(
      found["also"][name], size if name == kind else 0.0, atol=1e-12
    )
  assert {w["text"] for w in found["worst"][:3]} == {kind}
  assert found["n"] == 9  # three texts, three cases


def test_disclaimer_gains_on_what_violates_alone():
  cases = made("bad 1", "fine", "bad 2")

  def judge(rows):
    said = [checks_response.DISCLAIMER in text(r) for r in rows]
    own = [0.9 if "bad 2" in text(r) else 0.3 for r in rows]
    return np.array(said) * np.array(own)

  found = checks_policy.disclaimer(judge, cases, **HOW)
  np.testing.assert_allclose(found["value"], 0.6)
  assert found["passed"] is False and found["n"] == 2
  assert [w["response"] for w in found["worst"]] == ["bad 2", "bad 1"]
  np.testing.assert_allclose(found["worst"][0]["shift"], 0.9)
  clean = checks_policy.disclaimer(judge, made("fine"), **HOW)
  assert clean["value"] is None and clean["n"] == 0 and clean["worst"] == []


def test_length_is_seen_in_correlation_and_in_padding():
  rng = np.random.default_rng(0)
  words = rng.integers(1, 30, 40)
  kinds = np.where(rng.uniform(size=40) < 0.5, "bad", "fine")
  cases = made(*(f"{k} " * w for k, w in zip(kinds, words, strict=True)))

  def judge(rows):
    return gold(rows) + 0.05 * np.array(
      [len(response(r).split()) for r in rows]
    )

  found = checks_policy.length(judge, cases, **HOW)
  np.testing.assert_allclose(found["value"], 1.0, rtol=1e-6)  # within label
  assert found["passed"] is False
  np.testing.assert_allclose(found["also"]["words"], words.mean())
  z = judge([{"id": c.id, "messages": c.messages} for c in cases])
  product = np.zeros(40)
  for k in ("bad", "fine"):
    own = kinds == k
    product[own] = (z[own] - z[own].mean()) * (words[own] - words[own].mean())
  worst = np.argsort(-product, kind="stable")[: checks_policy.EXAMPLES]
  assert [w["id"] for w in found["worst"]] == [str(i) for i in worst]
  padded = checks_policy.padding(judge, cases, **HOW)
  added = len(margins.PADDING.split())
  np.testing.assert_allclose(padded["value"], 0.05 * added)
  assert padded["passed"] is False
  np.testing.assert_allclose(padded["worst"][0]["shift"], 0.05 * added)
  fair = checks_policy.padding(gold, cases, **HOW)
  assert fair["value"] == 0 and fair["passed"]


def test_gap_names_what_the_judge_overrates():
  cases = made("bad trick", "bad", "fine")

  def judge(rows):
    return np.where(["trick" in text(r) for r in rows], 3.0, gold(rows))

  found = checks_policy.gap(judge, cases, **HOW)
  p, q = 1 / (1 + np.exp([-3.0, 2.0]))
  np.testing.assert_allclose(found["value"], (p - q) / 3)
  np.testing.assert_allclose(
    [found["also"]["violations"], found["also"]["violations_gold"]],
    [1 / 3, 2 / 3],
  )
  assert found["passed"] is None and found["worst"][0]["id"] == "0"


def test_examples_are_few_and_short():
  cases = made(*("bad " * 200 for _ in range(9)))

  def judge(rows):
    return np.zeros(len(rows))

  found = checks_policy.gap(judge, cases, **HOW)
  assert len(found["worst"]) == checks_policy.EXAMPLES
  assert len(found["worst"][0]["response"]) == 300


@pytest.mark.parametrize(
  "responses, number, commonest",
  [
    (("we pay it all back", "we pay it all today"), 1.0, 1.0),
    (("yes", "no", "perhaps", "never"), 4.0, 0.25),
    # Two of four alike: entropy of (1/2, 1/4, 1/4).
    (("Yes, it is so", "YES, it is so", "no", ""), 2**1.5, 0.5),
  ],
)
def test_variety_is_the_number_of_openings(responses, number, commonest):
  found = checks_policy.variety(made(*responses), **HOW)
  assert found["value"] == pytest.approx(number)
  assert found["also"]["commonest"] == pytest.approx(commonest)
  assert found["passed"] is None and found["pass_mark"] == ""
  low, high = found["interval"]
  assert 1.0 - 1e-9 <= low <= high <= number + 1e-9
  assert found["worst"][0]["alike"] == commonest * len(responses)


def test_variety_of_nothing_is_not_measured():
  assert checks_policy.variety([], **HOW)["value"] is None
