import os

import pytest

from csrm_jax.data import workers


def told(shared, item):
  if item in shared:
    raise ValueError(f"item {item}")
  return item, os.getpid()


def items(number, fails_at=None):
  for i in range(number):
    if i == fails_at:
      raise ValueError("the items")
    yield i


def test_results_come_in_order_from_other_processes():
  with workers.Workers((), 2) as pool:
    found = list(pool.map(told, items(40), 3))
    assert [i for i, _ in found] == list(range(40))
    assert os.getpid() not in {pid for _, pid in found}
    # Started once, they serve the next function too.
    assert pool.executor is not None
    first = pool.executor
    assert [i for i, _ in pool.map(told, items(9), 3)] == list(range(9))
    assert pool.executor is first


@pytest.mark.parametrize("number, few", [(2, 40), (1, 3)])
def test_little_work_starts_no_process(number, few):
  with workers.Workers((), number) as pool:
    found = list(pool.map(told, items(40), few))
    assert found == [(i, os.getpid()) for i in range(40)]
    assert pool.executor is None


@pytest.mark.parametrize("number, few", [(2, 0), (2, 40), (1, 0)])
def test_the_first_failure_in_order_is_raised(number, few):
  with workers.Workers((12, 20), number) as pool:
    seen = []
    with pytest.raises(ValueError, match="item 12"):
      for item, _ in pool.map(told, items(30, fails_at=14), few):
        seen.append(item)
    assert seen == list(range(12))
  with workers.Workers((20,), number) as pool:
    seen = []
    with pytest.raises(ValueError, match="the items"):
      for item, _ in pool.map(told, items(30, fails_at=14), few):
        seen.append(item)
    assert seen == list(range(14))


def test_number_of_workers():
  assert workers.number_of(0) == len(os.sched_getaffinity(0))
  assert workers.number_of(3) == 3
  with pytest.raises(ValueError, match="workers=-1: give the number"):
    workers.number_of(-1)
