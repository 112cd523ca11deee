"""eval/oversight.py: help for the judge, and what it is worth."""

import math

import numpy as np
import pytest
from scipy.special import expit, log_expit, logit

from csrm_jax.eval import oversight

TWO = "S1: Disallowed: prices.\nS2: Allowed: jokes.\nS3: Required: sources."


def row(i, label, text="Twelve euros.", spec=TWO):
  return {
    "id": str(i),
    "messages": [
      {"role": "user", "content": "What is it?"},
      {"role": "assistant", "content": text},
    ],
    "spec": spec,
    "label": label,
  }


def test_rules_stand_alone_numbered_anew_and_permissions_are_none():
  assert oversight.rules_of(row(0, 1)) == [
    ("S1: Disallowed: prices.", "S1: Disallowed: prices."),
    ("S3: Required: sources.", "S1: Required: sources."),
  ]
  mixed = row(0, 1, spec="S1: Wine. Disallowed: selling. Allowed: cooking.")
  assert len(oversight.rules_of(mixed)) == 1


@pytest.mark.parametrize("odds", [[0.3], [2.0, -1.0, 0.5], [40.0, 50.0]])
def test_all_rules_is_the_product_of_probabilities(odds):
  found = oversight.all_rules(odds)
  if max(odds) < 30:
    assert found == pytest.approx(logit(np.prod(expit(odds))), rel=1e-9)
  else:  # the product rounds to 1 before its log-odds do
    assert math.isfinite(found) and found > 30
  broken = -800.0 + np.sum(log_expit(odds))  # expit(-800) is 0
  assert oversight.all_rules([*odds, -800.0]) == pytest.approx(broken)


def test_sides_read_earlier_rounds_but_not_each_others_word():
  heard = []

  def speak(prompts):
    heard.append([p[-1]["content"] for p in prompts])
    n = len(prompts) // 2
    say = f"round {len(heard)}"
    return (
      [f"{say} pro {i}" for i in range(n)]
      + [" "]
      + [f"{say} contra {i}" for i in range(1, n)]
    )

  rows = [row(0, 1), row(1, 0)]
  said = oversight.argue(rows, speak, rounds=2)

  assert said[0] == [("for", "round 1 pro 0"), ("for", "round 2 pro 0")]
  assert said[1] == [
    ("for", "round 1 pro 1"),
    ("against", "round 1 contra 1"),
    ("for", "round 2 pro 1"),
    ("against", "round 2 contra 1"),
  ]
  assert all("Said so far" not in text for text in heard[0])
  assert all("for: round 1 pro" in text for text in heard[1])
  assert "keeps the policy" in heard[0][0]
  assert "breaks the policy" in heard[0][2]
  assert all("S3: Required: sources." in text for text in heard[0])


def test_the_judged_response_stays_last_behind_the_note():
  read = oversight.with_debate(row(0, 1), [("for", "a"), ("against", "b")])
  assert [m["role"] for m in read["messages"]] == ["user", "tool", "assistant"]
  assert read["messages"][1]["content"].endswith("for: a\nagainst: b")
  assert read["messages"][-1]["content"] == "Twelve euros."
  assert oversight.with_debate(row(0, 1), []) == row(0, 1)


def note_of(one):
  return "".join(m["content"] for m in one["messages"] if m["role"] == "tool")


def gullible(rows):
  """Without help a coin, constant per text; with an honest "TRUE" it knows."""
  assert all("label" not in r for r in rows)
  made = []
  for r in rows:
    note = note_of(r)
    coin = (int(r["id"]) * 7919 % 13 - 6) / 6
    made.append(3.0 if "TRUE" in note else -3.0 if "FALSE" in note else coin)
  return np.array(made)


def test_a_debate_that_tells_the_truth_helps_and_anothers_does_not():
  rows = [row(i, i % 2) for i in range(60)]
  honest = [["FALSE", "TRUE"][i % 2] for i in range(60)]

  found = oversight.evaluate(
    gullible, rows, lambda prompts: [*honest, *[""] * 60], bootstrap=300
  )

  judges = found["judges"]
  assert judges["debate"]["auroc"] == 1.0
  assert judges["debate"]["accuracy"] == 1.0
  gain = judges["debate"]["gain_auroc"]
  assert gain == pytest.approx(1.0 - judges["plain"]["auroc"])
  low, high = judges["debate"]["intervals"]["gain_auroc"]
  assert 0 < low < gain < high < 1
  assert "debate: gain_auroc" in found["helps"]
  assert judges["debate_of_another"]["accuracy"] < 0.75
  assert found["silent_sides"] == 60
  assert found["rows_of_several_rules"] == 60
  plain, own = (
    np.array([a["log_odds"][k] for a in found["answers"]])
    for k in ("plain", "debate")
  )
  mean = [a["log_odds"]["debate_mean"] for a in found["answers"]]
  np.testing.assert_allclose(mean, (plain + own) / 2)


def test_a_debate_that_lies_hurts_and_is_reported():
  rows = [row(i, i % 2) for i in range(40)]
  lies = [["TRUE", "FALSE"][i % 2] for i in range(40)]
  found = oversight.evaluate(
    gullible, rows, lambda prompts: [*lies, *lies], bootstrap=200
  )
  assert "debate: gain_auroc" in found["hurts"]
  assert not any(x.startswith("debate:") for x in found["helps"])


def test_help_that_changes_nothing_gains_nothing():
  rows = [row(i, i % 2) for i in range(30)]
  found = oversight.evaluate(gullible, rows, bootstrap=100)
  assert set(found["judges"]) == {"plain", "rules_product", "rules_read"}
  for figure in ("gain_auroc", "gain_accuracy", "gain_nll"):
    assert found["judges"]["rules_read"][figure] == 0.0
    assert found["judges"]["rules_read"]["intervals"][figure] == [0.0, 0.0]
  assert found["helps"] == []


def test_rows_without_gold_are_counted_and_none_is_refused():
  bare = {k: v for k, v in row(9, 1).items() if k != "label"}
  found = oversight.evaluate(
    gullible, [row(0, 1), row(1, 0), bare], bootstrap=9
  )
  assert (found["rows"], found["left_out"]) == (2, 1)
  with pytest.raises(ValueError, match="no row with a spec and a label"):
    oversight.evaluate(gullible, [bare])
