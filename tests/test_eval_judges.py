"""Judges: the model's own, and what it has to be compared with."""

import dataclasses

import jax
import numpy as np
import pytest

from csrm_jax import metrics, score
from csrm_jax.config import default
from csrm_jax.data import synthetic
from csrm_jax.eval import judges
from csrm_jax.judge import Judge
from csrm_jax.model import reward
from tests import tiny


@pytest.fixture(scope="module")
def loaded() -> Judge:
  """A random model with two layers and both heads at work."""
  config = default().model
  config.path = "random"
  tokenizer = tiny.tokenizer()
  model, load_params = reward.make(config, vocab_size=tokenizer.vocab_size)
  params = load_params(jax.random.key(0))
  kernel = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
  params = params | {"head": {"kernel": kernel}}
  return Judge(model, params, tokenizer, 2.0, "compliance", "tiny")


def row(text: str, spec: str | None = "No spoilers.") -> dict:
  messages = [
    {"role": "user", "content": "How does it end?"},
    {"role": "assistant", "content": text},
  ]
  return {"id": text, "messages": messages} | ({"spec": spec} if spec else {})


def test_csrm_is_score_rows_and_reads_helpfulness_without_spec(loaded):
  rows = [row("Badly."), row("Badly.", None), row("Who knows.", "No guesses.")]
  got = judges.csrm(loaded)(rows)
  under = score.score_rows(loaded, [rows[0], rows[2]], helpfulness=True)
  np.testing.assert_allclose(
    got[[0, 2]], [s.log_odds for s in under], atol=1e-5
  )
  np.testing.assert_allclose(got[1], under[0].helpfulness, atol=1e-5)


def test_csrm_without_helpfulness_head_answers_nan(loaded):
  kernel = loaded.params["head"]["kernel"].at[1].set(0.0)
  bare = dataclasses.replace(
    loaded, params=loaded.params | {"head": {"kernel": kernel}}
  )
  got = judges.csrm(bare)([row("Badly."), row("Badly.", None)])
  assert np.isfinite(got[0]) and np.isnan(got[1])


def test_derangement_moves_every_spec_and_is_seeded():
  specs = [f"spec {i % 7}" for i in range(20)]
  other = judges.derangement(specs, seed=1)
  assert set(other) == set(other.values()) == set(specs)
  assert all(spec != to for spec, to in other.items())
  assert other == judges.derangement(reversed(specs), seed=1)
  assert other != judges.derangement(specs, seed=2)
  with pytest.raises(ValueError, match="two different specs"):
    judges.derangement(["a", "a"], seed=0)


def test_spec_shuffled_asks_the_same_model_under_another_spec():
  asked = []

  def judge(rows):
    asked.extend(rows)
    return np.arange(len(rows), dtype=np.float64)

  rows = [row("a", "one"), row("b", "two"), row("c", "one"), row("d", None)]
  got = judges.spec_shuffled(judge)(rows)
  assert got.tolist() == [0.0, 1.0, 2.0, 3.0]
  assert [r.get("spec") for r in asked] == ["two", "one", "two", None]
  assert [r["messages"] for r in asked] == [r["messages"] for r in rows]
  assert [r.get("spec") for r in rows] == ["one", "two", "one", None]


def test_always_unsafe_never_complies():
  odds = judges.always_unsafe([row("a"), row("b")])
  assert not metrics.verdict(odds).any() and np.isfinite(odds).all()


def test_tfidf_learns_words_but_not_relations():
  """It finds a bad word; it cannot tell which spec forbids it."""
  rng = np.random.default_rng(0)
  fruits = ["apple", "banana", "cherry", "damson"]

  def made(n: int, relation: bool) -> list[dict]:
    out = []
    for i in range(n):
      said, named = rng.choice(fruits, 2)
      bad = said == named if relation else said in fruits[:2]
      base = row(f"{said} {rng.integers(99)}", f"No {named}.")
      out.append(base | {"id": str(i), "label": 0.0 if bad else 1.0})
    return out

  for relation, low, high in ((False, 0.99, 1.0), (True, 0.3, 0.7)):
    train, test = made(400, relation), made(300, relation)
    odds = judges.tfidf(train)(test)
    gold = np.array([r["label"] for r in test])
    assert low <= metrics.auroc(odds, gold) <= high, relation


def test_tfidf_learns_from_synthetic_rows_and_skips_specless():
  train = list(synthetic.rows(split="train", families=40, seed=0))
  judge = judges.tfidf(train, limit=100)
  odds = judge([row("Sure."), row("Sure.", None)])
  assert np.isfinite(odds[0]) and np.isnan(odds[1])


def test_tfidf_needs_both_labels():
  with pytest.raises(ValueError, match="both verdicts"):
    judges.tfidf([row("a") | {"label": 1.0}])
