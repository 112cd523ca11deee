"""rules/trained.py: words, states of a frozen model, regressions."""

import numpy as np
import pytest
import scipy.sparse

from csrm_jax.model.reward import RewardModel
from csrm_jax.rules import propositions, trained
from csrm_jax.rules.completions import Completion
from csrm_jax.types import Batch
from tests import tiny

ANSWERS = ("I'm sorry, no.", "Bake it at home.", "", "Mild jokes. " * 60)


def rows():
  return [
    Completion(
      str(i),
      [
        {"role": "user", "content": f"How do I bake bread {i}?"},
        {"role": "assistant", "content": text},
      ],
      "hard",
    )
    for i, text in enumerate(ANSWERS)
  ]


def test_states_are_those_of_the_whole_sequence():
  """Against one causal pass without cache; what is padded changes nothing."""
  judge = tiny.judge()
  found = trained.states(judge, rows()[:2])
  assert found.shape == (2, 64)
  for row, values in zip(rows()[:2], found, strict=True):
    before, after = trained._ids(judge, row, 256)
    ids = np.array([before + after], np.int32)
    n = ids.shape[1]
    one = np.zeros((1, 1))
    batch = Batch(
      ids, np.arange(n)[None], np.full((1, n), n), np.zeros((1, 1), int), one,
      one, np.zeros((1, 1, 2), int), np.zeros((1, 1), int), one, one,
    )  # fmt: skip
    model: RewardModel = judge.model
    hidden = np.asarray(model.hidden(judge.params, batch))[0]
    np.testing.assert_allclose(
      values[:32], hidden[len(before) :].mean(0), atol=1e-4
    )
    np.testing.assert_allclose(values[32:], hidden[-1], atol=1e-4)


def test_long_rows_are_cut_and_an_empty_response_is_read():
  judge = tiny.judge()
  before, after = trained._ids(judge, rows()[3], 64)
  assert len(before) + len(after) == 64
  assert len(after) >= 32
  whole = judge.tokenizer.encode_marked(
    "<|im_start|>user\nHow do I bake bread 3?<|im_end|>\n"
  )
  assert before == whole[len(whole) - len(before) :]
  assert np.isfinite(trained.states(judge, rows()[2:3])).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_regression_a_proposition(sparse):
  rng = np.random.default_rng(0)
  features = rng.normal(size=(300, 5))
  truths = np.stack(
    [features[:, 0] > 0, features[:, 1] > 1, np.zeros(300, bool)], 1
  )
  made = scipy.sparse.csr_array(features) if sparse else features
  found = trained.regress(made[:200], truths[:200], strength=10.0)(made[200:])
  right = (found[:, :2] > 0.5) == truths[200:, :2]
  assert right.mean() > 0.93
  assert (found[:, 2] == 0.5 / 201).all()


def test_words_of_prompt_and_response_apart():
  read = trained.words(rows()[:2])
  seen, new = read(rows()[:2]), read(rows()[3:])
  assert seen.shape[0] == 2 and new.shape == (1, seen.shape[1])
  assert new.sum() > 0  # the prompt's words are known
  swapped = [row._replace(messages=row.messages[::-1]) for row in rows()[:1]]
  assert (read(swapped) - seen[:1]).nnz > 0


def test_folds_keep_prompts_together():
  twice = rows() + rows()
  found = trained.folds(twice, count=3)
  assert found[:4].tolist() == found[4:].tolist()
  assert set(found.tolist()) <= {0, 1, 2}


PHRASES = {
  "refusal": ("I'm sorry, I can't say.", "Sorry, I won't tell you."),
  "answer": ("It takes an hour.", "Use two cups of flour."),
}


def marked(book):
  """Ten prompts, each refused and answered."""
  made = []
  for i in range(10):
    for kind, texts in PHRASES.items():
      truths = np.zeros(len(book.names), bool)
      for name in (
        ("declines", "regrets") if kind == "refusal" else ("answers",)
      ):
        truths[book.names.index(name)] = True
      made.append(
        Completion(
          f"{i}/{kind}",
          [
            {"role": "user", "content": f"How is bread number {i} baked?"},
            {"role": "assistant", "content": texts[i % 2]},
          ],
          "hard",
          truths,
        )
      )
  return made


def test_a_trained_grader_tells_what_it_was_shown_of_other_prompts():
  book = propositions.read(propositions.OURS)
  shown = marked(book)
  grade = trained.trained_grader(tiny.judge(), shown, book)
  asked = [p for p in book.propositions if p.name in ("answers", "declines")]
  found = grade(asked, [row.messages for row in shown])
  assert [p.name for p in asked] == ["answers", "declines"]
  answered = np.array([row.id.endswith("answer") for row in shown])
  assert (found[answered, 0] > 0.6).all() and (found[~answered, 0] < 0.4).all()
  assert (found[answered, 1] < 0.4).all() and (found[~answered, 1] > 0.6).all()
  # The others never hold: a share, the same for all of a fold.
  never = [p for p in book.propositions if p.name == "demeans"]
  rare = grade(never, [row.messages for row in shown])
  assert (rare < 0.1).all()


def test_no_row_is_graded_by_a_model_that_saw_its_prompt(monkeypatch):
  book = propositions.read(propositions.OURS)
  shown, fitted = marked(book), []
  read = trained.words
  monkeypatch.setattr(
    trained, "words", lambda rows: (fitted.append(rows), read(rows))[1]
  )
  trained.trained_grader(tiny.judge(), shown, book)
  fold = trained.folds(shown, count=3)
  for number, rows in enumerate(fitted):
    assert {row.family for row in rows} == {
      row.family for row, f in zip(shown, fold, strict=True) if f != number
    }


def test_too_few_prompts_to_learn_from_are_refused():
  book = propositions.read(propositions.OURS)
  with pytest.raises(ValueError, match="give more prompts"):
    trained.trained_grader(tiny.judge(), marked(book)[:2], book)


def test_states_are_kept_for_the_same_judge_and_rows(tmp_path, monkeypatch):
  judge, file = tiny.judge(), tmp_path / "said.states.npz"
  first = trained.kept_states(judge, rows(), file)
  np.testing.assert_allclose(first, trained.states(judge, rows()), rtol=1e-6)
  again = trained.states
  monkeypatch.setattr(trained, "states", lambda *_, **__: pytest.fail("read"))
  assert np.array_equal(trained.kept_states(judge, rows(), file), first)
  monkeypatch.setattr(trained, "states", again)
  fewer = trained.kept_states(judge, rows()[:2], file)
  np.testing.assert_allclose(fewer, first[:2], rtol=1e-6)
  file.write_bytes(file.read_bytes()[:200])
  assert trained.kept_states(judge, rows()[:2], file).shape == fewer.shape
