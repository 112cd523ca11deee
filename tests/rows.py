"""Plain rows that tests share: one sequence a row, padded, nothing packed."""

from collections.abc import Sequence

import numpy as np

from csrm_jax.types import Batch


def plain(sequences: Sequence[Sequence[int]], *, padding: int = 0) -> Batch:
  """A row per sequence, read at its last token; `padding` tokens behind."""
  rows, length = len(sequences), max(map(len, sequences)) + padding
  tokens = np.zeros((rows, length), np.int32)
  subtree_end = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
  positions = np.zeros((rows, length), np.int32)
  for row, ids in enumerate(sequences):
    tokens[row, : len(ids)] = ids
    positions[row, : len(ids)] = np.arange(len(ids))
    subtree_end[row, : len(ids)] = len(ids)
  ends = np.array([[len(ids) - 1] for ids in sequences], np.int32)
  slot, pair = np.zeros((rows, 1), np.float32), np.zeros((rows, 0), np.int32)
  return Batch(
    tokens=tokens,
    positions=positions,
    subtree_end=subtree_end,
    readout=ends,
    label=slot,
    label_weight=slot,
    pair=np.zeros((rows, 0, 2), np.int32),
    pair_kind=pair,
    pair_weight=pair.astype(np.float32),
    pair_margin=pair.astype(np.float32),
  )
