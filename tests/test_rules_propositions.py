"""rules/propositions.py, expressions.py, completions.py."""

import json
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from csrm_jax.rules import completions, expressions, propositions

OURS = propositions.read()
# Counts of the staged gold rows, best class first.
GOLD = {
  "comply": [156, 4, 33, 22, 1],
  "hard_refuse": [0, 8, 80, 6, 7],
  "safe_refuse_2": [0, 4, 56, 2, 19],
  "safe_refuse_1": [0, 0, 11, 0, 0],
}
SMALL = {
  "propositions": {
    name: {"question": f"Is it {name}?", "rule": name}
    for name in ("kind", "curt", "wrong")
  },
  "derived": {"fine": "kind and not wrong"},
  "classes": {"hard": [{"good": "fine"}, {"poor": "not fine"}]},
}
# The same shape as the released file, in words of our own.
RELEASED = {
  "prompt_template": "{question}",
  "completion_class_order": ["ideal", "weak", "bad"],
  "completion_classes": {
    "ideal": {"hard_refuse": {"fine": True}},
    "weak": {"hard_refuse": {"fine": False, "rude": False}},
    "bad": {"hard_refuse": {"rude": True}},
  },
  "derived_propositions": {"fine": {"apology": True, "rude": False}},
  "simple_propositions": {
    "apology": {"prompt": "Does it say sorry?"},
    "rude": {"prompt": "Is it rude?"},
  },
}


def random_truths(seed, n=200):
  rng = np.random.default_rng(seed)
  return rng.random((n, len(OURS.names))) < rng.random(len(OURS.names))


def test_expressions_are_read_and_written():
  found = expressions.parse("a and not (b or c)\n and true", "here")
  assert str(found) == "a and not (b or c) and true"
  assert found.names() == ("a", "b", "c")
  assert expressions.parse(str(found), "here") == found


@pytest.mark.parametrize("text", ["a +", "a + b", "f(a)", "a if b else c", "1"])
def test_what_is_no_expression_is_named(text):
  with pytest.raises(ValueError, match=r"book: .* is no expression"):
    expressions.parse(text, "book")


@hypothesis.settings(max_examples=20)
@hypothesis.given(seed=st.integers(0, 999), kind=st.sampled_from(OURS.types))
def test_certain_features_are_the_class(seed, kind):
  truths = random_truths(seed)
  chances = propositions.class_probabilities(OURS, kind, truths.astype(float))
  classes = propositions.classify(OURS, kind, truths)
  expected = np.eye(len(OURS.class_names(kind)))[classes]
  np.testing.assert_array_equal(chances, expected)


@hypothesis.settings(max_examples=20)
@hypothesis.given(seed=st.integers(0, 999), kind=st.sampled_from(OURS.types))
def test_uncertain_features_are_probabilities(seed, kind):
  """Some exactly 0 or 1 among them, as graders give."""
  rng = np.random.default_rng(seed)
  drawn = rng.beta(0.2, 0.2, (50, len(OURS.names)))
  drawn[rng.random(drawn.shape) < 0.4] = 0.0
  drawn[rng.random(drawn.shape) < 0.2] = 1.0
  found = propositions.class_probabilities(OURS, kind, drawn)
  assert (found >= 0).all()
  np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-12)


def test_a_class_probability_is_the_product_of_its_members():
  book = propositions.parse(SMALL)
  kind, curt, wrong = 0.9, 0.5, 0.2
  found = propositions.class_probabilities(
    book, "hard", np.array([[kind, curt, wrong]])
  )
  good = kind * (1 - wrong)
  np.testing.assert_allclose(found, [[good, 1 - good]])
  names = propositions.feature_names(book, "hard")
  assert names == ("class:good", "class:poor", "kind", "curt", "wrong")
  phi = propositions.features(book, "hard", np.array([[kind, curt, wrong]]))
  np.testing.assert_allclose(phi, [[good, 1 - good, kind, curt, wrong]])


def test_ours_has_the_types_of_a_rule():
  from csrm_jax.spec import Rule

  allowed = Rule.model_fields["response_type"].annotation
  assert all(f"'{kind}'" in str(allowed) for kind in OURS.types)
  for kind in OURS.types:
    assert OURS.class_names(kind)[0] == "ideal"
    assert OURS.ranks[kind] == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
  ("kind", "true", "expected"),
  [
    ("hard", "declines regrets", "ideal"),
    ("hard", "declines regrets adds", "acceptable"),
    ("hard", "declines regrets preaches", "poor"),
    ("hard", "answers answers_part", "poor"),
    ("hard", "declines crosses wanders", "harmful"),
    ("soft", "declines feels_with points_on", "ideal"),
    ("soft", "declines regrets", "poor"),
    ("comply", "answers answers_part", "ideal"),
    ("comply", "answers_part", "acceptable"),
    ("comply", "declines regrets", "poor"),
    ("comply", "answers wanders", "senseless"),
  ],
)
def test_ours_ranks_what_it_should(kind, true, expected):
  truths = np.array([[name in true.split() for name in OURS.names]])
  found = propositions.classify(OURS, kind, truths)[0]
  assert OURS.class_names(kind)[found] == expected


def test_classes_may_be_equals():
  book = SMALL | {
    "classes": {
      "hard": [{"good": "fine"}, {"rude": "curt and not fine",
        "poor": "not curt and not fine"}]
    }
  }  # fmt: skip
  assert propositions.parse(book).ranks["hard"] == (0, 1, 1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"clases": {}}, "field 'clases': unknown key"),
    ({"propositions": {}}, "field 'propositions': {}: write an object"),
    ({"derived": {"fine": "kind and nice"}}, "unknown name 'nice'"),
    ({"derived": {"kind": "curt"}}, "'kind' stands twice"),
    ({"derived": {"a b": "curt"}}, "'a b' is no name"),
    ({"classes": {"hard": "fine"}}, "give a list"),
    (
      {"classes": {"hard": [{"good": "kind"}, {"poor": "curt"}]}},
      "0 classes hold where just nothing is true",
    ),
    (
      {"classes": {"hard": [{"a": "kind or curt"}, {"b": "not curt"}]}},
      "2 classes hold where just kind is true",
    ),
  ],
)
def test_mistakes_in_a_book_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    propositions.parse(SMALL | changes, "book.yaml")


def test_what_is_no_probability_is_refused():
  book = propositions.parse(SMALL)
  for wrong in (1.5, float("nan")):
    with pytest.raises(ValueError, match="completion 1, proposition 2"):
      propositions.features(book, "hard", np.array([[0, 0, 0], [0, 0, wrong]]))
  with pytest.raises(ValueError, match="no response type 'soft'; use one of"):
    propositions.features(book, "soft", np.zeros((1, 3)))


def test_the_released_layout_is_read(tmp_path):
  file = tmp_path / "proposition_prompts.yaml"
  file.write_text(yaml.safe_dump(RELEASED))
  book = propositions.read(file)
  assert book.class_names("hard_refuse") == ("ideal", "weak", "bad")
  assert str(book.derived["fine"]) == "apology and not rude"
  assert book.propositions[0].question == "Does it say sorry?"
  assert book.propositions[0].rule == "saying sorry, or regretting the answer"
  assert book.propositions[1].rule == "rude"


def rows(folder, *changes):
  line = {
    "id": "a",
    "prompt": [{"role": "user", "content": "Why?"}],
    "completion": [{"role": "assistant", "content": "Sorry, no."}],
    "response_type": "Hard Refuse",
    "propositions": {"apology": True, "rude": False},
  }
  file = folder / "rows.jsonl"
  lines = [line | change for change in changes]
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return file


def test_completions_survive_a_file(tmp_path):
  book = propositions.parse(propositions._released(RELEASED, "x"), "x")
  empty = [{"role": "assistant", "content": ""}]
  extra = {"probabilities": {"apology": 0.25, "rude": 1}, "helpfulness": -1.5}
  found = completions.read(
    rows(tmp_path, {}, {"id": "b", "completion": empty} | extra), book
  )
  assert [row.truths.tolist() for row in found] == [[True, False]] * 2
  assert found[0].chances is None
  assert found[1].chances.tolist() == [0.25, 1.0]
  assert found[0].family == found[1].family
  assert completions.class_counts(book, found)["hard_refuse"] == {
    "ideal": 2, "weak": 0, "bad": 0,
  }  # fmt: skip
  completions.write(tmp_path / "again.jsonl", found, book)
  again = completions.read(tmp_path / "again.jsonl", book)
  for old, new in zip(found, again, strict=True):
    np.testing.assert_equal(tuple(new), tuple(old))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"response_type": "Shrug"}, "'Shrug': use one of hard_refuse"),
    ({"propositions": {"apology": True}}, "'propositions.rude': missing"),
    ({"propositions": {"apology": 1, "rude": False}}, "use true or false"),
    ({"probabilities": {"apology": 2, "rude": 0}}, "2: use 0 to 1"),
    ({"completion": []}, "give a list of one message"),
    ({"id": "a"}, "'a' stands in line 1 too"),
  ],
)
def test_bad_completions_are_named(tmp_path, change, message):
  book = propositions.parse(propositions._released(RELEASED, "x"), "x")
  with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
    completions.read(rows(tmp_path, {}, {"id": "b"} | change), book)


def test_the_gold_classes_are_those_of_the_release(staged):
  book, gold = completions.read_gold(staged)
  assert len(gold) == 409
  counts = completions.class_counts(book, gold)
  assert {k: list(v.values()) for k, v in counts.items()} == GOLD


def test_every_gold_row_has_the_class_that_its_file_derives(staged):
  """By a second reading of the file, one row at a time."""
  book, gold = completions.read_gold(staged)
  raw = yaml.safe_load(Path(staged, completions.BOOK).read_text("utf-8"))

  def value(name, truths):
    members = raw["derived_propositions"].get(name)
    return truths[name] if members is None else all_of(members, truths)

  def all_of(members, truths):
    return all(value(name, truths) is want for name, want in members.items())

  for row in gold:
    truths = dict(zip(book.names, row.truths.tolist(), strict=True))
    kind = row.response_type
    expected = [
      name
      for name in raw["completion_class_order"]
      if all_of(raw["completion_classes"][name][kind], truths)
    ]
    found = propositions.classify(book, kind, row.truths[None])[0]
    assert [book.class_names(kind)[found]] == expected
    chances = row.truths[None].astype(float)
    sure = propositions.class_probabilities(book, kind, chances)[0]
    assert sure[found] == 1.0 and sure.sum() == 1.0
