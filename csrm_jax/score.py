"""Spec + conversations to numbers: the one place where a model judges.

Sequences that begin alike (one spec, one conversation judged turn by turn) are
packed into token tries, so what they share is computed once.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from csrm_jax import CallableModule
from csrm_jax.data import template
from csrm_jax.data.trie import pack
from csrm_jax.judge import Judge
from csrm_jax.model.reward import RewardModel
from csrm_jax.spec import Spec
from csrm_jax.types import Batch, Example, Segment

Messages = Sequence[template.Message]

# Row lengths that get compiled; a power of two beyond that. Rows longer than
# they need be waste attention, shorter ones share less.
_ROW_LENGTHS = (128, 256, 512, 1024)
_CHUNK = 8192  # sequences packed together; bounds memory


class Score(NamedTuple):
  """What a judge says about one conversation.

  Attributes:
    log_odds: that the response complies with the spec, temperature included.
    p_comply: sigmoid of `log_odds`.
    verdict: "comply" if p_comply >= 0.5, else "violate".
    truncated: whether something was cut to fit; see `template.fit_to`.
    spec_fingerprint: of the spec as given, before any cut.
    model_fingerprint: of the judge.
    helpfulness: readout of the helpfulness head, or None if not asked for.
    calibrated: False for a verdict over several turns: the minimum of
      calibrated numbers is not calibrated.
    turn: which message was judged; of several, the worst.
  """

  log_odds: float
  p_comply: float
  verdict: str
  truncated: bool
  spec_fingerprint: str
  model_fingerprint: str
  helpfulness: float | None
  calibrated: bool
  turn: int


class Item(NamedTuple):
  """A row as the model will read it.

  Attributes:
    sequences: ids, one for each judged turn.
    turns: index of the judged message, for each sequence.
    helpfulness: ids of the spec-free form, or None if not asked for.
    cut: how much went, see `template.fit_to`, over all sequences.
    spec_fingerprint: of the spec before any cut.
  """

  sequences: tuple[tuple[int, ...], ...]
  turns: tuple[int, ...]
  helpfulness: tuple[int, ...] | None
  cut: dict[str, int]
  spec_fingerprint: str


def score(
  judge: Judge, spec: Spec | str, conversations: Sequence[Messages]
) -> list[Score]:
  """Scores the last response of each conversation under one spec.

  Raises:
    ValueError: an empty spec or a malformed conversation, by its index.
  """
  spec = Spec.parse(spec)
  rows = [
    {"id": f"conversation {i}", "messages": messages, "spec": spec}
    for i, messages in enumerate(conversations)
  ]
  return score_rows(judge, rows)


def score_rows(
  judge: Judge,
  rows: Sequence[Mapping[str, Any]],
  *,
  turns: str = "last",
  max_tokens: int = 0,
  helpfulness: bool = False,
  progress: bool = False,
) -> list[Score]:
  """Scores rows of the data contract ("messages" and "spec"), in their order.

  Args:
    judge: of `judge.load`.
    rows: a label is not needed and not looked at.
    turns: "last" judges the last response; "any" every response of the
      assistant, each with what precedes it, and keeps the lowest score.
    max_tokens: longest sequence; 0: the backbone's context.
    helpfulness: also reads the helpfulness head, without any spec.
    progress: whether to show a bar.

  Raises:
    ValueError: the judge cannot do that, or names the bad row: no spec, an
      empty one, a malformed conversation, or a response too long to fit.
  """
  check_options(
    judge, turns=turns, max_tokens=max_tokens, helpfulness=helpfulness
  )
  items = []
  for row in rows:
    try:
      items.append(
        encode_row(
          judge,
          row,
          turns=turns,
          max_tokens=max_tokens,
          helpfulness=helpfulness,
        )
      )
    except ValueError as error:
      raise ValueError(f"row {row.get('id')!r}: {error}") from error
  return score_items(judge, items, progress=progress)


def check_options(
  judge: Judge, *, turns: str, max_tokens: int, helpfulness: bool
) -> None:
  """Refuses what this judge cannot do, whatever the row.

  Raises:
    ValueError: names the option.
  """
  if turns not in ("last", "any"):
    raise ValueError(f"turns {turns!r}; use 'last' or 'any'")
  if judge.head != "compliance":
    raise ValueError(
      f"{judge.path} is an export of the helpfulness head, which reads no spec;"
      " score with the workdir, or with an export of the compliance head"
    )
  if helpfulness:
    check_helpfulness(judge)
  if not 0 <= max_tokens <= judge.context:
    raise ValueError(
      f"max_tokens = {max_tokens}; use 1 to {judge.context} tokens (the context"
      " of the backbone), or 0 for all of it"
    )


def check_helpfulness(judge: Judge) -> None:
  """Refuses a judge that cannot tell how helpful a response is.

  Raises:
    ValueError: names the judge.
  """
  if not judge.has_helpfulness:
    raise ValueError(
      f"{judge.path} has no trained helpfulness head; train on pairs of kind"
      " 'help', or leave --helpfulness out"
    )


def encode_row(
  judge: Judge,
  row: Mapping[str, Any],
  *,
  turns: str = "last",
  max_tokens: int = 0,
  helpfulness: bool = False,
) -> Item:
  """The sequences that decide a row's score; arguments as in `score_rows`.

  Raises:
    ValueError: no spec, a malformed conversation, or a response too long.
  """
  limit = max_tokens or judge.context
  if row.get("spec") is None:
    raise ValueError("field 'spec': missing; add the spec to judge by")
  messages, spec = row["messages"], Spec.parse(row["spec"])
  judged = [len(messages) - 1]
  if turns == "any":
    judged = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  fitted = [
    template.fit_to(judge.tokenizer, messages[: i + 1], spec, limit)
    for i in judged
  ]
  free = None
  if helpfulness:
    free = template.fit_to(judge.tokenizer, messages, None, limit)
  cuts = [cut for _, cut in [*fitted, *([free] if free else [])]]
  return Item(
    sequences=tuple(tuple(ids) for ids, _ in fitted),
    turns=tuple(judged),
    helpfulness=tuple(free[0]) if free else None,
    cut={name: sum(cut[name] for cut in cuts) for name in cuts[0]},
    spec_fingerprint=spec.fingerprint(),
  )


def score_items(
  judge: Judge, items: Sequence[Item], *, progress: bool = False
) -> list[Score]:
  """Scores encoded rows, in their order."""
  sequences = [s for item in items for s in item.sequences]
  sequences += [item.helpfulness for item in items if item.helpfulness]
  read = dict(
    zip(
      sequences,
      readouts(judge, sequences, progress=progress).tolist(),
      strict=True,
    )
  )
  return [_score(judge, item, read) for item in items]


def _score(judge: Judge, item: Item, read: Mapping[Any, list[float]]) -> Score:
  scores = [read[ids][0] / judge.temperature for ids in item.sequences]
  worst = int(np.argmin(scores))
  log_odds = scores[worst]
  p_comply = float(np.exp(-np.logaddexp(0.0, -log_odds)))
  return Score(
    log_odds=log_odds,
    p_comply=p_comply,
    verdict="comply" if p_comply >= 0.5 else "violate",
    truncated=any(item.cut.values()),
    spec_fingerprint=item.spec_fingerprint,
    model_fingerprint=judge.fingerprint,
    helpfulness=read[item.helpfulness][1] if item.helpfulness else None,
    calibrated=len(scores) == 1,
    turn=item.turns[worst],
  )


def readouts(
  judge: Judge,
  sequences: Sequence[tuple[int, ...]],
  *,
  progress: bool = False,
) -> Float[np.ndarray, "n 2"]:
  """Both heads at the end of each sequence, before any temperature."""
  unique = sorted(set(sequences))  # neighbours share most
  at = {ids: i for i, ids in enumerate(unique)}
  values = np.zeros((len(unique), 2), np.float32)
  total = sum(map(len, unique))
  with tqdm(
    total=total, desc="score", unit="token", disable=not progress
  ) as bar:
    for first in range(0, len(unique), _CHUNK):
      chunk = unique[first : first + _CHUNK]
      for number, value in _read_chunk(judge, chunk, bar):
        values[first + number] = value
  return values[[at[ids] for ids in sequences]]


def _read_chunk(
  judge: Judge, sequences: Sequence[tuple[int, ...]], bar: Any
) -> Iterator[tuple[int, Float[np.ndarray, " 2"]]]:
  """(index, readouts) of each sequence, in packing order."""
  length = _row_length(sequences)
  examples = [
    Example(str(i), (Segment(ids),)) for i, ids in enumerate(sequences)
  ]
  packed = pack(
    examples, row_length=length, slots=max(8, length // 16), pairs=1
  )
  # One row a call keeps a CPU busy and wastes nothing on filling a batch up.
  rows = 1 if jax.default_backend() == "cpu" else 8
  for first in range(0, len(packed.where), rows):
    batch = _rows(packed.batch, first, rows)
    values = np.asarray(_compiled(judge.model)(judge.params, batch))
    where = packed.where[first : first + rows]
    for row, slots in enumerate(where):
      for slot, (example, _) in enumerate(slots):
        yield example, values[row, slot]
        bar.update(len(sequences[example]))


@functools.lru_cache(maxsize=8)
def _compiled(model: RewardModel) -> Callable[..., jax.Array]:
  return jax.jit(model.apply)  # one cache for all judges of a shape


def _row_length(sequences: Sequence[tuple[int, ...]]) -> int:
  longest = max(map(len, sequences))
  wanted = max(longest, min(sum(map(len, sequences)), _ROW_LENGTHS[-1]))
  for length in _ROW_LENGTHS:
    if wanted <= length:
      return length
  return 1 << (wanted - 1).bit_length()


def _rows(batch: Batch, first: int, count: int) -> Batch:
  """Rows first to first + count; past the end the last row is repeated."""
  last = batch.tokens.shape[0] - 1
  index = np.minimum(np.arange(first, first + count), last)
  return Batch(*(leaf[index] for leaf in batch))


sys.modules[__name__].__class__ = CallableModule  # `csrm.score(...)`
