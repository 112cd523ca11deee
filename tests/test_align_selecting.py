"""align/selecting.py: best of N behind launch/align.py."""

import json

import numpy as np
import pytest
from scipy.special import expit

from csrm_jax.align.best_of_n import kl
from csrm_jax.align.run import align
from tests import tiny
from tests.test_align_distilling import recipe
from tests.test_align_offline import read


def options(judge, **changes):
  return recipe(
    judge,
    **{
      "align.method": "best_of_n",
      "align.monitor": str(judge),
      "align.evaluate_prompts": 3,
      "align.samples": 5,
    }
    | changes,
  )


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  return tiny.write_workdir(tmp_path_factory.mktemp("judge"), tiny.judge())


@pytest.mark.slow
def test_best_of_n_is_selected_by_the_judge_and_scored_by_both(judge, tmp_path):
  """The judge likes an "e", the monitor (a random model) has its own mind."""

  def likes_e(conversations, asked):
    z = np.array([[c[-1]["content"].count("e")] for c in conversations])
    return np.where(asked, z - 0.5, np.nan).astype(np.float32)

  report = align(options(judge), tmp_path, compliance=likes_e)

  assert json.loads((tmp_path / "best_of_n.json").read_text()) == json.loads(
    json.dumps(report)
  )
  assert (tmp_path / "best_of_n.png").stat().st_size > 5000
  assert [p["size"] for p in report["points"]] == [1, 4, 5]
  assert [p["kl"] for p in report["points"]] == [kl(1), kl(4), kl(5)]
  assert report["selected_by"] == "R H"  # the tiny judge has a second row
  rows = read(tmp_path / "responses.jsonl")
  assert len(rows) == 15
  names = ("shop_desk", "book_club")
  proxy, gold = (
    np.array([[x[key][n] for n in names] for x in rows]).reshape(3, 5, 2)
    for key in ("log_odds", "monitor_log_odds")
  )
  helps = np.array([x["reward"] for x in rows]).reshape(3, 5)
  whole, truth = expit(proxy).prod(-1), expit(gold).prod(-1)
  best = np.argmax(whole * expit(helps), axis=1)[:, None]
  ends = report["points"]
  for name, values in (("proxy", whole), ("gold", truth), ("reward", helps)):
    assert ends[0][name] == pytest.approx(values.mean(), abs=1e-5)
    of_best = np.take_along_axis(values, best, axis=1).mean()
    assert ends[-1][name] == pytest.approx(of_best, abs=1e-5)
  first = ends[0]["monitor_violation/book_club"]
  assert first == pytest.approx((gold[..., 1] < 0).mean())
  chosen = np.array([x["chosen"] for x in rows]).reshape(3, 5)
  np.testing.assert_array_equal(np.flatnonzero(chosen) % 5, best[:, 0])


def test_a_second_judge_is_needed(judge, tmp_path):
  with pytest.raises(ValueError, match=r"align\.monitor is empty"):
    align(options(judge, **{"align.monitor": ""}), tmp_path)
