"""Prompts to sampled responses, in batches of one shape."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from csrm_jax import sharding
from csrm_jax.data import prompt
from csrm_jax.data.template import Message
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.model import decode
from csrm_jax.model.reward import RewardModel
from csrm_jax.spec import Spec
from csrm_jax.types import Params

ON_LONG = ("error", "cut")


class Rollouts(NamedTuple):
  """Sampled responses, `samples` after each other for each prompt.

  Attributes:
    tokens: prompt, response, padding.
    prompt_length: tokens.
    length: of prompt and response, the stop token included; tokens.
    mask: 1.0 on the tokens of the response, its stop token included.
    texts: the responses, without the stop token.
    messages: the conversation as given, and the response behind it: what a
      judge reads. A policy's spec is not among them.
    stopped: whether the response ended in a stop token, not in want of room.
    prompt: index of the prompt.
    cut: what went of the prompts, see `template.fit_to`; each prompt once.
  """

  tokens: Int[np.ndarray, "n l"]
  prompt_length: Int[np.ndarray, " n"]
  length: Int[np.ndarray, " n"]
  mask: Float[np.ndarray, "n l"]
  texts: list[str]
  messages: list[list[Message]]
  stopped: Bool[np.ndarray, " n"]
  prompt: Int[np.ndarray, " n"]
  cut: dict[str, int]


def sample(
  model: RewardModel,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[Message]],
  *,
  key: jax.Array,
  samples: int = 1,
  prompt_length: int,
  response_length: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  spec: Spec | str | None = None,
  rows: int = 8,
  on_long: str = "error",
  mesh: Mesh | None = None,
) -> Rollouts:
  """Samples responses of a policy; one compilation for all calls of a shape.

  Sample `j` of prompt `i` has the key `fold_in(key, i * samples + j)`: it does
  not depend on `rows` nor on the other prompts.

  Args:
    model: the policy, with an output embedding.
    params: of the policy.
    tokenizer: of the policy; its style chooses the chat format, see
      `data.prompt`.
    prompts: conversations whose last message is to be answered.
    key: of this call.
    samples: responses to each prompt.
    prompt_length: room for a prompt, tokens.
    response_length: room for a response, tokens.
    temperature: see `decode.choose`; 0 is greedy.
    top_p: see `decode.choose`.
    spec: goes into the system turn; None: no policy.
    rows: of a batch; a multiple of replica x fsdp on a mesh.
    on_long: "error" refuses a prompt that is too long; "cut" cuts it by the
      rule of `template.fit_to` and counts that.
    mesh: of the parameters; None: they lie on one device.

  Raises:
    ValueError: options out of range; or names the prompt that is malformed or
      too long.
  """
  if on_long not in ON_LONG:
    raise ValueError(f"on_long {on_long!r}: use one of {ON_LONG}")
  if samples < 1 or rows < 1 or not prompts:
    raise ValueError(
      f"{len(prompts)} prompts, samples = {samples}, rows = {rows}: use 1 or"
      " more of each"
    )
  if mesh is not None:
    sharding.check_rows(rows, 1, mesh)
  asked, lengths, cut = encode(
    tokenizer, prompts, spec=spec, room=prompt_length, on_long=on_long
  )
  run = _compiled(
    model, response_length, float(temperature), float(top_p),
    prompt.stop_ids(tokenizer), mesh,
  )  # fmt: skip
  ids = np.arange(len(prompts) * samples)
  batches = [
    _batch(run, params, asked, lengths, key, some, samples, rows, mesh)
    for some in (ids[i : i + rows] for i in range(0, len(ids), rows))
  ]
  tokens, length, stopped = map(np.concatenate, zip(*batches, strict=True))
  which = (ids // samples).astype(np.int32)
  starts = lengths[which]
  index = np.arange(tokens.shape[1])
  mask = (index >= starts[:, None]) & (index < length[:, None])
  ends = length - stopped  # without the stop token
  texts = [
    tokenizer.decode(row[start:end].tolist())
    for row, start, end in zip(tokens, starts, ends, strict=True)
  ]
  return Rollouts(
    tokens=tokens,
    prompt_length=starts,
    length=length,
    mask=mask.astype(np.float32),
    texts=texts,
    messages=[
      [*prompts[i], {"role": "assistant", "content": text}]
      for i, text in zip(which.tolist(), texts, strict=True)
    ],
    stopped=stopped,
    prompt=which,
    cut=cut,
  )


def encode(
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[Message]],
  *,
  spec: Spec | str | None,
  room: int,
  on_long: str,
) -> tuple[Int[np.ndarray, "n p"], Int[np.ndarray, " n"], dict[str, int]]:
  """Prompts as padded rows of `room` tokens, their lengths, what was cut.

  Raises:
    ValueError: names the prompt that is malformed or too long.
  """
  spec = None if spec is None else Spec.parse(spec)
  tokens = np.zeros((len(prompts), room), np.int32)
  lengths = np.zeros(len(prompts), np.int32)
  total = {"messages": 0, "shortened": 0, "rules": 0}
  for i, messages in enumerate(prompts):
    try:
      if on_long == "cut":
        ids, cut = prompt.fit_to(tokenizer, messages, spec, room)
        total = {name: total[name] + cut[name] for name in total}
      else:
        text = None if spec is None else spec.render()
        ids = prompt.encode(tokenizer, messages, text)
    except ValueError as error:
      raise ValueError(f"prompt {i}: {error}") from error
    if len(ids) > room:
      raise ValueError(
        f"prompt {i}: {len(ids)} tokens, prompt_length = {room}; raise"
        " prompt_length, leave the prompt out, or cut it (on_long = 'cut')"
      )
    tokens[i, : len(ids)], lengths[i] = ids, len(ids)
  return tokens, lengths, total


def _batch(
  run: Callable[..., decode.Generated],
  params: Params,
  asked: np.ndarray,
  lengths: np.ndarray,
  key: jax.Array,
  ids: np.ndarray,
  samples: int,
  rows: int,
  mesh: Mesh | None,
) -> tuple[np.ndarray, ...]:
  """Tokens, length, stopped of some samples, by their ids."""
  # The last one is repeated, key and all: it stops when the first of it does.
  filled = np.minimum(np.arange(ids[0], ids[0] + rows), ids[-1])
  which = filled // samples
  inputs = (asked[which], lengths[which], decode.row_keys(key, filled))
  if mesh is not None:
    inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
  return tuple(np.asarray(x)[: len(ids)] for x in run(params, *inputs))


@functools.lru_cache(maxsize=32)
def _compiled(
  model: RewardModel,
  max_new: int,
  temperature: float,
  top_p: float,
  stop_ids: tuple[int, ...],
  mesh: Mesh | None,
) -> Callable[..., decode.Generated]:
  """`decode.generate` under jit, on a mesh if there is one."""
  generate = functools.partial(
    decode.generate,
    model,
    max_new=max_new,
    temperature=temperature,
    top_p=top_p,
    stop_ids=stop_ids,
  )

  def call(
    params: Params,
    prompts: Int[Array, "n p"],
    lengths: Int[Array, " n"],
    keys: Key[Array, " n"],
  ) -> decode.Generated:
    if mesh is None:
      return generate(params, prompts, lengths, keys)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return generate(params, prompts, lengths, keys)

  return jax.jit(call)
