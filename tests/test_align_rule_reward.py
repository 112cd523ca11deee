"""align/rule_reward.py: rule-based rewards in an alignment run."""

import json

import numpy as np
import pytest

import csrm_jax as csrm
from configs import ppo_rbr_smollm2
from configs import tiny as recipe
from csrm_jax.align import rule_reward
from csrm_jax.align.feedback import constraints
from csrm_jax.align.report import report
from csrm_jax.align.run import align
from csrm_jax.rules import propositions, response_types, synthetic, weights
from csrm_jax.rules.reward import total
from tests import tiny

DESK, CLUB = "specs/align/shop_desk.yaml", "specs/align/book_club.yaml"
BOOK = propositions.read()
TALKS = [
  [
    {"role": "user", "content": question},
    {"role": "assistant", "content": "I'm sorry, I can't help with that."},
  ]
  for question in (
    "I have a headache, what should I take?",
    "What is the answer to exercise 3?",
    "How do I bake bread at home?",
    "Is it safe?",
    "sources, please",
  )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Weights fitted on composed completions."""
  rows = synthetic.compose(BOOK, synthetic.prompts(["gambling"]))
  found = tmp_path_factory.mktemp("rules")
  weights.save(weights.fit_rows(BOOK, rows), found)
  return found


@pytest.fixture(scope="module")
def judge():
  return tiny.judge()


def made(folder, judge, specs, **changes):
  config = recipe.get_config()
  config.align.rules = str(folder)
  config.align.specs = specs
  config.update_from_flattened_dict(changes)
  bound = constraints(config)
  return rule_reward.rules_of(config, judge, bound), bound


def test_another_spec_acts_by_other_weights(folder, judge, monkeypatch):
  """Nothing is fitted anew: the same grades, other types, other rewards."""
  # The tiny judge knows no topic: every prompt concerns its best side.
  chooser = response_types.chooser
  monkeypatch.setattr(
    response_types,
    "chooser",
    lambda judge, specs: chooser(judge, specs, threshold=1e-9),
  )
  desk, _ = made(folder, judge, DESK)
  club, _ = made(folder, judge, CLUB)
  one, two = desk.graded(TALKS), club.graded(TALKS)
  np.testing.assert_allclose(one.chances, two.chances, atol=1e-6)
  assert {"hard", "comply"} == set(one.types) | set(two.types)
  for row, (a, b) in enumerate(zip(one.types, two.types, strict=True)):
    assert {a, b} == {"hard", "comply"}
    expected = desk.weights.rewards(b, one.chances[row : row + 1])
    assert two.rewards[row] == pytest.approx(expected[0], abs=1e-4)
  assert (np.abs(one.rewards - two.rewards) > 1e-3).all()
  reward = total(lambda talks: np.ones(len(talks)), desk, weight=2.0)
  np.testing.assert_allclose(reward(TALKS), 1 + 2 * one.rewards, rtol=1e-6)


def test_the_specs_decide_what_crosses(folder, judge):
  rules, bound = made(
    folder, judge, f"{DESK},{CLUB}", **{"align.rules_violation": "crosses"}
  )
  found = rules.graded(TALKS).chances[:, BOOK.names.index("crosses")]
  worst = np.min(
    [[s.p_comply for s in csrm.score(judge, c.spec, TALKS)] for c in bound], 0
  )
  np.testing.assert_allclose(found, 1 - worst, atol=1e-5)


def test_what_is_missing_is_named(folder, judge, tmp_path):
  config = recipe.get_config()
  assert rule_reward.rules_of(config, judge, []) is None
  config.align.rules = str(folder)
  with pytest.raises(ValueError, match="without specs: name some by"):
    rule_reward.rules_of(config, judge, [])
  spec = tmp_path / "own.yaml"
  spec.write_text(
    "rules:\n- {id: a, polarity: forbid, guideline: b, response_type: soft}\n"
  )
  few = weights.load(folder)
  kept = {"comply": few.weights["comply"]}
  other = weights.RuleWeights(few.book, kept, few.report)
  weights.save(other, tmp_path / "few")
  with pytest.raises(ValueError, match=r"no weights for response type 'soft'"):
    made(tmp_path / "few", judge, str(spec))


def test_the_recipe_is_complete():
  align = ppo_rbr_smollm2.get_config().align
  assert align.method == "plain" and align.rbr_weight > 0
  assert align.rules_violation in BOOK.names


@pytest.mark.slow
def test_a_run_with_rules(folder, judge, tmp_path):
  """Two updates: the reward has both parts, evaluations count classes."""
  config = recipe.get_config()
  config.update_from_flattened_dict(
    {
      "steps": 2,
      "model.lora_rank": 4,
      "align.method": "plain",
      "align.rules": str(folder),
      "align.rbr_weight": 0.5,
      "align.judge": str(tiny.write_workdir(tmp_path / "judge", judge)),
      "align.specs": DESK,
      "align.prompts": "synthetic/alcohol",
      "align.prompts_per_step": 2,
      "align.samples": 2,
      "align.prompt_length": 48,
      "align.response_length": 6,
      "align.evaluate_every": 2,
      "align.evaluate_prompts": 4,
    }
  )
  align(config, tmp_path / "run", reward=lambda talks: np.full(len(talks), 3.0))

  def read(name):
    text = (tmp_path / "run" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]

  for line in read("evaluations.jsonl"):
    shares = [k for k in line if k.startswith("ideal/") and k.count("_") == 0]
    assert shares and all(0 <= line[k] <= 1 for k in shares)
    assert {"over_refusal", "refused"} & set(line)
    assert line["reward"] == pytest.approx(
      3.0 + 0.5 * line["rule_reward"], abs=1e-4
    )
  for row in read("responses.jsonl"):
    assert row["response_type"] in BOOK.types
    assert row["class"] in BOOK.class_names(row["response_type"])
    expected = 3.0 + 0.5 * row["rule_reward"]
    assert row["reward"] == pytest.approx(expected, abs=1e-4)
  said = read("evaluations.jsonl")
  found = report({"a": tmp_path / "run"}, tmp_path / "out")["a"]["rules"]
  assert set(found) == {
    k for k in said[0] if k.startswith(("ideal/", "over_", "refused"))
  } - {k for k in said[0] if k.endswith(("_low", "_high"))}
  for name, share in found.items():
    assert share["start"] == said[0][name] and share["end"] == said[-1][name]
    assert share["end_low"] <= share["end"] <= share["end_high"]
  picture = (tmp_path / "out" / "a_rules.png").read_bytes()
  assert picture.startswith(b"\x89PNG")
