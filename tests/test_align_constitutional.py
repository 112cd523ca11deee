"""align/constitutional.py, constitution.py, revising.py, revised.py."""

import json

import numpy as np
import pytest
from scipy.special import expit

from configs import constitutional_smollm2
from csrm_jax.align import (
  constitution,
  constitutional,
  imitation,
  offline,
  revised,
  revising,
  speaker,
)
from csrm_jax.align.feedback import Constraint
from csrm_jax.align.run import align
from csrm_jax.align.setup import Setup
from csrm_jax.data import contract
from csrm_jax.spec import Spec
from tests import tiny
from tests.test_align_distilling import recipe
from tests.test_align_offline import read

SPEC = "specs/align/front_office.yaml"
PRINCIPLES = ["health", "money", "promises", "law", "drink", "school", "rivals"]


def bound(spec):
  return [Constraint("desk", spec, 0.1)]


# -- Principles --------------------------------------------------------------


def test_principles_are_what_an_answer_can_break():
  found = constitution.principles(bound(Spec.read(SPEC)))
  assert [c.name for c in found] == [f"desk/{name}" for name in PRINCIPLES]
  assert constitution.rule_text(found[4]) == (
    "Disallowed: recommending alcohol or tobacco."
  )
  lines = constitution.principles(bound(Spec.parse("No prices.\n\nNo jokes.")))
  assert [c.name for c in lines] == ["desk/S1", "desk/S3"]
  assert [c.spec.render() for c in lines] == ["No prices.", "No jokes."]


def test_several_specs_and_permissions_alone_are_refused():
  one = bound(Spec.read(SPEC))
  with pytest.raises(ValueError, match="under one whole spec; name one file"):
    constitution.principles(one * 2)
  allow = {"rules": [{"id": "a", "polarity": "allow", "title": "all"}]}
  with pytest.raises(ValueError, match="forbids or requires something"):
    constitution.principles(bound(Spec.parse(allow)))


def test_draws_follow_the_judge_or_nothing():
  odds = np.array([-np.log(3.0), np.log(3.0), np.nan])  # P(violation) 3/4, 1/4

  def shares(how, odds):
    drawn = [
      constitution.draw(odds, how=how, seed=1, name=str(i)) for i in range(3000)
    ]
    assert drawn[:9] == [
      constitution.draw(odds, how=how, seed=1, name=str(i)) for i in range(9)
    ]
    return np.bincount(drawn, minlength=3) / 3000

  np.testing.assert_allclose(shares("judged", odds), [0.75, 0.25, 0], atol=0.03)
  np.testing.assert_allclose(shares("uniform", odds), [1 / 3] * 3, atol=0.03)
  unknown = np.full(3, np.nan)
  np.testing.assert_allclose(shares("judged", unknown), [1 / 3] * 3, atol=0.03)


def test_prompts_show_question_answer_rule_and_critique():
  talk = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "A price?"},
  ]
  critic = constitution.to_criticise(talk, "Ten.", "No prices.")
  reviser = constitution.to_revise(talk[2:], "Ten.", "No prices.", "Names one.")
  for messages in (critic, reviser):
    roles = [m["role"] for m in messages]
    shown = len(constitution.DEMONSTRATIONS)
    assert roles == ["user", "assistant"] * shown + ["user"]
  assert "assistant: Hi\nuser: A price?" in critic[-1]["content"]
  for part in ("A price?", "No prices.", "Names one."):
    assert part in reviser[-1]["content"]


@pytest.mark.parametrize(
  ("rule", "request_"),
  [
    ("Disallowed: prices.", "Please answer without prices."),
    (
      "Desk. Disallowed: prices; dates.",
      "Please answer without prices; dates.",
    ),
    ("Required: name a source.", "In your answer, name a source."),
    ("No prices.", "Keep this rule in your answer: No prices."),
    (
      "Disallowed: a. Required: b.",
      "Keep this rule in your answer: Disallowed: a. Required: b.",
    ),
  ],
)
def test_a_plain_reviser_reads_question_and_rule_alone(rule, request_):
  talk = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "A price?"},
  ]
  found = constitution.to_revise(talk, "Ten.", rule, "x", wording="plain")
  last = {"role": "user", "content": f"A price? {request_}"}
  assert found == [talk[0], last]
  again = constitution.to_revise(talk, "Ten.", rule, "x", wording="resampled")
  assert again == talk


# -- Decisions ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("z", "h", "expected"),
  [
    (0.6, 0.1, "accepted"),
    (0.5, 0.1, "not_above"),  # the answer of the moment has 0.5
    (0.6, -1.6, "less_helpful"),  # the draft had -0.5, it may fall by 1
    (0.6, -1.5, "accepted"),
    (None, 0.1, "unscored"),
    (0.6, None, "accepted"),  # no reward model
  ],
)
def test_a_revision_must_rise_and_stay_helpful(z, h, expected):
  now = {"z": 0.5, "h": 2.0}
  draft = {"z": -3.0, "h": -0.5}
  found = revising.outcome({"z": z, "h": h}, now, draft, 1.0)
  assert found == expected


def test_a_reward_that_is_not_finite_is_not_scored():
  new = {"z": 9.0, "h": None, "unhelpful": True}
  found = revising.outcome(new, {"z": 0.0}, {"z": 0.0, "h": 0.0}, 1.0)
  assert found == "unscored"


def test_what_is_no_revision_is_named():
  assert revising.unusable("Ask  a nurse.", "Ask a nurse.") == "identical"
  shown = constitution.DEMONSTRATIONS[0].revision
  assert revising.unusable(shown[:-10], "Ask.") == "copied"
  assert revising.unusable("Ask a doctor.", "Ask a nurse.") == ""


def test_a_prompt_is_left_after_two_revisions_no_better_than_the_draft():
  line = {"failure": "", "draft": {"z": 1.0}, "revisions": []}

  def after(*z):
    line["revisions"] = [{} if x is None else {"z": x} for x in z]
    return revising._over(line, 2)

  assert not after()
  assert not after(2.0, 1.5, 0.5)  # above the draft, if not above the last
  assert after(2.0, 0.5, 1.0)
  assert after(None, None)
  assert revising._over({**line, "failure": "empty"}, 2)


def test_responses_are_whole_sentences():
  assert speaker.whole(" Ask a nurse. Then", True) == ("Ask a nurse. Then", "")
  assert speaker.whole('Ask "him." Then 3.5', False) == ('Ask "him."', "")
  assert speaker.whole("No end", False) == ("", "cut")
  assert speaker.whole(" \n", True) == ("", "empty")


# -- What is left behind -------------------------------------------------------


def line(i, draft, final=None, *, allowed=False, sampled=(), rule="desk/a"):
  """Of revisions.jsonl; sides are (text, z, monitor, refuses)."""

  def side(text, z, monitor, refuses):
    return {"text": text, "z": z, "monitor": monitor, "refuses": refuses}

  revisions = [{"rule": rule, "outcome": "accepted" if final else "identical"}]
  return {
    "id": f"prompt-{i}",
    "allowed": allowed,
    "prompt": [{"role": "user", "content": f"Question {i}?"}],
    "draft": side(*draft),
    "final": side(*(final or draft)),
    "revisions": revisions,
    "sampled": [{"text": t, "z": z} for t, z in sampled],
    "failure": "",
    "seconds": 2.0,
  }


LINES = [
  line(0, ("Ten.", -2.0, -1.0, False), ("Ask.", 1.0, 0.5, False)),
  line(1, ("Nine.", -1.0, 1.0, False), ("I cannot help.", 2.0, 1.5, True)),
  line(2, ("Hello.", 1.0, 2.0, False), rule="desk/b"),
  line(3, ("Cats.", 3.0, 1.0, False), ("Sorry.", 4.0, 2.0, True), allowed=True),
]


def test_the_report_counts_before_and_after():
  bad = {**line(4, ("", None, None, True)), "failure": "empty"}
  bad = bad | {"revisions": []}
  found = revised.report([*LINES, bad], principles=["desk/a", "desk/b"])

  assert (found["prompts"], found["allowed"]) == (5, 1)
  assert found["failures"] == {"empty": 1}
  assert found["revisions"] == {"accepted": 3, "identical": 1}
  assert found["acceptance"]["desk/a"]["rate"] == 1.0
  assert found["acceptance"]["desk/b"]["accepted"] == 0
  main = found["main"]
  assert (main["prompts"], main["revised"]) == (3, 2)
  assert main["judge"]["draft"] == pytest.approx(1 / 3)
  assert main["judge"]["final"] == 1.0
  gain = main["judge"]["difference"]
  assert gain["mean"] == pytest.approx(2 / 3)
  assert 0 <= gain["low"] <= gain["mean"] <= gain["high"] <= 1
  assert main["monitor"]["difference"]["mean"] == pytest.approx(1 / 3)
  assert main["judge"]["mean_log_odds"]["final"] == pytest.approx(4 / 3)
  assert main["refusals"]["final"] == pytest.approx(1 / 3)
  # By the monitor drafts 1 and 2 complied; 1 became a refusal.
  assert main["refusals_of_complying_by_monitor"]["count"] == 1
  assert main["refusals_of_complying_by_monitor"]["of"] == 2
  assert main["refusals_of_complying_by_judge"]["of"] == 1
  assert "helpfulness" not in main
  assert found["allowed_prompts"]["refusals"]["difference"]["mean"] == 1.0
  assert found["seconds"] == 10.0


def test_rows_keep_the_contract_and_feed_other_methods(tmp_path):
  spec = Spec.read(SPEC).render()
  files = {
    "sft.jsonl": list(revised.imitation_rows(LINES, spec)),
    "pairs.jsonl": list(revised.revision_pairs(LINES, spec)),
  }
  for name, rows in files.items():
    text = "".join(json.dumps(x) + "\n" for x in rows)
    (tmp_path / name).write_text(text)
    assert list(contract.read_rows(tmp_path / name)) == rows
    assert len(rows) == 3
  first = files["sft.jsonl"][0]
  assert first["label"] == pytest.approx(expit(1.0))
  assert first["messages"][-1] == {"role": "assistant", "content": "Ask."}
  pair = files["pairs.jsonl"][1]
  assert pair["chosen"][0]["content"] == "I cannot help."
  assert pair["rejected"][0]["content"] == "Nine."

  words = tiny.tokenizer()
  rows = imitation.read(str(tmp_path / "sft.jsonl"), words, room=200)
  assert len(rows.length) == 3
  pairs, aside = offline.read(str(tmp_path / "pairs.jsonl"), words, room=999)
  assert len(pairs.weight) == 3 and not aside


def test_soft_labels_are_two_weighted_rows(tmp_path):
  answers = [("A.", 2.0), ("B.", 1.0), ("C.", 1.0), ("C.", 1.0), ("D.", 0.0)]
  one = line(0, ("x", 0.0, 0.0, False), sampled=[*answers, ("", None)])
  spec = "S1: Disallowed: prices."

  def made(temperature=1.0, clamp=0.0):
    return list(
      revised.soft_pairs([one], spec, temperature=temperature, clamp=clamp)
    )

  rows = made(temperature=2.0)
  assert [x["chosen"][0]["content"] for x in rows] == ["A.", "B."]
  weights = [x["weight"] for x in rows]
  np.testing.assert_allclose(weights, [expit(0.5), expit(-0.5)])
  assert [x["weight"] for x in made(clamp=0.4)] == pytest.approx([0.6, 0.4])
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(x) + "\n" for x in rows))
  assert list(contract.read_rows(path)) == rows


def test_prompts_that_there_are_not_are_told(capsys):
  config = constitutional_smollm2.get_config()
  pool = [[{"role": "user", "content": f"{i}?"}] for i in range(7)]
  nothing = dict.fromkeys(Setup._fields)
  setup = Setup(**nothing | {"config": config, "train": pool})
  found = constitutional.tasks(setup)
  assert [task.allowed for task in found] == [False] * 7 + [True] * 24
  said = capsys.readouterr().out
  assert said.endswith(": 7 prompts for training, all taken; wanted 200\n")
  assert said.count("wanted") == 1  # of the permitted ones there are enough


# -- A run ---------------------------------------------------------------------


def options(judge, **changes):
  own = {
    "align.method": "constitutional",
    "align.specs": SPEC,
    "align.prompts_per_step": 3,
    "align.temperature": 1.0,
    "align.monitor": str(judge),
    "align.judge": "",
    "align.constitutional.prompts": 5,
    "align.constitutional.prompt_length": 700,
    "align.constitutional.critique_length": 6,
    "align.constitutional.temperature": 1.0,
    "align.constitutional.draw": "judged",
    "align.constitutional.allowed": "synthetic/astrology",
    "align.constitutional.allowed_prompts": 1,
    "align.constitutional.preferences": 2,
  }
  return recipe(judge, **own | changes)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  return tiny.write_workdir(tmp_path_factory.mktemp("judge"), tiny.judge())


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_ended(judge, tmp_path, monkeypatch):
  """Texts of a random model are no sentences: all of them count as whole."""
  monkeypatch.setattr(speaker, "whole", lambda text, stopped: (text, ""))

  def longer(conversations, asked):
    z = np.array([[len(c[-1]["content"]) - 12.0] for c in conversations])
    return np.where(asked, z / 5, np.nan).astype(np.float32)

  def reward(conversations):
    return np.zeros(len(conversations), np.float32)

  functions = {"compliance": longer, "reward": reward}
  found = align(options(judge), tmp_path, **functions)

  lines = read(tmp_path / "revisions.jsonl")
  assert len(lines) == 6
  assert [x["allowed"] for x in lines] == [False] * 5 + [True]
  seen = [y["outcome"] for x in lines for y in x["revisions"]]
  assert "accepted" in seen and "not_above" in seen
  for x in lines:
    z = x["draft"]["z"]
    for y in x["revisions"]:
      if y["outcome"] == "accepted":
        assert y["z"] > z
        z = y["z"]
    assert x["final"]["z"] == z
    assert np.isfinite([x["draft"]["monitor"], x["final"]["monitor"]]).all()
    assert len(x["revisions"]) <= 4 and len(x["sampled"]) == 2
  assert found["main"]["judge"]["of"] == 5
  assert found["rows"]["sft.jsonl"] == len(read(tmp_path / "sft.jsonl"))
  assert json.loads((tmp_path / "constitutional.json").read_text()) == found

  whole = (tmp_path / "revisions.jsonl").read_text()
  again = tmp_path / "again"
  again.mkdir()
  for name in ("config.json", "revisions.jsonl"):
    (again / name).write_text((tmp_path / name).read_text())
  kept = "".join(t + "\n" for t in whole.splitlines()[:3])
  (again / "revisions.jsonl").write_text(kept)
  align(options(judge), again, **functions)

  def plain(folder):
    rows = read(folder / "revisions.jsonl")
    return [{k: v for k, v in x.items() if k != "seconds"} for x in rows]

  assert plain(again) == plain(tmp_path)
  other = options(judge, **{"align.constitutional.revisions": 1})
  with pytest.raises(ValueError, match=r"constitutional\.revisions = 4"):
    align(other, again, **functions)


@pytest.mark.parametrize(
  ("key", "value", "told"),
  [
    ("align.constitutional.draw", "first", "use one of uniform, judged"),
    ("align.constitutional.revisions", 5, "give 1 to 4"),
    ("align.constitutional.preferences", 3, "give an even number"),
    ("align.constitutional.clamp", 0.5, "below 0.5"),
    ("align.constitutional.wording", "long", "use one of demonstrated, plain"),
    ("align.constitutional.critique_length", 0, "reviser reads a critique"),
    ("align.judge", "same", "is the judge that accepts revisions"),
  ],
)
def test_keys_that_do_not_go_are_refused(tmp_path, key, value, told):
  config = options("same", **{key: value})
  with pytest.raises(ValueError, match=told):
    align(config, tmp_path / "w")
