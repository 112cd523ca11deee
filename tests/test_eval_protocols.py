"""Protocols: turns, rules that are shown, cuts and bare prompts."""

import numpy as np
import pytest

from csrm_jax import score
from csrm_jax.eval import judges, protocols
from csrm_jax.spec import Spec
from tests import tiny

RULES = [f"Disallowed: matter number {i}." for i in range(30)]
RULES[4] = "Disallowed: baking bread with butter."
RULES[21] = "Allowed: bread."
SPEC = "\n".join(f"S{i}: {rule}" for i, rule in enumerate(RULES, 1))


def talk(*texts: str) -> list[dict[str, str]]:
  return [
    {"role": "assistant" if i % 2 else "user", "content": text}
    for i, text in enumerate(texts)
  ]


def row(*texts: str, spec: str = SPEC) -> dict:
  return {"id": "r", "messages": talk(*texts), "spec": spec}


def test_any_turn_is_the_lowest_and_equals_our_own():
  made = tiny.judge()
  rows = [row("a", "b", "c", "d", spec="S1: x"), row("a", "e", spec="S1: y")]
  got = protocols.any_turn(judges.csrm(made))(rows)
  want = [s.log_odds for s in score.score_rows(made, rows, turns="any")]
  np.testing.assert_allclose(got, want, atol=1e-5)
  single = protocols.any_turn(judges.csrm(made))(rows[1:])
  alone = judges.csrm(made)(rows[1:])
  np.testing.assert_allclose(single, alone, atol=1e-5)
  with pytest.raises(ValueError, match=r"'r'.*no assistant turn"):
    protocols.any_turn(judges.csrm(made))([row("a")])


def test_any_turn_keeps_what_precedes_a_turn():
  asked = []

  def judge(rows):
    asked.extend(rows)
    return np.array([5.0, -1.0, 2.0])

  got = protocols.any_turn(judge)([row("a", "b", "c", "d"), row("e", "f")])
  assert got.tolist() == [-1.0, 2.0]
  assert [[m["content"] for m in r["messages"]] for r in asked] == [
    ["a", "b"],
    ["a", "b", "c", "d"],
    ["e", "f"],
  ]


def test_top_rules_keeps_the_relevant_in_order():
  one = row("How?", "Baking bread with butter is easy.")
  kept = protocols.keep_rules(one, 2)
  assert kept["spec"].split("\n") == [f"S1: {RULES[4]}", f"S2: {RULES[21]}"]
  assert protocols.keep_rules(one, 30) == one
  assert one["spec"] == SPEC  # as it was
  shown = []

  def judge(rows):
    shown.extend(rows)
    return np.zeros(len(rows))

  protocols.top_rules(judge, count=3)([one, {"id": "h", "messages": []}])
  assert shown[0]["spec"].count("\n") == 2 and "spec" not in shown[1]
  with pytest.raises(ValueError, match="1 rule or more"):
    protocols.top_rules(judge, count=0)


def test_gold_ranks_are_of_the_best_placed_rule():
  spec = Spec.parse(SPEC)
  messages = talk("How?", "Baking bread with butter is easy.")
  ranks = protocols.gold_ranks(
    [(spec, messages, [4]), (spec, messages, [21]), (spec, messages, [9, 4])]
  )
  assert ranks.tolist() == [1.0, 2.0, 1.0]
  with pytest.raises(ValueError, match="no gold rule"):
    protocols.gold_ranks([(spec, messages, [])])


def words(one) -> int:
  return len(one["spec"].split()) + sum(
    len(m["content"].split()) for m in one["messages"]
  )


def test_shorten_drops_history_then_rules_never_the_response():
  one = row("old " * 40, "yes", "How?", "Baking bread with butter is easy.")
  same, cut = protocols.shorten(one, words, 10_000)
  assert same == one and not any(cut.values())
  less, cut = protocols.shorten(one, words, words(one) - 1)
  assert cut == {"messages": 1, "rules": 0} and less["spec"] == SPEC
  least, cut = protocols.shorten(one, words, 14)
  assert cut == {"messages": 3, "rules": 29}
  assert least["spec"] == f"S1: {RULES[4]}"
  assert least["messages"] == one["messages"][-1:]
  with pytest.raises(ValueError, match="neither is ever cut"):
    protocols.shorten(one, words, 5)


def test_pseudo_response():
  rows = [
    {"id": "1", "prompt": "How do I kill a process?", "label": 1.0},
    {"id": "2", "prompt": talk("a", "b", "c")},
  ]
  one, two = protocols.pseudo_response(rows)
  assert one["messages"] == talk(
    "How do I kill a process?", "Sure. How do I kill a process?"
  )
  assert one["label"] == 1.0 and "prompt" not in one
  assert two["messages"] == talk("a", "b", "c", "Sure. c")
  assert "Disallowed" in one["spec"] and one["spec"] == two["spec"]
  assert protocols.pseudo_response(rows, spec="x")[0]["spec"] == "x"
  for bad in (None, "", talk("a", "b")):
    with pytest.raises(ValueError, match=r"'3'.*'prompt'"):
      protocols.pseudo_response([{"id": "3", "prompt": bad}])


def test_over_refusal_shares():
  z = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
  label = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
  got = protocols.over_refusal(z, label)
  assert got["not_overrefuse"] == 0.75 and got["not_unsafe"] == 0.5
  np.testing.assert_allclose(got["harmonic_mean"], 0.6)
  np.testing.assert_allclose(got["f1_unsafe"], 0.5)
  assert np.isnan(protocols.over_refusal(z, np.ones(6))["not_unsafe"])


def test_gold_recall_counts_rows_whose_rule_is_placed():
  near = row("How?", "Baking bread with butter is easy.") | {"gold": [4]}
  far = row("How?", "Baking bread with butter is easy.") | {"gold": [25]}
  found = protocols.gold_recall([near, far, row("a", "b")])
  assert (found["rows"], found["rules"]) == (2, 30)
  assert found["at_5"] == found["at_10"] == 0.5
  assert protocols.gold_recall([row("a", "b")]) == {}


def test_protocols_join_and_unknown_ones_are_refused():
  asked = []

  def judge(rows):
    asked.extend(rows)
    return np.array([len(r["messages"]) - 3.0 for r in rows])

  long = row("How?", "No.", "And?", "Baking bread with butter is easy.")
  both = protocols.under(judge, ["top_rules", "any_turn"])
  assert both([long]).tolist() == [-1.0]
  assert [len(r["spec"].split("\n")) for r in asked] == [20, 20]
  assert protocols.under(judge, []) is judge
  with pytest.raises(ValueError, match=r"--protocol: 'all'.*any_turn"):
    protocols.under(judge, ["all"])
  # Helpfulness is asked of the last turn alone.
  free = {k: v for k, v in long.items() if k != "spec"}
  assert protocols.any_turn(judge)([free]).tolist() == [1.0]
