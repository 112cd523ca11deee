"""Supervised rows beside the policy gradient: the ptx loss of InstructGPT."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from csrm_jax.align import order
from csrm_jax.data import contract, prompt
from csrm_jax.data.tokenizer import Tokenizer


class Rows(NamedTuple):
  """Conversations whose last response is to be imitated."""

  tokens: Int[np.ndarray, "x l"]
  length: Int[np.ndarray, " x"]
  mask: Float[np.ndarray, "x l"]  # 1 on the response and its end of turn


def read(source: str, tokenizer: Tokenizer, *, room: int) -> Rows:
  """Reads JSON lines with "messages", the last one the assistant's.

  Rows longer than `room` are left out and counted on the screen.

  Args:
    source: the file, or several, joined by commas.
    tokenizer: of the policy.
    room: tokens of prompt and response.

  Raises:
    ValueError: file, line, field and remedy; or no row fits.
  """
  kept: list[tuple[list[int], int]] = []
  for path in map(Path, source.split(",")):
    longer = 0
    for number, raw in contract.raw_lines(path):
      where = f"{path}:{number}"
      row = contract.parse_line(raw, where)
      messages: Any = row.get("messages") if isinstance(row, dict) else None
      contract.check_messages(messages, "messages", where)
      ids, start = prompt.answered(tokenizer, messages)
      if len(ids) > room:
        longer += 1
      else:
        kept.append((ids, start))
    if longer:
      print(f"{path}: {longer} rows longer than {room} tokens were left out")
  if not kept:
    raise ValueError(
      f"{source}: no row of at most {room} tokens to imitate; raise"
      " align.prompt_length or align.response_length, or give shorter rows"
    )
  tokens = np.zeros((len(kept), room), np.int32)
  mask = np.zeros((len(kept), room), np.float32)
  for i, (ids, start) in enumerate(kept):
    tokens[i, : len(ids)] = ids
    mask[i, start : len(ids)] = 1.0
  return Rows(tokens, np.array([len(ids) for ids, _ in kept], np.int32), mask)


def batch(
  rows: Rows, *, seed: int, step: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(tokens, length, mask) of `count` rows: a pure function of its arguments.

  Every row comes once before any comes twice.
  """
  n = len(rows.length)
  chosen = order.turn(n, name="imitation", seed=seed, step=step, count=count)
  return rows.tokens[chosen], rows.length[chosen], rows.mask[chosen]
