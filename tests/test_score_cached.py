"""Scores behind held prefixes equal those of whole sequences."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from csrm_jax import score as score_lib
from csrm_jax import score_cached
from csrm_jax.judge import SHIPPED, load
from csrm_jax.score_cached import SpecCache
from csrm_jax.spec import Rule, Spec
from tests import tiny

WORDS = ("bread", "safe", "policy", "message", "swearing", "spoilers", "judge")


def text(rng, low, high):
  return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def specs_of(rng, count, longest=40):
  return [f"S1: Disallowed: {text(rng, 1, longest)}." for _ in range(count)]


def chats_of(rng, count, longest=20):
  return [
    [
      {"role": role, "content": text(rng, 1, longest)}
      for role in ("user", "assistant") * rng.randint(1, 3)
    ]
    for _ in range(count)
  ]


def plain(judge, specs, chats):
  rows = [
    {"id": f"{i} {j}", "messages": chat, "spec": spec}
    for i, chat in enumerate(chats)
    for j, spec in enumerate(specs)
  ]
  found = score_lib.score_rows(judge, rows, helpfulness=True)
  shape = (len(chats), len(specs))
  return (
    np.reshape([s.log_odds for s in found], shape),
    np.reshape([s.truncated for s in found], shape),
    np.reshape([s.helpfulness for s in found], shape)[:, 0],
  )


@pytest.mark.parametrize(
  "style, choices",
  [
    ("chatml", {}),
    pytest.param("llama3", {"head": "verbaliser"}, marks=pytest.mark.slow),
    pytest.param(
      "mistral", {"lora_rank": 2, "train_layers": 1}, marks=pytest.mark.slow
    ),
  ],
)
def test_equals_plain_scores(style, choices):
  judge = tiny.judge(style, temperature=1.7, **choices)
  if choices.get("lora_rank"):
    # Small, as trained ones are: at 1 rounding itself would reach 1e-5.
    noisy = tiny.with_noise(judge.params, ("lora_b",))
    params = jax.tree.map(lambda a, b: a + 0.1 * (b - a), judge.params, noisy)
    judge = dataclasses.replace(judge, params=params)
  rng = random.Random(0)
  specs, chats = specs_of(rng, 5), chats_of(rng, 12)
  expected, _, helpful = plain(judge, specs, chats)

  cache = SpecCache(judge, specs)
  found = cache.scores(chats)

  np.testing.assert_allclose(found.log_odds, expected, atol=1e-5)
  np.testing.assert_allclose(cache.helpfulness(chats), helpful, atol=1e-5)
  assert not found.truncated.any() and not any(cache.cut.values())
  assert expected.std(axis=0).min() > 0.01  # conversations matter
  assert expected.std(axis=1).min() > 0.01  # and so do specs
  assert len(cache._stores) > 1  # prefixes of several lengths


def test_only_what_is_asked_is_scored(monkeypatch):
  judge, rng = tiny.judge(), random.Random(1)
  specs, chats = specs_of(rng, 6), chats_of(rng, 9)
  cache = SpecCache(judge, specs)
  everything = cache.scores(chats).log_odds
  observed = np.random.default_rng(0).random((9, 6)) < 0.3
  observed[4] = False
  seen = []
  fit_to = score_cached.template.fit_to
  monkeypatch.setattr(
    score_cached.template,
    "fit_to",
    lambda *a: seen.append(a) or fit_to(*a),
  )

  found = cache.scores(chats, observed)

  np.testing.assert_array_equal(np.isnan(found.log_odds), ~observed)
  np.testing.assert_allclose(
    found.log_odds[observed], everything[observed], atol=1e-5
  )
  assert len(seen) == observed.sum()
  nothing = cache.scores(chats, np.zeros((9, 6), bool))
  assert np.isnan(nothing.log_odds).all()
  assert cache.scores([]).log_odds.shape == (0, 6)


def test_no_part_of_the_batch_changes_a_score():
  judge, rng = tiny.judge(), random.Random(2)
  specs, chats = specs_of(rng, 4), chats_of(rng, 30)
  cache = SpecCache(judge, specs)
  together = cache.scores(chats).log_odds

  for i in (0, 11, 29):
    for j in (0, 3):
      (alone,) = SpecCache(judge, [specs[j]]).scores([chats[i]]).log_odds
      assert alone[0] == pytest.approx(together[i, j], abs=1e-5)


def test_too_long_is_cut_as_score_cuts_it():
  judge, rng = tiny.judge(), random.Random(3)
  shape = dataclasses.replace(judge.model.architecture, context=200)
  model = dataclasses.replace(judge.model, architecture=shape)
  judge = dataclasses.replace(judge, model=model)
  long_spec = Spec(
    rules=tuple(
      Rule(id=f"r{i}", guideline=text(rng, 9, 9), polarity="forbid")
      for i in range(9)
    )
  )
  specs = [*specs_of(rng, 2, longest=8), long_spec]
  short = chats_of(rng, 2, longest=3)
  history = [
    {"role": "user", "content": "bread " * 300},
    *chats_of(rng, 1, longest=3)[0],
  ]
  chats = [*short, history]
  expected, truncated, helpful = plain(judge, specs, chats)

  cache = SpecCache(judge, specs)
  found = cache.scores(chats)

  np.testing.assert_allclose(found.log_odds, expected, atol=1e-5)
  np.testing.assert_array_equal(found.truncated, truncated)
  assert truncated[:2, :2].sum() == 0 and truncated[2].all()
  assert truncated[:, 2].all()
  assert cache.cut["rules"] > 0 and cache.cut["shortened"] > 0
  assert cache.cut["uncached"] == 3  # those that lost rules
  np.testing.assert_allclose(cache.helpfulness(chats), helpful, atol=1e-5)

  chats[1] = [{"role": "assistant", "content": "bread " * 300}]
  with pytest.raises(ValueError, match=r"conversation 1: .*response"):
    cache.scores(chats)


def test_bad_input_is_named():
  judge, rng = tiny.judge(), random.Random(4)
  with pytest.raises(ValueError, match="empty spec"):
    SpecCache(judge, ["S1: a", " "])
  other = dataclasses.replace(judge, head="helpfulness")
  with pytest.raises(ValueError, match="reads no spec"):
    SpecCache(other, ["S1: a"])
  cache = SpecCache(judge, specs_of(rng, 2))
  with pytest.raises(ValueError, match=r"shape \(3, 3\); use \(3, 2\)"):
    cache.scores(chats_of(rng, 3), np.ones((3, 3), bool))
  kernel = judge.params["head"]["kernel"].at[1].set(0.0)
  untrained = dataclasses.replace(
    judge, params=judge.params | {"head": {"kernel": kernel}}
  )
  with pytest.raises(ValueError, match="no trained helpfulness"):
    SpecCache(untrained, ["S1: a"]).helpfulness(chats_of(rng, 1))


@pytest.mark.slow
def test_calls_have_few_shapes():
  judge, rng = tiny.judge(), random.Random(5)
  score_cached._compiled.cache_clear()
  cache = SpecCache(judge, specs_of(rng, 3, longest=9))
  for count in (1, 5, 40, 37, 12):
    cache.scores(chats_of(rng, count, longest=4))
  _, run = score_cached._compiled(judge.model)
  sizes = {size for size in score_cached._LENGTHS if size <= 96}
  assert run._cache_size() <= 2 * len(sizes) * len(cache._stores)


@pytest.mark.slow
def test_equals_plain_scores_of_the_shipped_judge():
  judge = load(SHIPPED)
  rng = random.Random(0)
  specs, chats = specs_of(rng, 3), chats_of(rng, 6)
  rows = [
    {"id": f"{i} {j}", "messages": chat, "spec": spec}
    for i, chat in enumerate(chats)
    for j, spec in enumerate(specs)
  ]
  expected = [s.log_odds for s in score_lib.score_rows(judge, rows)]

  found = SpecCache(judge, specs).scores(chats).log_odds

  np.testing.assert_allclose(found.ravel(), expected, atol=1e-4)
  assert np.std(expected) > 0.1
