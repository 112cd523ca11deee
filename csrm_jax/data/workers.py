"""One function over many pieces of work, in processes of their own."""

import collections
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

_AHEAD = 3  # pieces under way for each worker

# What the functions of a worker process share (a tokenizer is large): set once
# when the process starts.
_shared: list[Any] = []


def number_of(workers: int) -> int:
  """Processes meant by `data.workers`: 0 stands for every core we may use.

  Raises:
    ValueError: it is negative.
  """
  if workers < 0:
    raise ValueError(
      f"--config.data.workers={workers}: give the number of processes, or 0 "
      "for all cores"
    )
  return workers or len(os.sched_getaffinity(0))


class Workers:
  """Processes that start with the first work that is worth it.

  They are spawned, not forked: this process may hold threads of JAX.
  """

  def __init__(self, shared: Any, number: int) -> None:
    """Args: shared: first argument of every function; number: of processes."""
    self.shared = shared
    self.number = number
    self.executor: ProcessPoolExecutor | None = None

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *_: object) -> None:
    if self.executor is not None:
      self.executor.shutdown(cancel_futures=True)

  def map(
    self, function: Callable[[Any, Any], Any], items: Iterable[Any], few: int
  ) -> Iterator[Any]:
    """`function(shared, item)` of each item, in their order.

    Up to `few` items are done in this process. The first failure in the order
    of the items is raised, be it of the function or of the items themselves.
    """
    items = iter(items)
    first, failed = [], None
    try:
      for item in itertools.islice(items, few + 1):
        first.append(item)
    except Exception as error:
      failed = error
    if failed or len(first) <= few or self.number == 1:
      for item in first:
        yield function(self.shared, item)
      if failed:
        raise failed
      for item in items:
        yield function(self.shared, item)
      return
    if self.executor is None:
      self.executor = ProcessPoolExecutor(
        self.number,
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(self.shared,),
      )
    ahead: collections.deque[Future[Any]] = collections.deque()
    items = itertools.chain(first, items)
    first = []
    while True:
      try:
        item = next(items)
      except StopIteration:
        break
      except Exception as error:
        failed = error
        break
      ahead.append(self.executor.submit(_call, function, item))
      if len(ahead) > _AHEAD * self.number:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()
    if failed:
      raise failed


def _start(shared: Any) -> None:
  _shared.append(shared)


def _call(function: Callable[[Any, Any], Any], item: Any) -> Any:
  return function(_shared[0], item)
