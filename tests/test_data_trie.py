import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from csrm_jax.data.trie import pack, real_tokens
from csrm_jax.types import Batch, Example, Pair, Segment
from tests import packing


def path_to(batch: Batch, row: int, at: int) -> list[int]:
  """Indices that token `at` of `row` sees, itself last."""
  return [j for j in range(at + 1) if batch.subtree_end[row, j] > at]


def restored(packed, examples):
  """Every (example, segment) found in the rows, read along its path."""
  found = {}
  for row, slots in enumerate(packed.where):
    for slot, (e, s) in enumerate(slots):
      path = path_to(packed.batch, row, packed.batch.readout[row, slot])
      assert list(packed.batch.positions[row, path]) == list(range(len(path)))
      tokens = tuple(int(t) for t in packed.batch.tokens[row, path])
      assert tokens == examples[e].segments[s].tokens
      found.setdefault((e, s), []).append((row, slot))
  return found


segments = st.lists(st.integers(1, 4), min_size=1, max_size=12).map(tuple)


@st.composite
def some_families(draw):
  made = []
  for i in range(draw(st.integers(1, 8))):
    parts = draw(st.lists(segments, min_size=1, max_size=5))
    labels = draw(
      st.lists(
        st.sampled_from([0.0, 1.0, float("nan")]),
        min_size=len(parts),
        max_size=len(parts),
      )
    )
    index = st.integers(0, len(parts) - 1)
    pairs = draw(st.lists(st.tuples(index, index), max_size=4))
    made.append(
      Example(
        str(i),
        tuple(Segment(*x) for x in zip(parts, labels, strict=True)),
        tuple(Pair(a, b, "resp") for a, b in pairs if a != b),
      )
    )
  return made


@settings(deadline=None, max_examples=60)
@given(some_families())
def test_every_segment_label_and_pair_is_packed_once(examples):
  packed = pack(examples, row_length=32, slots=4, pairs=3)
  found = restored(packed, examples)
  everything = {
    (e, s) for e, x in enumerate(examples) for s in range(len(x.segments))
  }
  assert set(found) == everything
  for (e, s), places in found.items():
    weights = [packed.batch.label_weight[p] for p in places]
    labelled = not np.isnan(examples[e].segments[s].label)
    assert sum(weights) == (1.0 if labelled else 0.0)
  pairs = sum(len(x.pairs) for x in examples)
  assert packed.batch.pair_weight.sum() == pairs
  real = int(real_tokens(packed.batch).sum())
  single = sum(
    1
    for row in packed.batch.positions
    for i in range(31)
    if row[i] == 0 and row[i + 1] == 0
  )
  assert real <= packed.counts["tokens_in_tries"] <= real + single + 1
  size = packed.batch.tokens.size
  assert packed.counts["padding"] == size - packed.counts["tokens_in_tries"]


def test_shared_prefix_is_stored_once():
  prompt = (1, 2, 3, 4, 5)
  two = Example("a", (Segment((*prompt, 6)), Segment((*prompt, 7, 8))))
  other = Example("b", (Segment((1, 2, 9)),))
  packed = pack([two, other], row_length=16, slots=4, pairs=1)
  assert packed.batch.tokens.shape == (1, 16)
  assert packed.counts["tokens_in_tries"] == 9
  assert packed.counts["tokens_alone"] == 16


def test_padding_sees_itself_alone():
  batch = pack(
    [Example("a", (Segment((1, 2)),))], row_length=6, slots=2, pairs=1
  ).batch
  assert list(batch.subtree_end[0]) == [2, 2, 3, 4, 5, 6]
  assert batch.label_weight.sum() == batch.pair_weight.sum() == 0


def test_large_family_is_split_by_pairs_and_counted():
  prompt = tuple(range(1, 11))
  parts = tuple(Segment((*prompt, 20 + i, 40 + i), 1.0) for i in range(6))
  pairs = tuple(Pair(i, i + 1, "resp") for i in range(0, 6, 2))
  packed = pack([Example("a", parts, pairs)], row_length=14, slots=4, pairs=2)
  assert packed.batch.tokens.shape[0] == 3
  assert packed.counts["split_families"] == 1
  assert packed.counts["repeated_prefix_tokens"] == 2 * len(prompt)
  assert packed.batch.label_weight.sum() == 6


@pytest.mark.parametrize("pairs", [(), (Pair(0, 1, "resp"),)])
def test_longer_than_a_row_is_an_error_with_the_remedy(pairs):
  long = 9 if not pairs else 6
  parts = (Segment((1,) * long), Segment((2,) * long))
  with pytest.raises(ValueError, match=r"family 'a'.*data.row_length"):
    pack([Example("a", parts, pairs)], row_length=8, slots=4, pairs=2)


def test_packed_equals_alone():
  """Scores and gradients in a trie are those of separate sequences."""
  examples = packing.families(number=8)
  model, load = packing.tiny_model()
  params = load(jax.random.key(0))
  head = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
  params["head"]["kernel"] = head
  together = pack(examples, row_length=96, slots=12, pairs=8)
  alone = pack(
    [Example("", (s,)) for x in examples for s in x.segments],
    row_length=96,
    slots=12,
    pairs=1,
  )
  single = []
  for x in examples:
    for s in x.segments:
      one = pack([Example("", (s,))], row_length=32, slots=1, pairs=1)
      single.append(one.batch)
  single = Batch(*(np.concatenate(leaf) for leaf in zip(*single, strict=True)))

  @jax.jit
  def scored(params, batch, used):
    """The gradient of a sum of functions of all scores; the scores."""

    def total(params):
      z = model.apply(params, batch)
      return jnp.sum(jnp.sin(z) * used[..., None]), z

    return jax.grad(total, has_aux=True)(params)

  def used(packed):
    mask = np.zeros(packed.batch.readout.shape, np.float32)
    for row, slots in enumerate(packed.where):
      mask[row, : len(slots)] = 1
    return mask

  expected, z = scored(params, single, np.ones((16, 1), np.float32))
  z = np.asarray(z)[:, 0]
  for packed in (together, alone):
    gradient, found = scored(params, packed.batch, used(packed))
    found = np.asarray(found)
    for row, slots in enumerate(packed.where):
      for slot, (e, s) in enumerate(slots):
        index = 2 * e + s if packed is together else e
        np.testing.assert_allclose(found[row, slot], z[index], atol=1e-5)
    for a, b in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_neighbour_gradient_is_zero():
  """No score depends on a token outside its own path, not even slightly."""
  examples = packing.families(number=6)
  packed = pack(examples, row_length=128, slots=12, pairs=8)
  model, load = packing.tiny_model()
  params = load(jax.random.key(0))
  head = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
  params["head"]["kernel"] = head
  batch = jax.tree.map(jnp.asarray, packed.batch)
  # One embedding row per token of the row, so that gradients tell them apart.
  length = batch.tokens.shape[1]
  table = params["embed"]["embedding"][batch.tokens[0]]
  batch = batch._replace(tokens=jnp.arange(length)[None])

  @jax.jit
  def slope(table, slot):
    def z(table):
      own = params | {"embed": {"embedding": table}}
      return model.apply(own, batch)[0, slot, 0]

    return jax.grad(z)(table)

  for slot in range(len(packed.where[0])):
    gradient = np.abs(slope(table, slot)).sum(-1)
    path = path_to(packed.batch, 0, packed.batch.readout[0, slot])
    outside = np.setdiff1d(np.arange(length), path)
    assert (gradient[outside] == 0).all()
    assert (gradient[path] > 0).all()
