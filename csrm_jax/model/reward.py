"""The reward model: a backbone whose cue token is read as log-odds.

Column 0 of the readouts is the compliance score `z` (log-odds that the last
response complies with the spec), column 1 the helpfulness `h`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from csrm_jax import checkpoint, sharding
from csrm_jax.config import Config
from csrm_jax.model import lora, pretrained, sizes
from csrm_jax.model.attention import KINDS
from csrm_jax.model.backbone import (
  REMAT,
  Architecture,
  init_stack,
  mixed_logits,
  normals,
  rms_norm,
  run_stack,
)
from csrm_jax.model.names import flatten, unflatten
from csrm_jax.types import Batch, Indices, Params

HEADS = ("linear", "verbaliser")
DTYPES = ("float32", "bfloat16", "mixed")
LoadParams = Callable[..., Params]


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """Pure functions of parameters; holds only static choices.

  Attributes:
    architecture: the shape of the backbone.
    head: "linear" (z = w · norm(e)) or "verbaliser" (z from the logits of
      `safe_ids` and `unsafe_ids`).
    train_layers: the top k layers are trained; -1: all of them.
    train_embedding: whether the input embedding is trained.
    lora_rank: of the adapters on the trained layers, which then are trained
      with the head alone; 0: full fine-tuning.
    lora_alpha: adapters are scaled by `lora_alpha / lora_rank`.
    remat: see `backbone.run_stack`.
    dtype: of the computation; parameters and readouts are float32. "mixed":
      float32, but bfloat16 operands for products with kernels
      (`backbone.mixed_matmul`), the vocabulary's among them, and for those of
      attention in "blocks".
    attention: kind, see `attention.attention`.
    safe_ids: tokens that say "complies"; the first starts the linear head.
    unsafe_ids: tokens that say "violates"; likewise.
    keep_lm_head: whether an untied output embedding is among the parameters.
  """

  architecture: Architecture
  head: str = "linear"
  train_layers: int = -1
  train_embedding: bool = False
  lora_rank: int = 0
  lora_alpha: float = 16.0
  remat: str = "layer"
  dtype: str = "float32"
  attention: str = "dense"
  safe_ids: tuple[int, ...] = ()
  unsafe_ids: tuple[int, ...] = ()
  keep_lm_head: bool = False

  def __post_init__(self):
    choices = {
      "head": HEADS,
      "remat": REMAT,
      "dtype": DTYPES,
      "attention": KINDS,
    }
    for key, allowed in choices.items():
      if getattr(self, key) not in allowed:
        value = getattr(self, key)
        raise ValueError(f"model.{key} {value!r}: use one of {allowed}")
    if self.lora_rank < 0:
      raise ValueError(f"model.lora_rank = {self.lora_rank}: use 0 or more")
    layers = self.architecture.layers
    if not -1 <= self.train_layers <= layers:
      raise ValueError(
        f"model.train_layers = {self.train_layers}: use -1 (all) to {layers}"
      )
    if self.head == "verbaliser":
      both = set(self.safe_ids) & set(self.unsafe_ids)
      if not (self.safe_ids and self.unsafe_ids) or both:
        raise ValueError(
          f"head 'verbaliser' needs two disjoint sets of token ids, not "
          f"{self.safe_ids} and {self.unsafe_ids}"
        )

  @property
  def lower_layers(self) -> int:
    """How many layers, from the input, are frozen."""
    if self.train_layers < 0:
      return 0
    return self.architecture.layers - self.train_layers

  @property
  def has_lm_head(self) -> bool:
    """Whether the parameters hold an output embedding of their own."""
    wanted = self.keep_lm_head or self.head == "verbaliser"
    return wanted and not self.architecture.tied

  def init(self, key: jax.Array) -> Params:
    """Random parameters, float32; may run under `jax.jit`."""
    arch = self.architecture
    keys = jax.random.split(key, 4)
    shape = (arch.vocab_size, arch.width)
    tables = normals(keys[0], [shape] if arch.tied else [shape, shape])
    embedding, output = 0.02 * tables[0], 0.02 * tables[-1]
    params: Params = {
      "embed": {"embedding": embedding},
      "final_norm": {"scale": jnp.ones(arch.width)},
    }
    lower = self.lower_layers
    if lower:
      params["lower"] = init_stack(keys[1], arch, lower)
    if arch.layers > lower:
      params["upper"] = init_stack(keys[2], arch, arch.layers - lower)
    if self.has_lm_head:
      params["lm_head"] = {"kernel": output}
    params["head"] = {"kernel": self.start_head(output)}
    return self.with_adapters(params, keys[3])

  def start_head(self, output: Float[Array, "v d"]) -> Float[Array, "2 d"]:
    """Row 0: output embedding of " safe" minus " unsafe"; row 1: zero.

    So an untrained model is the zero-shot judge. Without verbaliser tokens
    row 0 is zero as well.
    """
    row = jnp.zeros(output.shape[1], jnp.float32)
    if self.safe_ids and self.unsafe_ids:
      row = output[self.safe_ids[0]] - output[self.unsafe_ids[0]]
    return jnp.stack([row, jnp.zeros_like(row)]).astype(jnp.float32)

  def with_adapters(self, params: Params, key: jax.Array) -> Params:
    """Adds untrained adapters to the trained layers, if a rank is set."""
    if not self.lora_rank or "upper" not in params:
      return params
    upper = lora.init(key, params["upper"], self.lora_rank)
    return params | {"upper": upper}

  def apply(self, params: Params, batch: Batch) -> Float[Array, "b s 2"]:
    """Readouts of every slot: compliance `z` (log-odds), helpfulness `h`."""
    return self.read(params, self._readout_hidden(params, batch))

  def read(
    self, params: Params, hidden: Float[Array, "b s d"]
  ) -> Float[Array, "b s 2"]:
    """Readouts of final-norm states, as those of `hidden`."""
    readouts = _score(hidden, params["head"]["kernel"])
    if self.head == "verbaliser":
      logits = self._vocabulary(params, hidden)
      readouts = readouts.at[..., 0].set(self._verdict(logits))
    return readouts

  def apply_with_logits(
    self, params: Params, batch: Batch
  ) -> tuple[Float[Array, "b s 2"], Float[Array, "b s v"]]:
    """Readouts, and the full-vocabulary logits at the same tokens.

    CSRM's full-vocabulary classification loss needs the latter.
    """
    hidden = self._readout_hidden(params, batch)
    readouts = _score(hidden, params["head"]["kernel"])
    logits = self._vocabulary(params, hidden)
    if self.head == "verbaliser":
      readouts = readouts.at[..., 0].set(self._verdict(logits))
    return readouts, logits

  def _verdict(self, logits: Float[Array, "b s v"]) -> Float[Array, "b s"]:
    """Log-odds of the verdict words for "complies"."""
    safe, unsafe = (
      jax.nn.logsumexp(logits[..., jnp.array(ids)], axis=-1)
      for ids in (self.safe_ids, self.unsafe_ids)
    )
    return safe - unsafe

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "b l d"]:
    """States of every token after the final norm."""
    x = self._trunk(params, batch)
    return self._final_norm(params, x)

  def logits(self, params: Params, batch: Batch) -> Float[Array, "b l v"]:
    """Next-token logits, float32."""
    return self._vocabulary(params, self.hidden(params, batch))

  def split(self, params: Params) -> tuple[Params, Params]:
    """(trained, frozen): two trees without a common leaf."""
    flat = flatten(params)
    trained = {k: v for k, v in flat.items() if self.is_trained(k)}
    frozen = {k: v for k, v in flat.items() if not self.is_trained(k)}
    return unflatten(trained), unflatten(frozen)

  def join(self, trained: Params, frozen: Params) -> Params:
    """Undoes `split`."""
    return unflatten(flatten(trained) | flatten(frozen))

  def is_trained(self, path: str) -> bool:
    """Whether the leaf at this path (`a/b/c`) is trained."""
    top = path.split("/")[0]
    if top == "embed":
      return self.train_embedding
    if self.lora_rank:  # what an adapter file holds, and the base has not
      return top == "head" or path.split("/")[-1] in lora.LEAVES
    return top in ("upper", "final_norm", "head")

  def _trunk(self, params: Params, batch: Batch) -> Float[Array, "b l d"]:
    """States before the final norm."""
    self.architecture.check_row_length(batch.tokens.shape[1])
    slots = batch.readout.shape[1]
    if self.attention == "causal" and slots != 1:
      raise ValueError(
        f"model.attention = 'causal' needs rows of one sequence each, these "
        f"have {slots} readouts: set data.slots = 1, or model.attention = "
        "'auto'"
      )
    mixed = self.dtype == "mixed"
    x = self._embed(params, batch.tokens)
    for stack in ("lower", "upper"):
      if stack not in params:
        continue
      rank = self.lora_rank if stack == "upper" else 0
      x = run_stack(
        self.architecture,
        params[stack],
        x,
        batch.positions,
        batch.subtree_end,
        kind=self.attention,
        remat=self.remat,
        lora_rank=rank,
        lora_alpha=self.lora_alpha,
        mixed=mixed,
      )
      # Below this point nothing is trained: no backward pass through it.
      if stack == "lower" and not self.train_embedding:
        x = jax.lax.stop_gradient(x)
    return x

  def _embed(self, params: Params, tokens: Indices) -> Float[Array, "b l d"]:
    """Input embeddings, in the dtype of the computation."""
    dtype = "float32" if self.dtype == "mixed" else self.dtype
    table = sharding.gather_width(params["embed"]["embedding"])
    return sharding.keep_rows(table[tokens].astype(dtype))

  def _final_norm(self, params: Params, x: Array) -> Array:
    eps = self.architecture.norm_eps
    return rms_norm(x, params["final_norm"]["scale"], eps=eps)

  def _readout_hidden(
    self, params: Params, batch: Batch
  ) -> Float[Array, "b s d"]:
    """Final-norm states at the readouts; only these tokens are normed."""
    x = self._trunk(params, batch)
    x = jnp.take_along_axis(x, batch.readout[..., None], axis=1)
    return self._final_norm(params, x)

  def _vocabulary(self, params: Params, hidden: Array) -> Array:
    """Logits of hidden states; float32 sums whatever the dtype."""
    return self._to_logits(self._output(params), hidden)

  def _output(self, params: Params) -> Float[Array, "v d"]:
    """The output embedding."""
    if self.architecture.tied:
      return params["embed"]["embedding"]
    if self.has_lm_head:
      return params["lm_head"]["kernel"]
    raise ValueError("no output embedding here: set keep_lm_head=True")

  def _to_logits(
    self, output: Float[Array, "v d"], hidden: Float[Array, "..."]
  ) -> Float[Array, "..."]:
    if self.dtype == "mixed":
      logits = mixed_logits(hidden.reshape(-1, hidden.shape[-1]), output)
      return logits.reshape(*hidden.shape[:-1], -1)
    return jnp.einsum(
      "...d,vd->...v",
      hidden,
      output.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )


def _score(
  hidden: Float[Array, "b s d"], kernel: Float[Array, "2 d"]
) -> Float[Array, "b s 2"]:
  """Head product in float32 at full precision: the score is a probability."""
  return jnp.einsum(
    "bsd,cd->bsc", hidden.astype(jnp.float32), kernel, precision="highest"
  )


def make(
  config: Config,
  *,
  path: str = "",
  vocab_size: int = 0,
  safe_ids: Sequence[int] = (),
  unsafe_ids: Sequence[int] = (),
  row_length: int = 1024,
  language_model: bool = False,
) -> tuple[RewardModel, LoadParams]:
  """Builds the model that the `model` part of a config describes.

  Args:
    config: the `model` part of `config.default()`.
    path: used in place of `config.path` unless empty.
    vocab_size: of the tokenizer; only read for `path == "random"`.
    safe_ids: tokens for "complies", the first being that of " safe".
    unsafe_ids: tokens for "violates", the first being that of " unsafe".
    row_length: longest row, tokens.
    language_model: whether next-token logits are wanted, so that an untied
      output embedding is loaded.

  Returns:
    (model, load_params). `load_params(key, shardings=None)` gives float32
    parameters: from the weights at `path` or random; `key` is only used for
    what the weights do not determine. `shardings` is a tree like the
    parameters'; each tensor then goes straight to its shards.

  Raises:
    ValueError: for weights or choices that are not supported.
  """
  path = path or config.path
  workdir = (Path(path) / "model.json").is_file()
  if path == "random":
    architecture = _random_architecture(config, vocab_size)
  elif not path:
    architecture = Architecture.from_config(
      sizes.size(config.size), row_length=row_length
    )
  else:
    backbone = (
      _read_description(path)["backbone"]
      if workdir
      else pretrained.open_weights(path).config
    )
    architecture = Architecture.from_config(backbone, row_length=row_length)
  dtype, attention = _for_backend(config.dtype, config.attention)
  model = RewardModel(
    architecture=architecture,
    head=config.head,
    train_layers=config.train_layers,
    train_embedding=config.train_embedding,
    lora_rank=config.lora_rank,
    lora_alpha=config.lora_alpha,
    remat=config.remat,
    dtype=dtype,
    attention=attention,
    safe_ids=tuple(safe_ids),
    unsafe_ids=tuple(unsafe_ids),
    keep_lm_head=language_model,
  )

  def load_params(key: jax.Array, shardings: Params | None = None) -> Params:
    if not path:
      raise ValueError(
        f"model.path is empty, and model.size = {config.size!r} has no weights:"
        " give --config.model.path=FOLDER"
      )
    if path == "random":
      return jax.jit(model.init, out_shardings=shardings)(key)
    if workdir:
      return _continue(model, path, key, shardings)
    return _start(model, path, key, shardings)

  return model, load_params


def _start(
  model: RewardModel, path: str, key: jax.Array, shardings: Params | None
) -> Params:
  """Parameters from foreign weights, with fresh adapters."""
  params = pretrained.load_params(
    pretrained.open_weights(path),
    model.architecture,
    lower_layers=model.lower_layers,
    lm_head=model.has_lm_head,
    safe_id=model.safe_ids[0] if model.safe_ids else -1,
    unsafe_id=model.unsafe_ids[0] if model.unsafe_ids else -1,
    shardings=shardings,
  )
  params = model.with_adapters(params, key)
  if shardings is None:
    return params
  # Only the adapters move here: the rest lies in its shards already.
  places = flatten(shardings)
  return unflatten(
    {k: jax.device_put(v, places[k]) for k, v in flatten(params).items()}
  )


def _continue(
  model: RewardModel, path: str, key: jax.Array, shardings: Params | None
) -> Params:
  """Parameters of a workdir, its stacks cut anew and its adapters merged."""
  old = from_description(_read_description(path))
  if model.has_lm_head and not old.has_lm_head:
    raise ValueError(
      f"model path {path!r}: its checkpoint has no output embedding, which "
      f"head {model.head!r} needs; start from the backbone it was made from"
    )
  places = None
  if shardings is not None:
    # The layer axis is not sharded, so a leaf of either stack has one place.
    known = flatten(shardings)
    known = {_in_other_stack(k): v for k, v in known.items()} | known
    first = next(iter(known.values()))
    whole = jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())
    shapes = flatten(jax.eval_shape(old.init, key))
    places = unflatten({k: known.get(k, whole) for k in shapes})
  params = checkpoint.restore_params(path, shardings=places)
  cut = functools.partial(recut, model, alpha=old.lora_alpha)
  return jax.jit(cut, out_shardings=shardings)(params, key)


def recut(
  new: RewardModel, params: Params, key: jax.Array, *, alpha: float
) -> Params:
  """Parameters of another model in the stacks of `new`, with new adapters.

  Args:
    new: the model that they are for.
    params: of a model of the same architecture, whatever layers it trained.
    key: of the adapters.
    alpha: of its own adapters, which are merged.
  """
  params = lora.merge(params, alpha)
  stacks = [params[k] for k in ("lower", "upper") if k in params]
  layers = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
  kept = ("embed", "final_norm", "head") + ("lm_head",) * new.has_lm_head
  cut = {k: params[k] for k in kept}
  lower = new.lower_layers
  if lower:
    cut["lower"] = jax.tree.map(lambda x: x[:lower], layers)
  if lower < new.architecture.layers:
    cut["upper"] = jax.tree.map(lambda x: x[lower:], layers)
  return new.with_adapters(cut, key)


def _in_other_stack(path: str) -> str:
  """`lower/x` for `upper/x` and the reverse; other paths unchanged."""
  top, _, rest = path.partition("/")
  return {"lower": "upper/", "upper": "lower/"}.get(top, top + "/") + rest


def _read_description(path: str) -> dict[str, Any]:
  """The `model.json` of a workdir."""
  return json.loads((Path(path) / "model.json").read_text("utf-8"))


def _random_architecture(config: Config, vocab_size: int) -> Architecture:
  """The small Llama of `model.random`."""
  sizes = config.random
  if vocab_size < 1:
    raise ValueError("model.path = 'random' needs the tokenizer's vocab_size")
  if sizes.width % sizes.heads or sizes.heads % sizes.kv_heads:
    raise ValueError(
      f"model.random: heads = {sizes.heads} must divide width = {sizes.width} "
      f"and be a multiple of kv_heads = {sizes.kv_heads}"
    )
  return Architecture.from_config(
    {
      "model_type": "llama",
      "vocab_size": vocab_size,
      "hidden_size": sizes.width,
      "num_hidden_layers": sizes.layers,
      "num_attention_heads": sizes.heads,
      "num_key_value_heads": sizes.kv_heads,
      "intermediate_size": sizes.ffn,
      "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "tie_word_embeddings": True,
      "max_position_embeddings": 8192,
    }
  )


def describe(model: RewardModel) -> dict[str, Any]:
  """The choices that a checkpoint needs to be read again, JSON-ready."""
  return {
    "backbone": model.architecture.to_config(),
    "head": model.head,
    "train_layers": model.train_layers,
    "lora_rank": model.lora_rank,
    "lora_alpha": model.lora_alpha,
    "safe_ids": list(model.safe_ids),
    "unsafe_ids": list(model.unsafe_ids),
  }


def from_description(
  described: Mapping[str, Any], *, row_length: int = 1024
) -> RewardModel:
  """The model for scoring that `describe` described; on this machine's terms.

  Raises:
    ValueError: a key is missing or holds what is not supported.
  """
  try:
    head, layers = described["head"], described["train_layers"]
    rank, alpha = described["lora_rank"], described["lora_alpha"]
    safe, unsafe = described["safe_ids"], described["unsafe_ids"]
    backbone = described["backbone"]
  except KeyError as error:
    raise ValueError(
      f"model.json lacks {error.args[0]!r}; it was not written by this "
      "version: train again or restore the file"
    ) from error
  dtype, attention = _for_backend("auto", "auto")
  return RewardModel(
    architecture=Architecture.from_config(backbone, row_length=row_length),
    head=head,
    train_layers=layers,
    lora_rank=rank,
    lora_alpha=alpha,
    remat="none",
    dtype=dtype,
    attention=attention,
    safe_ids=tuple(safe),
    unsafe_ids=tuple(unsafe),
  )


def _for_backend(dtype: str, attention: str) -> tuple[str, str]:
  """What "auto" stands for here.

  The CPU is weak in bfloat16; attention in blocks follows the rows' data, so
  it cannot be spread over the devices of a mesh. No kernel of a GPU's library
  takes the mask of a trie.
  """
  backend = jax.default_backend()
  on_cpu = backend == "cpu"
  alone = on_cpu and jax.device_count() == 1
  dtypes = {"auto": "float32" if on_cpu else "bfloat16"}
  kind = "blocks" if alone else "pallas" if backend == "tpu" else "dense"
  kinds = {"auto": kind}
  return dtypes.get(dtype, dtype), kinds.get(attention, attention)
