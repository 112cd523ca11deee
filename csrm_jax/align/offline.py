"""Training a policy on given pairs: DPO and IPO on rows of the data contract.

A row's spec stands in the policy's system turn, so that one policy learns what
each spec asks for (spec-conditional DPO).
"""

import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from csrm_jax import sharding, storage
from csrm_jax.align import descent, order, pairwise
from csrm_jax.align.pairwise import Pairs
from csrm_jax.align.setup import Setup
from csrm_jax.data import contract, prompt
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.spec import Spec
from csrm_jax.types import TrainState

LEFT_OUT = "left_out.jsonl"
DESCRIPTION = "pairs.json"


class Rows(NamedTuple):
  """Pairs as token ids, the chosen response first.

  Attributes:
    tokens: prompt, response, padding.
    start: where the response begins.
    length: tokens of prompt and response.
    weight: of each pair.
  """

  tokens: Int[np.ndarray, "n 2 l"]
  start: Int[np.ndarray, "n 2"]
  length: Int[np.ndarray, "n 2"]
  weight: Float[np.ndarray, " n"]

  def fingerprint(self) -> str:
    """Hash of all that decides a batch."""
    digest = hashlib.sha256()
    for array in self:
      digest.update(f"{array.dtype.name} {array.shape}\n".encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return "sha256:" + digest.hexdigest()


def read(
  source: str,
  tokenizer: Tokenizer,
  *,
  room: int,
  on_bad_row: str = "stop",
) -> tuple[Rows, list[dict[str, Any]]]:
  """Reads the pair rows of a JSON-lines file; their margins have no use here.

  Args:
    source: the file, plain or .gz.
    tokenizer: of the policy.
    room: tokens of prompt and response; rows with a longer side are put aside.
    on_bad_row: see `contract.read_rows`.

  Returns:
    (rows, what was put aside as {"id" or "line", "reason"}).

  Raises:
    ValueError: file, line, field and remedy; or no row is left.
  """
  path = Path(source)
  if not source or not path.is_file():
    raise ValueError(
      f"--config.align.pairs={source!r}: no such file; give JSON lines of pair"
      " rows (docs/data.md)"
    )
  bad: list[dict[str, Any]] = []
  aside: list[dict[str, Any]] = []
  kept: list[tuple[list[tuple[list[int], int]], float]] = []
  found = contract.read_rows(
    path,
    on_bad_row=on_bad_row,
    quarantine=bad,
    kinds=("pair",),
    need_spec=False,
  )
  for row in found:
    reason, sides = _encoded(row, tokenizer, room)
    if reason:
      aside.append({"id": row["id"], "reason": reason})
    else:
      kept.append((sides, float(row.get("weight", 1.0))))
  aside += [{"line": b["line"], "reason": b["reason"]} for b in bad]
  if not kept:
    raise ValueError(
      f"{path}: no pair of at most {room} tokens a side ({len(aside)} put"
      " aside); raise align.prompt_length or align.response_length, or give"
      " other rows"
    )
  tokens = np.zeros((len(kept), 2, room), np.int32)
  start = np.zeros((len(kept), 2), np.int32)
  length = np.zeros((len(kept), 2), np.int32)
  for i, (sides, _) in enumerate(kept):
    for j, (ids, before) in enumerate(sides):
      tokens[i, j, : len(ids)] = ids
      start[i, j], length[i, j] = before, len(ids)
  weight = np.array([w for _, w in kept], np.float32)
  return Rows(tokens, start, length, weight), aside


def _encoded(
  row: contract.Row, tokenizer: Tokenizer, room: int
) -> tuple[str, list[tuple[list[int], int]]]:
  """(why the row is put aside, or ""; ids and start of both responses)."""
  spec = Spec.parse(row["spec"]).render() if "spec" in row else None
  sides: list[tuple[list[int], int]] = []
  for side in ("chosen", "rejected"):
    before = [*row["prompt"], *row[side][:-1]]
    if not before or before[-1]["role"] == "assistant":
      return f"{side}: no message to answer before the response", []
    ids, start = prompt.answered(tokenizer, [*before, row[side][-1]], spec)
    if len(ids) > room:
      return f"{side}: {len(ids)} tokens, room for {room}", []
    sides.append((ids, start))
  return "", sides


def batch(rows: Rows, *, seed: int, step: int, count: int) -> Pairs:
  """The pairs of a step: a pure function of its arguments."""
  n = len(rows.weight)
  chosen = order.turn(n, name="pairs", seed=seed, step=step, count=count)
  start, length = rows.start[chosen], rows.length[chosen]
  index = np.arange(rows.tokens.shape[2])
  mask = (index >= start[..., None]) & (index < length[..., None])
  return Pairs(
    tokens=jnp.asarray(rows.tokens[chosen]),
    length=jnp.asarray(length),
    mask=jnp.asarray(mask, jnp.float32),
    weight=jnp.asarray(rows.weight[chosen]),
  )


def prepare(setup: Setup, optimizers: Any, state: TrainState) -> Any:
  """Reads the pairs; returns the step of the loop in `run.py`.

  Raises:
    ValueError: the file is wrong, or it is not the one the run began with.
  """
  config, align = setup.config, setup.config.align
  rows, aside = read(
    align.pairs,
    setup.tokenizer,
    room=align.prompt_length + align.response_length,
    on_bad_row=config.data.on_bad_row,
  )
  _describe(setup, rows, aside, begun=int(state.step) > 0)
  shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  update = descent.compile_update(
    functools.partial(
      pairwise.update,
      agent=setup.agent,
      optimizers=optimizers,
      method=align.method,
      beta=align.beta,
      label_smoothing=align.label_smoothing,
    ),
    shape,
    setup.frozen,
    setup.mesh,
  )
  take = functools.partial(
    batch, rows, seed=config.seed, count=align.pairs_per_step
  )
  spread = sharding.batch_sharding(setup.mesh)

  def advance(state: TrainState, k: int) -> tuple[TrainState, dict[str, float]]:
    began = time.perf_counter()
    pairs = jax.device_put(take(step=k), spread)
    state, measured = update(state, setup.frozen, pairs)
    line = {name: float(x) for name, x in measured.items()}
    line["seconds_update"] = time.perf_counter() - began
    return state, line

  return advance


def _describe(
  setup: Setup, rows: Rows, aside: list[dict[str, Any]], *, begun: bool
) -> None:
  """pairs.json and left_out.jsonl; refuses to go on with other pairs."""
  place = setup.workdir / DESCRIPTION
  source = setup.config.align.pairs
  found = {
    "source": source,
    "pairs": len(rows.weight),
    "left_out": len(aside),
    "fingerprint": rows.fingerprint(),
  }
  if begun and place.is_file():
    before = storage.read_json(place, remedy="name a new --workdir")
    if before["fingerprint"] != found["fingerprint"]:
      raise ValueError(
        f"{setup.workdir}: began with pairs of fingerprint"
        f" {before['fingerprint']}, {source} now gives {found['fingerprint']};"
        " bring back what changed, or name a new --workdir"
      )
  text = "".join(json.dumps(line) + "\n" for line in aside)
  storage.write_text(setup.workdir / LEFT_OUT, text)
  storage.write_json(place, found)
  where = f", named in {setup.workdir / LEFT_OUT}" if aside else ""
  print(f"{source}: {len(rows.weight)} pairs, {len(aside)} left out{where}")
