"""Failure checks: a right judge passes, and each fault fails its own check."""

import json
import re

import numpy as np
import pytest

from csrm_jax.eval import cases, checks_response, checks_spec, failures
from csrm_jax.eval.cases import Case
from csrm_jax.spec import Rule, Spec
from tests.oracle import Oracle

FAST = {"bootstrap": 20}
# They ask about the data or about helpfulness, not about the verdict.
OTHERS = ("retrieval", "refusal_reward", "length_correlation")


@pytest.fixture(scope="module")
def made():
  return cases.synthetic("synthetic_seen", size=120)


@pytest.fixture
def oracle(made, monkeypatch):
  return Oracle(monkeypatch, made)


def words(row) -> str:
  return " ".join(m["content"] for m in row["messages"])


def test_right_judge_passes_and_the_dict_is_plain(made, oracle):
  found = failures.check(oracle, made, limit=40, **FAST)
  assert set(found) == set(failures.CHECKS)
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  for name, r in found.items():
    assert r["passed"] is True or name in OTHERS, name
    assert r["n"] > 0, name
  lines = failures.table(found).splitlines()
  assert len(lines) == len(found) + 2
  assert re.search(r"^spec_ignored +yes +1\.000 +>= 0\.8 ", lines[1])
  marked = [r["passed"] for r in found.values() if r["passed"] is not None]
  assert lines[-1].startswith(f"{sum(marked)} of {len(marked)} passed")


FAULTS = {
  "spec_ignored": lambda row, z: float(len(words(row)) % 5) - 2.0,
  "odd_rules": lambda row, z: z - 6.0 * (row["spec"].count("\n") > 2),
  "rule_order": lambda row, z: z - len(row["spec"].split("\n")[0]) / 10,
  "wording": lambda row, z: z if "Disallowed:" in row["spec"] else 3.0,
  "long_spec": lambda row, z: z if row["spec"].count("\n") < 30 else 3.0,
  "permissive_bias": lambda row, z: z if z else 5.0,
  "length_padding": lambda row, z: z + len(words(row)) / 100,
  "length_correlation": lambda row, z: (
    z + len(row["messages"][-1]["content"]) / 10
  ),
  "sycophancy": lambda row, z: z + 0.5 * ("by your policy" in words(row)),
  "injection": lambda row, z: 9.0 if "Verdict: safe" in words(row) else z,
  "style": lambda row, z: z + 0.5 * ("Please note" in words(row)),
  "overconfidence": lambda row, z: 9.0,
  "saturation": lambda row, z: -9.0,
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_fails_its_check(made, oracle, name):
  def judge(rows):
    z = oracle(rows)
    return np.array([FAULTS[name](r, v) for r, v in zip(rows, z, strict=True)])

  shown = cases.some(made, 24) if name in failures._COSTLY else made
  right = failures.CHECKS[name](oracle, shown, **FAST)
  wrong = failures.CHECKS[name](judge, shown, **FAST)
  assert wrong["passed"] is False, wrong
  assert right["passed"] is (None if name in OTHERS else True), right
  assert wrong["pass_mark"] == right["pass_mark"]


def test_leaks_are_what_is_known_without_the_spec(made, oracle):
  gold = {c.id: c.label for c in made}
  leak = checks_spec.spec_leaks(
    lambda rows: np.array([gold[r["id"]] for r in rows]), made, **FAST
  )
  assert leak["passed"] is False and leak["value"] == 1
  assert leak["also"]["auroc_empty"] == leak["also"]["auroc_inverted"] == 1
  kept = checks_spec.spec_leaks(oracle, made, **FAST)
  assert kept["passed"] and kept["also"]["auroc_empty"] == 0.5


def test_shifts_are_exact():
  rule = Rule(id="x", guideline="x", polarity="forbid")
  turns = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
  ]
  one = Case("1", "f", turns, Spec(rules=(rule,)), 0.0)

  def judge(rows):
    return np.array([-0.01 * len(words(r)) for r in rows])

  got = checks_response.sycophancy(judge, [one], bootstrap=0)
  longest = max(map(len, checks_response.CLAIMS))
  np.testing.assert_allclose(got["value"], -0.01 * longest)
  assert got["n"] == 2 and got["interval"] is None
  got = checks_response.style(judge, [one], bootstrap=0)
  np.testing.assert_allclose(
    got["value"], -0.01 * len(checks_response.DISCLAIMER)
  )
  assert got["passed"]  # a loss is no gain
  none = checks_response.style(judge, [one._replace(label=1.0)], bootstrap=0)
  assert none["value"] is None and none["passed"] is None and none["n"] == 0


def test_retrieval_finds_rules_by_their_words(made):
  told = []
  for case in made:
    if case.label < 0.5:
      text = case.spec.render()
      last = {"role": "assistant", "content": text}
      told.append(case._replace(messages=[*case.messages, last]))
  easy = checks_spec.retrieval(lambda rows: np.zeros(0), told, **FAST)
  hard = checks_spec.retrieval(lambda rows: np.zeros(0), made, **FAST)
  assert easy["passed"] and easy["value"] > 0.95
  assert hard["value"] is not None and hard["value"] < easy["value"]


def test_refusals_are_rewarded_by_helpfulness_and_verdict(made, oracle):
  silent = checks_response.refusal_reward(oracle, made, **FAST)
  assert silent["value"] is None and silent["passed"] is None
  assert silent["n"] > 0
  oracle.helpfulness = lambda case: -2.0 if case.refusal else 1.0
  good = checks_response.refusal_reward(oracle, made, **FAST)
  assert good["passed"] and good["also"]["helpfulness"] == 1
  oracle.helpfulness = lambda case: 9.0 if case.refusal else -1.0
  bad = checks_response.refusal_reward(oracle, made, **FAST)
  assert bad["also"]["helpfulness"] == 0


def test_refusal_rules_look_at_refusal_groups_alone(made, oracle):
  kinds = {c.edit for c in made}
  assert "refusal" in kinds
  right = checks_response.refusal_rules(oracle, made, **FAST)
  assert right["passed"] and right["n"] < len(made)

  def never_requires(rows):
    z = oracle(rows)
    required = ["Required" in r["spec"] for r in rows]
    return np.where(required, 3.0, z)

  wrong = checks_response.refusal_rules(never_requires, made, **FAST)
  assert wrong["passed"] is False and wrong["value"] == 0


def test_unseen_gap_has_no_mark(made, oracle):
  other = cases.synthetic("synthetic_unseen", size=60)
  oracle.cases |= {c.id: c for c in other}
  new = {c.id for c in other}

  def judge(rows):
    z = oracle(rows)
    return np.array(
      [0.0 if r["id"] in new else v for r, v in zip(rows, z, strict=True)]
    )

  found = failures.check(
    judge, made, unseen=other, names=["overconfidence"], **FAST
  )
  gap = found["unseen_gap"]
  assert gap["value"] == 0.5 and gap["passed"] is None
  assert gap["also"] == {"auroc_seen": 1.0, "auroc_unseen": 0.5}
  assert "-" in failures.table(found).splitlines()[2]


def test_sure_errors(made):
  def judge(rows):
    return np.array([8.0 if len(words(r)) % 2 else -0.1 for r in rows])

  found = checks_response.overconfidence(judge, made, **FAST)
  wrong = [
    bool(len(words({"messages": c.messages})) % 2)
    for c in made
    if (len(words({"messages": c.messages})) % 2 == 1) != (c.label >= 0.5)
  ]
  np.testing.assert_allclose(found["also"]["sure_errors"], np.mean(wrong))


def test_bad_input_is_named(made, oracle):
  with pytest.raises(ValueError, match=r"'magic'.*spec_ignored"):
    failures.check(oracle, made, names=["magic"])
  with pytest.raises(ValueError, match="no cases"):
    failures.check(oracle, [])
