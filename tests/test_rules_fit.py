"""rules/fit.py, weights.py, plots.py."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from csrm_jax.rules import completions, fit, plots, propositions, weights
from csrm_jax.rules.completions import Completion

NAMES = ("kind", "curt", "wrong")
BOOK = {
  "propositions": {n: {"question": f"{n}?", "rule": n} for n in NAMES},
  "classes": {
    "hard": [
      {"good": "kind and not wrong"},
      {"poor": "not kind and not wrong"},
      {"bad": "wrong"},
    ],
    "soft": [{"good": "kind"}, {"poor": "not kind"}],
  },
}


def problem(seed, *, scale=1.0, features=8, margin=0.7, per_rank=0.25):
  rng = np.random.default_rng(seed)
  rows = 90
  return fit.make_pairs(
    rng.random((rows, features)),
    rng.normal(size=rows) * scale,
    rng.integers(0, 5, rows),
    [str(i // 6) for i in range(rows)],
    margin=margin,
    per_rank=per_rank,
  )


def planted(seed, w, *, scale=0.5):
  """Pairs of 6 completions a prompt, ranked by h + w . phi."""
  rng = np.random.default_rng(seed)
  phi = rng.random((240, len(w)))
  h = rng.normal(size=240) * scale
  total = h + phi @ w
  return fit.make_pairs(
    phi,
    h,
    np.argsort(np.argsort(-total)),
    [str(i // 6) for i in range(240)],
    margin=0.0,
  )


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", [0, 2])
def test_the_fit_is_the_optimum_of_the_linear_program(seed, scale):
  pairs = problem(seed, scale=scale)
  exact, lowest = fit.optimum(pairs)
  made = fit.fit(pairs)
  found = fit.measure(made.weights, pairs)["loss"]
  assert lowest > 0.1  # the constraints bind
  assert lowest - 1e-6 <= found < lowest + 1e-3
  assert fit.measure(exact, pairs)["loss"] == pytest.approx(lowest, abs=1e-9)
  start = fit.measure(np.zeros(8), pairs)["loss"]
  assert made.losses[0] == pytest.approx(start, rel=1e-5)


def test_planted_weights_are_recovered():
  """With a margin of 0 the true weights are an optimum, of loss 0."""
  w = np.array([2.0, -1.0, 0.5, 0.0])
  made = fit.fit(planted(0, w))
  np.testing.assert_allclose(made.weights, w, atol=0.1)
  fresh = fit.measure(made.weights, planted(1, w))
  assert fresh["pair_error"] < 0.02 < 0.2 < fresh["pair_error_helpfulness"]


def test_fractional_margins_are_honoured():
  """One feature apart by 1, no helpfulness: w is the margin itself."""
  for margin in (0.25, 0.5, 1.75):
    pairs = fit.make_pairs(
      np.array([[1.0], [0.0]]), np.zeros(2), np.array([0, 1]), ["a", "a"],
      margin=margin,
    )  # fmt: skip
    assert fit.fit(pairs).weights[0] == pytest.approx(margin, abs=0.011)
    assert fit.measure(np.array([margin - 0.2]), pairs)[
      "loss"
    ] == pytest.approx(0.2)


def test_margins_grow_with_ranks():
  pairs = fit.make_pairs(
    np.zeros((3, 1)), np.zeros(3), np.array([0, 1, 3]), ["a"] * 3,
    margin=1.0, per_rank=0.5,
  )  # fmt: skip
  assert pairs.margin.tolist() == [1.0, 2.0, 1.5]


def test_pairs_are_all_of_one_prompt_with_another_rank():
  h = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
  pairs = fit.make_pairs(
    h[:, None] / 2, h, np.array([1, 0, 1, 0, 2]), ["a", "a", "a", "b", "b"]
  )
  assert pairs.family == ("a", "a", "b")
  assert pairs.lead.tolist() == [1.0, -2.0, -8.0]
  np.testing.assert_allclose(pairs.gap[:, 0], pairs.lead / 2)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
  sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30),
  share=st.floats(0.0, 0.5),
  seed=st.integers(0, 99),
)
def test_whole_prompts_are_held_out(sizes, share, seed):
  families = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
  held = fit.hold_out(families, share=share, seed=seed)
  if len(sizes) > 1:
    for name in set(families):
      of_name = held[[f == name for f in families]]
      assert of_name.all() or not of_name.any()
  assert not held.all()
  assert abs(held.sum() - share * len(held)) <= max(sizes)


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 99), t=st.floats(0, 1))
def test_the_loss_is_convex_and_its_gradient_the_reference(seed, t):
  pairs = problem(seed)
  rng = np.random.default_rng(seed)
  one, two = rng.normal(size=(2, 8)) * 2

  def loss(w):
    return fit.measure(w, pairs)["loss"]

  mixed = loss(t * one + (1 - t) * two)
  assert mixed <= t * loss(one) + (1 - t) * loss(two) + 1e-9
  arrays = [jnp.asarray(x, jnp.float32) for x in pairs[:3]]
  value, gradient = jax.value_and_grad(fit.hinge)(
    jnp.asarray(one, jnp.float32), *arrays
  )
  short = pairs.margin - pairs.lead - pairs.gap @ one > 0
  expected = -(pairs.gap * short[:, None]).sum(0) / len(short)
  assert float(value) == pytest.approx(loss(one), rel=1e-5)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_what_cannot_be_fitted_is_named():
  nothing = fit.make_pairs(
    np.zeros((2, 1)), np.zeros(2), np.array([1, 1]), ["a", "a"]
  )
  with pytest.raises(ValueError, match="no two completions of one prompt"):
    fit.fit(nothing)
  assert fit.measure(np.zeros(1), nothing) == {"pairs": 0.0}
  broken = problem(0)._replace(lead=np.full(len(problem(0).lead), np.nan))
  with pytest.raises(ValueError, match="lead of a pair is not finite"):
    fit.fit(broken)


# ------------------------------------------------------------------- folders


@pytest.fixture
def book(tmp_path):
  file = tmp_path / "written.yaml"
  file.write_text(yaml.safe_dump(BOOK))
  return propositions.read(file)


def made_rows(n=40, *, kind="hard"):
  """Helpfulness likes what is wrong: rewards must outweigh it."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(n):
    truths = rng.random(3) < 0.5
    prompt = {"role": "user", "content": f"Question {i // 5}?"}
    answer = {"role": "assistant", "content": f"Answer {i}."}
    helpful = float(truths[2] - 0.5 * truths[0] + 0.1 * rng.normal())
    rows.append(
      Completion(str(i), [prompt, answer], kind, truths, None, helpful)
    )
  return rows


def test_weights_by_type_turn_the_order_round(book, tmp_path):
  rows = made_rows()
  made = weights.fit_rows(book, rows, heldout=0.2)
  assert set(made.weights) == {"hard"}  # no row wants a soft refusal
  assert made.report["soft"] == {"rows": 0, "prompts": 0}
  hard = made.report["hard"]
  assert hard["rows"] == 40 and hard["prompts"] == 8
  assert hard["heldout"]["pair_error"] == 0.0
  assert hard["heldout"]["pair_error_helpfulness"] > 0.5
  assert hard["fitted"]["loss"] == pytest.approx(hard["optimum"], abs=1e-3)
  with pytest.raises(ValueError, match="no weights for response type 'soft'"):
    made.rewards("soft", np.zeros((1, 3)))

  weights.save(made, tmp_path / "out")
  again = weights.load(tmp_path / "out" / "rules.json")
  np.testing.assert_array_equal(again.weights["hard"], made.weights["hard"])
  assert again.report == made.report
  chances = np.random.default_rng(1).random((4, 3))
  phi = propositions.features(book, "hard", chances)
  np.testing.assert_allclose(
    again.rewards("hard", chances), phi @ made.weights["hard"], rtol=1e-6
  )
  plots.weights(made, tmp_path / "weights.png")
  plots.rewards(made, rows, tmp_path / "rewards.png")
  for name in ("weights.png", "rewards.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_weights_of_another_book_are_refused(book, tmp_path):
  weights.save(weights.fit_rows(book, made_rows(10)), tmp_path / "out")
  other = BOOK | {"derived": {"more": "kind"}}
  (tmp_path / "out" / "book.yaml").write_text(yaml.safe_dump(other))
  with pytest.raises(ValueError, match="its propositions or classes were"):
    weights.load(tmp_path / "out")
  with pytest.raises(ValueError, match=r"rules\.json: missing; fit weights"):
    weights.load(tmp_path / "nowhere")


def test_a_graders_features_and_human_classes(book):
  """A coin for a grader: nothing to learn, so the error stays."""
  rng = np.random.default_rng(3)
  rows = [row._replace(chances=rng.random(3)) for row in made_rows(100)]
  made = weights.fit_rows(book, rows, heldout=0.3)
  assert made.report["hard"]["heldout"]["pair_error"] > 0.3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"chances": np.zeros(3)}, "'probabilities': missing, while others"),
    ({"helpfulness": None}, "'helpfulness': missing, while others"),
    ({"truths": None}, "'propositions': missing; add what holds"),
  ],
)
def test_rows_that_lack_something_are_named(book, change, message):
  rows = made_rows(10)
  rows[0] = rows[0]._replace(**change)
  with pytest.raises(ValueError, match=message):
    weights.fit_rows(book, rows)


def test_the_gold_set_has_no_pairs_to_fit(staged):
  """One completion a prompt: it tests graders, weights need others."""
  book, gold = completions.read_gold(staged)
  with pytest.raises(ValueError, match="give several completions a prompt"):
    weights.fit_rows(book, gold)
