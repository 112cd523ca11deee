import collections
import pickle
import tempfile

import hypothesis.strategies as st
from hypothesis import given, settings

from csrm_jax.data import spill


@settings(max_examples=30)
@given(
  st.lists(st.tuples(st.integers(0, 50), st.integers(), st.binary())),
  st.integers(0, 2000),
)
def test_sorter_gives_every_item_in_order_whatever_fits(items, memory):
  with tempfile.TemporaryDirectory() as folder:
    sorter = spill.Sorter(folder, memory=memory)
    for item in items:
      sorter.add(item, len(item[2]))
    assert list(sorter) == sorted(items)
    sorter.add((25, 0, b"late"))
    assert list(sorter) == sorted([*items, (25, 0, b"late")])


def test_more_runs_than_are_open_at_once(tmp_path):
  sorter = spill.Sorter(tmp_path, memory=0)
  items = [(i * 7919 % 1000, {"no": "order"}) for i in range(1000)]
  for item in items:
    sorter.add(item)
  assert len(sorter.runs) == 1000
  assert list(sorter) == sorted(items, key=lambda item: item[0])
  assert len(sorter.runs) <= 64
  assert len(list(tmp_path.iterdir())) == len(sorter.runs)
  assert [item for item, _ in sorter] == list(range(1000))


def test_pickles_come_back_in_order(tmp_path):
  path = tmp_path / "file"
  with path.open("wb") as out:
    for item in ("a", 2, None):
      pickle.dump(item, out)
  assert list(spill.pickles(path)) == ["a", 2, None]


def test_buckets_are_ranges_of_even_size():
  places = [spill.place(f"family {i}") for i in range(4000)]
  for number in (1, 2, 7):
    found = collections.Counter(spill.bucket(at, number) for at in places)
    assert set(found) == set(range(number))
    assert min(found.values()) > 0.8 * 4000 / number
    ordered = [spill.bucket(at, number) for at in sorted(places)]
    assert ordered == sorted(ordered)
  assert spill.bucket(0, 5) == 0 and spill.bucket(2**64 - 1, 5) == 4
