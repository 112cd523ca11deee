"""Which rows a step takes: each once before any comes twice."""

import random


def turn(n: int, *, name: str, seed: int, step: int, count: int) -> list[int]:
  """Numbers of the `count` of `n` rows of a step.

  A pure function of its arguments; every pass has an order of its own.

  Args:
    n: rows there are.
    name: what the rows are, so that two uses do not share their orders.
    seed: of the run.
    step: from 0.
    count: rows of a step.
  """
  chosen: list[int] = []
  orders: dict[int, list[int]] = {}
  for i in range(step * count, (step + 1) * count):
    epoch, at = divmod(i, n)
    if epoch not in orders:
      order = list(range(n))
      random.Random(f"{name}/{seed}/{epoch}").shuffle(order)
      orders[epoch] = order
    chosen.append(orders[epoch][at])
  return chosen
