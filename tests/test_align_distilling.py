"""align/distilling.py: CSRM's reward distillation as an alignment run."""

import numpy as np
import pytest
from scipy.special import log_expit

from configs import tiny as recipes
from csrm_jax.align import distilling
from csrm_jax.align.rollout import Rollouts
from csrm_jax.align.run import align
from tests import tiny
from tests.test_align_offline import read


def recipe(judge, **changes):
  config = recipes.get_config()
  config.update_from_flattened_dict(
    {
      "steps": 4,
      "checkpoint_every": 2,
      "model.lora_rank": 4,
      "optimizer.lr": 1e-2,
      "align.method": "distill",
      "align.specs": "specs/align/shop_desk.yaml,specs/align/book_club.yaml",
      "align.judge": str(judge),
      "align.prompts": "synthetic/alcohol",
      "align.prompts_per_step": 2,
      "align.samples": 6,
      "align.top": 2,
      "align.bottom": 2,
      "align.contrasts": 2,
      "align.prompt_length": 48,
      "align.response_length": 6,
      "align.evaluate_every": 0,
    }
    | changes
  )
  return config


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  return tiny.write_workdir(tmp_path_factory.mktemp("judge"), tiny.judge())


@pytest.mark.slow
def test_a_run_learns_from_best_and_worst(judge, tmp_path):
  def reward(conversations):
    """Two of six responses to every second prompt have no score."""
    found = np.array([len(c[-1]["content"]) for c in conversations]) / 10
    found[:3] = np.nan
    return found

  align(recipe(judge), tmp_path, reward=reward)

  lines = read(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  for line in lines:
    assert line["unscored"] == 3 and line["prompts_left_out"] == 1
    assert line["gap"] > 0 and line["log_reward"] < 0
    assert 0 <= line["violation/book_club"] <= 1
    assert np.isfinite(line["reward"])
  # Before any update the log-ratio is 0: what is left are the squared gaps.
  assert lines[0]["loss"] >= lines[0]["gap"] ** 2 * (1 - 1e-5)
  assert lines[0]["margin"] == 0 and lines[0]["skipped"] == 0
  assert (tmp_path / "policy" / "model.safetensors").is_file()


def rollouts(prompts, samples):
  n = prompts * samples
  return Rollouts(
    tokens=np.arange(n * 3, dtype=np.int32).reshape(n, 3),
    prompt_length=np.ones(n, np.int32),
    length=np.full(n, 3, np.int32),
    mask=np.tile(np.array([0, 1, 1], np.float32), (n, 1)),
    texts=[""] * n,
    messages=[[]] * n,
    stopped=np.ones(n, bool),
    prompt=np.repeat(np.arange(prompts), samples).astype(np.int32),
    cut={},
  )


def test_pairs_are_best_and_worst_of_their_own_prompt():
  rng = np.random.default_rng(0)
  config = recipe("", **{"align.top": 1, "align.bottom": 1})
  config.align.contrasts = 1
  z = rng.normal(size=(18, 2)).astype(np.float32)
  h = rng.normal(size=18).astype(np.float32)
  h[6:11] = np.nan  # of the second prompt one response is left
  sampled = rollouts(3, 6)

  pairs, found = distilling.contrast(
    config, sampled, {"log_odds": z, "rewards": h}, step=0
  )

  scores = log_expit(z.astype(np.float64)).sum(1) + log_expit(
    h.astype(np.float64)
  )
  assert np.asarray(pairs.weight).tolist() == [1, 0, 1]
  assert (found["unscored"], found["prompts_left_out"]) == (5, 1)
  gaps = []
  for prompt in (0, 2):
    own = scores[prompt * 6 : prompt * 6 + 6]
    best, worst = (
      prompt * 6 + int(np.argmax(own)),
      prompt * 6 + int(np.argmin(own)),
    )
    np.testing.assert_array_equal(
      pairs.tokens[prompt], sampled.tokens[[best, worst]]
    )
    np.testing.assert_allclose(
      pairs.log_rewards[prompt], scores[[best, worst]], rtol=1e-5
    )
    gaps.append(scores[best] - scores[worst])
  assert found["gap"] == pytest.approx(np.mean(gaps), rel=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"align.judged": 1}, "align.judged=1: method 'distill' multiplies"),
    ({"align.top": 5}, "samples=6: too few for top = 5"),
    ({"align.contrasts": 5}, "give 1 to top x bottom = 4"),
  ],
)
def test_mistakes_are_named(judge, tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    align(recipe(judge, **change), tmp_path)
