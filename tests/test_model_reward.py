"""The reward model: readouts, heads, what is trained, packing, workdirs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csrm_jax import checkpoint
from csrm_jax.config import default
from csrm_jax.data import trie
from csrm_jax.model import reward
from csrm_jax.model.backbone import Architecture
from csrm_jax.model.names import flatten
from csrm_jax.model.reward import RewardModel
from csrm_jax.types import Example, Segment, TrainState
from tests import rows

SAFE, UNSAFE = (3, 4), (5, 6, 7)


def architecture(**changes) -> Architecture:
  return Architecture.from_config(
    {
      "model_type": "qwen3",
      "vocab_size": 64,
      "hidden_size": 16,
      "intermediate_size": 24,
      "num_hidden_layers": 3,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 8,
      "tie_word_embeddings": True,
    }
    | changes
  )


def random_params(model: RewardModel, seed: int = 0):
  """All leaves random: zeros of an initial model would hide mistakes."""
  params = jax.jit(model.init)(jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  leaves = [
    jnp.asarray(rng.normal(size=x.shape) * 0.3 + (x.ndim < 3), jnp.float32)
    for x in leaves
  ]
  return jax.tree.unflatten(tree, leaves)


def test_readouts_are_head_products_of_hidden_states():
  model = RewardModel(architecture())
  params = random_params(model)
  batch = rows.plain([[9, 8, 7, 1], [2, 1]], padding=1)
  batch = batch._replace(readout=np.array([[3, 0, 0], [1, 1, 4]]))

  got = jax.jit(model.apply)(params, batch)
  hidden = np.asarray(jax.jit(model.hidden)(params, batch), np.float64)

  states = np.take_along_axis(hidden, batch.readout[..., None], axis=1)
  expected = states @ np.asarray(params["head"]["kernel"], np.float64).T
  assert got.shape == (2, 3, 2)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_untrained_model_is_the_zero_shot_judge(tied):
  model = RewardModel(
    architecture(tie_word_embeddings=tied),
    safe_ids=SAFE,
    unsafe_ids=UNSAFE,
    keep_lm_head=True,
  )
  params = jax.jit(model.init)(jax.random.key(0))
  batch = rows.plain([[9, 8, 7, 1]])

  z, h = jax.jit(model.apply)(params, batch)[0, 0]
  logits = jax.jit(model.logits)(params, batch)[0, -1]

  np.testing.assert_allclose(z, logits[3] - logits[5], atol=1e-6)
  assert abs(z) > 1e-3
  assert h == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_verbaliser_is_the_log_odds_of_two_sets(tied):
  model = RewardModel(
    architecture(tie_word_embeddings=tied),
    head="verbaliser",
    safe_ids=SAFE,
    unsafe_ids=UNSAFE,
  )
  params = random_params(model)
  batch = rows.plain([[9, 8, 7, 1], [2, 1]])

  got, logits = jax.jit(model.apply_with_logits)(params, batch)
  alone = jax.jit(model.apply)(params, batch)
  probabilities = jax.nn.softmax(np.asarray(logits, np.float64)[:, 0])

  safe = probabilities[:, list(SAFE)].sum(-1)
  unsafe = probabilities[:, list(UNSAFE)].sum(-1)
  assert ("lm_head" in params) != tied
  np.testing.assert_allclose(
    got[:, 0, 0], np.log(safe) - np.log(unsafe), rtol=1e-3, atol=1e-3
  )
  assert np.all(got[:, 0, 1] != 0.0)  # helpfulness keeps its row
  np.testing.assert_array_equal(alone, got)
  full = jax.jit(model.logits)(params, batch)
  np.testing.assert_allclose(logits[:, 0], full[[0, 1], [3, 1]], atol=1e-4)


def test_verbaliser_without_token_sets_is_refused():
  with pytest.raises(ValueError, match="disjoint"):
    RewardModel(architecture(), head="verbaliser")
  with pytest.raises(ValueError, match="disjoint"):
    RewardModel(
      architecture(), head="verbaliser", safe_ids=(1, 2), unsafe_ids=(2,)
    )


@pytest.mark.parametrize(
  ("choice", "named"),
  [
    ({"head": "mean"}, "model.head 'mean'"),
    ({"train_layers": 4}, "model.train_layers = 4"),
    ({"train_layers": -2}, "model.train_layers = -2"),
    ({"lora_rank": -1}, "model.lora_rank = -1"),
    ({"remat": "full"}, "model.remat 'full'"),
    ({"dtype": "float16"}, "model.dtype 'float16'"),
    ({"attention": "flash"}, "model.attention 'flash'"),
  ],
)
def test_unknown_choices_are_refused_by_key(choice, named):
  with pytest.raises(ValueError) as error:
    RewardModel(architecture(), **choice)

  assert named in str(error.value)


def test_output_embedding_that_was_dropped_is_named():
  model = RewardModel(architecture(tie_word_embeddings=False))
  params = jax.jit(model.init)(jax.random.key(0))

  with pytest.raises(ValueError, match="keep_lm_head"):
    jax.eval_shape(model.logits, params, rows.plain([[1, 2]]))


TRAINED = [
  ({"train_layers": -1}, {"upper", "final_norm", "head"}),
  ({"train_layers": 3}, {"upper", "final_norm", "head"}),
  ({"train_layers": 1}, {"upper", "final_norm", "head"}),
  ({"train_layers": 0}, {"final_norm", "head"}),
  (
    {"train_layers": 1, "train_embedding": True},
    {"embed", "upper", "final_norm", "head"},
  ),
  ({"train_layers": 1, "lora_rank": 2}, {"upper", "head"}),
]


@pytest.mark.parametrize(("choice", "expected"), TRAINED)
def test_split_and_join(choice, expected):
  model = RewardModel(architecture(), **choice)
  params = jax.jit(model.init)(jax.random.key(0))

  trained, frozen = model.split(params)
  joined = model.join(trained, frozen)

  assert trained.keys() == expected
  assert not flatten(trained).keys() & flatten(frozen).keys()
  assert flatten(joined).keys() == flatten(params).keys()
  jax.tree.map(np.testing.assert_array_equal, joined, params)
  layers = {k: flatten(v) for k, v in params.items() if k.endswith("er")}
  counts = {k: {x.shape[0] for x in v.values()} for k, v in layers.items()}
  k = choice["train_layers"]
  wanted = {"lower": {3 - k}, "upper": {k}} if k >= 0 else {"upper": {3}}
  assert counts == {k: v for k, v in wanted.items() if v != {0}}


def test_number_of_trained_layers_does_not_change_the_scores():
  batch = rows.plain([[9, 8, 7, 1]])
  whole = RewardModel(architecture(), safe_ids=SAFE, unsafe_ids=UNSAFE)
  params = random_params(whole)
  expected = jax.jit(whole.apply)(params, batch)

  for k in (0, 2):
    model = RewardModel(architecture(), train_layers=k)
    cut = reward.recut(model, params, jax.random.key(0), alpha=whole.lora_alpha)
    got = jax.jit(model.apply)(cut, batch)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("embedding", [False, True])
def test_no_gradient_reaches_what_is_frozen(embedding):
  model = RewardModel(
    architecture(), train_layers=1, train_embedding=embedding, remat="none"
  )
  params = random_params(model)
  batch = rows.plain([[9, 8, 7, 1], [2, 1]])

  gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, batch) ** 2)))(
    params
  )

  reached = {k for k, v in gradient.items() if any(map(np.any, flat(v)))}
  base = {"upper", "final_norm", "head"}
  # A trained embedding lies under the frozen layers: they are passed through.
  assert reached == (base | {"embed", "lower"} if embedding else base)
  trained, _ = model.split(gradient)
  assert "lower" not in trained
  assert all(np.any(x) for x in flat(trained["upper"]))


def flat(tree):
  return jax.tree.leaves(tree)


# Attention in blocks of 64 tokens is dense up to 128: its rows are longer.
ROWS = [("dense", 1, 64), ("blocks", 4, 256), ("pallas", 4, 256)]


def _families(scale):
  """Three families that share prefixes, one of them a bare sequence."""
  rng = np.random.default_rng(0)

  def ids(n, low, high):
    return tuple(rng.integers(low, high, n * scale).tolist())

  spec, prompt = ids(7, 10, 20), ids(5, 10, 20)
  first = [spec + prompt + ids(n, 20, 40) + (1,) for n in (3, 6, 4)] + [
    spec + ids(4, 20, 40) + (1,)
  ]
  second = [spec + ids(3, 20, 40) + (1,), (*ids(6, 20, 40), 1)]
  third = [(*ids(9, 40, 60), 1)]  # tokens that no other family has
  return [
    Example(str(i), tuple(Segment(s) for s in segments))
    for i, segments in enumerate((first, second, third))
  ]


@pytest.mark.parametrize(("kind", "scale", "length"), ROWS)
def test_packed_equals_alone(kind, scale, length):
  model = RewardModel(architecture(), attention=kind)
  params = random_params(model)
  examples = _families(scale)
  packed = trie.pack(examples, row_length=length, slots=8, pairs=1)
  weight = np.random.default_rng(1).normal(size=(3, 4, 2))
  alone = [
    (i, n, list(segment.tokens))
    for i, example in enumerate(examples)
    for n, segment in enumerate(example.segments)
  ]
  single = rows.plain([ids for _, _, ids in alone], padding=2)

  def loss_packed(params):
    readouts = model.apply(params, packed.batch)
    scores = {
      key: readouts[row, slot]
      for row, places in enumerate(packed.where)
      for slot, key in enumerate(places)
    }
    return sum(jnp.sum(weight[k] * v) for k, v in scores.items()), scores

  def loss_alone(params):
    readouts = model.apply(params, single)
    scores = {(i, n): readouts[r, 0] for r, (i, n, _) in enumerate(alone)}
    return sum(jnp.sum(weight[k] * v) for k, v in scores.items()), scores

  got, expected = (
    jax.jit(jax.grad(f, has_aux=True))(params)
    for f in (loss_packed, loss_alone)
  )

  assert packed.counts["tokens_in_tries"] < packed.counts["tokens_alone"]
  assert packed.batch.tokens.shape[0] == 1
  assert got[1].keys() == expected[1].keys() and len(got[1]) == 7
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * np.max(np.abs(b))
    ),
    got,
    expected,
  )


@pytest.mark.parametrize(("kind", "scale", "length"), ROWS[:2])
def test_neighbour_gradient_is_zero(kind, scale, length):
  model = RewardModel(architecture(), attention=kind, train_embedding=True)
  params = random_params(model)
  packed = trie.pack(_families(scale), row_length=length, slots=8, pairs=1)
  (places,) = packed.where

  @jax.jit
  def gradient(slot):
    def score(params):
      return jnp.sum(model.apply(params, packed.batch)[0, slot])

    return jax.grad(score)(params)["embed"]["embedding"]

  for slot, (example, _) in enumerate(places):
    reached = np.any(np.asarray(gradient(slot)), axis=-1)
    neighbours = np.arange(40, 60) if example != 2 else np.arange(10, 40)
    assert not np.any(reached[neighbours])
    assert np.any(reached)


def _config(**changes):
  c = default().model
  c.path = "random"
  c.random.width = 16
  c.random.heads = 2
  c.random.kv_heads = 1
  c.random.ffn = 24
  c.update(changes)
  return c


def test_causal_attention_takes_rows_of_one_readout_alone():
  causal, dense = (RewardModel(architecture(), attention=kind)
                   for kind in ("causal", "dense"))  # fmt: skip
  params = random_params(dense)
  single = rows.plain([[9, 8, 7, 1], [2, 1]], padding=1)
  several = single._replace(readout=np.array([[3, 0], [1, 1]]))

  got, expected = (
    jax.jit(model.apply)(params, single) for model in (causal, dense)
  )

  np.testing.assert_allclose(got, expected, atol=1e-4)
  with pytest.raises(ValueError, match="have 2 readouts: set data"):
    jax.eval_shape(causal.apply, params, several)


@pytest.mark.parametrize(
  ("backend", "expected"), [("tpu", "pallas"), ("gpu", "dense")]
)
def test_attention_of_accelerators(monkeypatch, backend, expected):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  of = functools.partial(
    reward.make, vocab_size=50, safe_ids=SAFE, unsafe_ids=UNSAFE
  )

  assert of(_config())[0].attention == expected
  assert of(_config(attention="blocks"))[0].attention == "blocks"


def test_make_random_model():
  model, load = reward.make(
    _config(), vocab_size=50, safe_ids=SAFE, unsafe_ids=UNSAFE
  )

  params = load(jax.random.key(0))

  assert params["embed"]["embedding"].shape == (50, 16)
  assert model.dtype == "float32" and model.attention == "blocks"
  expected = jax.jit(model.init)(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  other = load(jax.random.key(1))["embed"]["embedding"]
  assert not np.array_equal(other, params["embed"]["embedding"])


def test_make_random_model_names_what_is_missing():
  with pytest.raises(ValueError, match="vocab_size"):
    reward.make(_config())
  with pytest.raises(ValueError, match="heads = 3"):
    config = _config()
    config.random.heads = 3
    reward.make(config, vocab_size=50)


def test_make_from_a_workdir(tmp_path):
  old, load = reward.make(
    _config(train_layers=1, lora_rank=2),
    vocab_size=50,
    safe_ids=SAFE,
    unsafe_ids=UNSAFE,
  )
  params = random_params(old)
  assert load(jax.random.key(0)).keys() == params.keys()
  (tmp_path / "model.json").write_text(json.dumps(reward.describe(old)))
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, params, {}, zero, zero, jnp.zeros(()))
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, 0, state)
  batch = rows.plain([[9, 8, 7, 1]])

  new, load = reward.make(_config(path=str(tmp_path)), safe_ids=SAFE)
  got = jax.jit(new.apply)(load(jax.random.key(0)), batch)

  assert new.train_layers == -1 and new.lora_rank == 0
  np.testing.assert_allclose(
    got, jax.jit(old.apply)(params, batch), rtol=1e-4, atol=1e-5
  )
  again = reward.from_description(reward.describe(old))
  np.testing.assert_allclose(
    jax.jit(again.apply)(params, batch), got, rtol=1e-4, atol=1e-5
  )


def test_incomplete_description_names_the_key():
  described = reward.describe(RewardModel(architecture()))
  del described["lora_alpha"]

  with pytest.raises(ValueError, match="'lora_alpha'"):
    reward.from_description(described)
