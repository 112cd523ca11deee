"""align/rounds.py: align, label, refit the judge, align again."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from csrm_jax.align import rounds
from csrm_jax.align.feedback import Constraint
from csrm_jax.align.rollout import Rollouts
from csrm_jax.data import contract
from csrm_jax.spec import Spec
from tests import tiny
from tests.test_align_distilling import recipe
from tests.test_align_offline import read

SPEC = Spec.parse("S1: Disallowed: prices.")
REFIT = """
from configs import tiny


def get_config():
  c = tiny.get_config()
  c.steps = 1
  c.batch_rows = 2
  c.data.heldout = 0.3
  return c
"""


def sampled(texts):
  """Three responses to each of two prompts."""
  n = len(texts)
  prompts = [[{"role": "user", "content": f"Question {i}"}] for i in (0, 1)]
  return Rollouts(
    tokens=np.zeros((n, 1), np.int32),
    prompt_length=np.ones(n, np.int32),
    length=np.ones(n, np.int32),
    mask=np.ones((n, 1), np.float32),
    texts=texts,
    messages=[
      [*prompts[i // 3], {"role": "assistant", "content": text}]
      for i, text in enumerate(texts)
    ],
    stopped=np.ones(n, bool),
    prompt=np.repeat(np.arange(2), n // 2).astype(np.int32),
    cut={},
  )


def test_rows_are_labels_and_pairs_of_the_contract(tmp_path, capsys):
  made = sampled(["a", "b", "c", "d", " ", "d"])
  z = np.array([[0.5], [2.0], [-1.0], [0.0], [9.0], [9.0]])

  found = rounds.rows_of(
    made, z, [Constraint("prices", SPEC, 0.1)], name="round-1"
  )

  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in found))
  checked = list(contract.read_rows(path))
  labels = {
    row["messages"][-1]["content"]: row["label"]
    for row in checked
    if contract.kind_of(row) == "label"
  }
  assert labels == pytest.approx(
    dict(zip("abcd", expit([0.5, 2.0, -1.0, 0.0]), strict=True))
  )
  pairs = [row for row in checked if contract.kind_of(row) == "pair"]
  assert len(pairs) == 1  # the second prompt has one response left
  assert pairs[0]["chosen"][-1]["content"] == "b"
  assert pairs[0]["rejected"][-1]["content"] == "c"
  assert all(row["spec"] == SPEC.render() for row in checked)
  assert "4 responses labelled; 1 blank, 1 twice" in capsys.readouterr().out


def reward(conversations):
  return np.array([len(c[-1]["content"]) for c in conversations]) / 10


@pytest.mark.slow
def test_two_rounds_with_a_refit_judge(tmp_path):
  judge = tiny.write_workdir(tmp_path / "judge", tiny.judge())
  (tmp_path / "refit.py").write_text(REFIT)
  config = recipe(
    judge,
    **{
      "steps": 2,
      "align.rounds": 2,
      "align.refit": str(tmp_path / "refit.py"),
      "align.relabel_prompts": 4,
    },
  )

  result = rounds.align_rounds(config, tmp_path / "run", reward=reward)

  first, second = (tmp_path / "run" / f"round-{i}" for i in (1, 2))
  assert result["round"] == 2 and result["step"] == 2
  rows = list(contract.read_rows(first / "rows.jsonl"))
  kinds = {contract.kind_of(row) for row in rows}
  assert kinds == {"label", "pair"}
  # The judge was trained on them, beginning as the judge of the round.
  fitted = json.loads((first / "judge" / "config.json").read_text())
  assert fitted["data"]["path"] == str(first / "rows.jsonl")
  assert fitted["model"]["path"] == str(judge)
  assert json.loads((first / "judge" / "result.json").read_text())["step"] == 1
  # The second round has that judge, and the first one's policy.
  used = json.loads((second / "config.json").read_text())
  assert used["align"]["judge"] == str(first / "judge")
  assert used["model"]["path"] == str(first / "policy")
  assert [x["step"] for x in read(second / "metrics.jsonl")] == [1, 2]
  assert not (second / "rows.jsonl").exists()

  # What is finished is not done again.
  before = (first / "rows.jsonl").stat().st_mtime_ns
  again = rounds.align_rounds(config, tmp_path / "run", reward=reward)
  assert again["params_sha256"] == result["params_sha256"]
  assert (first / "rows.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"align.rounds": 0}, "align.rounds=0"),
    ({"align.rounds": 2, "align.method": "best_of_n"}, "trains a policy"),
    ({"align.rounds": 2, "align.refit": "nowhere.py"}, "no such file"),
  ],
)
def test_mistakes_are_named(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    rounds.align_rounds(recipe("judge", **change), tmp_path)


def test_a_refit_judge_that_nobody_asks_is_refused(tmp_path):
  file = Path(tmp_path / "refit.py")
  file.write_text(REFIT)
  config = recipe("judge", **{"align.rounds": 2, "align.refit": str(file)})
  with pytest.raises(ValueError, match="compliance= stands in its place"):
    rounds.align_rounds(
      config, tmp_path, compliance=lambda c, asked: asked.astype(np.float32)
    )
