"""Adapters in the layout of PEFT: tensor names, reading, the base's hash.

A folder holds `adapter_model.safetensors` (for each adapted matrix `lora_A`
[r in] and `lora_B` [out r], and the score row), `adapter_config.json`, which
PEFT reads, and `csrm.json`, which we read besides. Neither torch nor peft is
needed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float

from csrm_jax import checkpoint
from csrm_jax.model import lora, names
from csrm_jax.types import Params

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METADATA = "csrm.json"
# PEFT wraps the model twice: PeftModel.base_model is a LoraModel, whose model
# is the classifier.
_PREFIX = "base_model.model."
SCORE = _PREFIX + names.SCORE
_SIDES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# Variants of LoRA whose update is not alpha / r * B A.
VARIANTS = ("use_rslora", "use_dora", "fan_in_fan_out")


class Adapter(NamedTuple):
  """What a folder holds.

  Attributes:
    tensors: by their names in the file, float32.
    rank: of the updates.
    alpha: the updates are scaled by alpha / rank.
    described: content of `METADATA`.
  """

  tensors: dict[str, np.ndarray]
  rank: int
  alpha: float
  described: dict[str, Any]


def is_adapter(folder: str | Path) -> bool:
  """Whether a folder holds an adapter, ours or another's."""
  return (Path(folder) / CONFIG).is_file()


def tensor_name(kernel: str, layer: int, leaf: str) -> str:
  """The name in the file, of `leaf` ("lora_a", "lora_b") beside a kernel.

  Args:
    kernel: path inside a stack, such as "attention/query/kernel".
    layer: counted from the input of the whole model.
    leaf: one of `lora.LEAVES`.
  """
  module = names.layer_name(kernel, layer).removesuffix("weight")
  return _PREFIX + module + _SIDES[leaf]


def target_modules(stack: Params) -> list[str]:
  """PEFT's names of the adapted matrices of a stack: q_proj, ..., sorted."""
  adapted = {k for k in names.flatten(stack) if k.endswith("/lora_a")}
  kernels = (names.BY_PATH[_beside(k, "kernel")].hf for k in adapted)
  return sorted(hf.split(".")[-2] for hf in kernels)


def tensors(stack: Params, *, first: int) -> Iterator[tuple[str, np.ndarray]]:
  """The adapters of a stack under their names in the file.

  Args:
    stack: leaves [n, ...], those of adapters [n, in, r] and [n, r, out].
    first: number of its lowest layer.

  Yields:
    (name, array); `lora_A` is [r in], `lora_B` [out r], as PyTorch has it.
  """
  for path, leaf in names.flatten(stack).items():
    last = path.rsplit("/", 1)[-1]
    if last in lora.LEAVES:
      kernel = _beside(path, "kernel")
      for i in range(leaf.shape[0]):
        array = np.ascontiguousarray(np.asarray(leaf[i]).T)
        yield tensor_name(kernel, first + i, last), array


def backbone(params: Params) -> dict[str, np.ndarray]:
  """The leaves that an adapter leaves alone, both stacks joined to `layers`.

  Without adapters, head and output embedding: a classifier has no other.
  """
  flat = names.flatten(params)
  joined = {k: flat[k] for k in ("embed/embedding", "final_norm/scale")}
  stacks = [params[k] for k in ("lower", "upper") if k in params]
  for path in names.flatten(stacks[0]):
    if not path.endswith(lora.LEAVES):
      parts = [np.asarray(names.flatten(stack)[path]) for stack in stacks]
      joined[f"layers/{path}"] = np.concatenate(parts)
  return {k: np.asarray(v) for k, v in joined.items()}


def fingerprint(params: Params) -> str:
  """Hash of `backbone(params)`: which base an adapter fits."""
  return "sha256:" + checkpoint.params_sha256(backbone(params))


def read(folder: str | Path) -> Adapter:
  """Reads an adapter that `launch/export.py --format=adapter` wrote.

  Raises:
    ValueError: a file is missing, or the adapter is of a kind that is not
      merged by alpha / r * B A.
  """
  folder = Path(folder)
  for file in (CONFIG, METADATA, WEIGHTS):
    if not (folder / file).is_file():
      raise ValueError(
        f"{folder}: an adapter without {file}; write it with launch/export.py"
        " --format=adapter (adapters of other programs are not read: merge"
        " them into their base first)"
      )
  config = json.loads((folder / CONFIG).read_text("utf-8"))
  for key in VARIANTS:
    if config.get(key):
      raise ValueError(
        f"{folder / CONFIG}: field {key!r}: {config[key]!r}: is not supported;"
        " merge the adapter into its base with PEFT"
      )
  return Adapter(
    {
      name: np.asarray(tensor, np.float32)
      for name, tensor in safetensors.numpy.load_file(folder / WEIGHTS).items()
    },
    int(config["r"]),
    float(config["lora_alpha"]),
    json.loads((folder / METADATA).read_text("utf-8")),
  )


def merge(params: Params, adapter: Adapter, *, origin: str | Path) -> Params:
  """Folds an adapter into a base; row 0 of the head is the adapter's score.

  Args:
    params: of the base, all its layers in the stack `upper`.
    adapter: of `read`.
    origin: named in errors.

  Raises:
    ValueError: as `place` does.
  """
  placed, row = place(params, adapter, origin=origin)
  head = {"kernel": jnp.stack([row, np.zeros_like(row)])}
  return lora.merge(placed | {"head": head}, adapter.alpha)


def place(
  params: Params, adapter: Adapter, *, origin: str | Path, first: int = 0
) -> tuple[Params, Float[np.ndarray, " d"]]:
  """Puts an adapter beside the kernels of the stack `upper`, not yet merged.

  A layer that the file does not name keeps the adapter it has, or gets one
  that changes nothing.

  Args:
    params: of the base.
    adapter: of `read`.
    origin: named in errors.
    first: number of the lowest layer of `upper`.

  Returns:
    (parameters, whose head is as it was; the file's score row).

  Raises:
    ValueError: a tensor of the file has no place or another shape, half of a
      pair is missing, or there is no score row.
  """
  left = dict(adapter.tensors)
  stack = names.flatten(params["upper"])
  for path in [k for k in stack if k.endswith("/kernel")]:
    layers, ins, outs = stack[path].shape
    shapes = {"lora_a": (adapter.rank, ins), "lora_b": (outs, adapter.rank)}
    pair = {
      leaf: np.array(
        stack.get(_beside(path, leaf), np.zeros((layers, *shape[::-1]))),
        np.float32,
      )
      for leaf, shape in shapes.items()
    }
    for layer in range(layers):
      both = {leaf: tensor_name(path, first + layer, leaf) for leaf in shapes}
      if not left.keys() & {*both.values()}:
        continue
      for leaf, name in both.items():
        pair[leaf][layer] = _take(left, origin, name, shapes[leaf]).T
      stack |= {_beside(path, leaf): array for leaf, array in pair.items()}
  width = params["head"]["kernel"].shape[1]
  row = _take(left, origin, SCORE, (1, width))
  if left:
    raise ValueError(
      f"{Path(origin) / WEIGHTS}: tensor {min(left)!r} has no place in this"
      " base; is it the base that the adapter was trained on?"
    )
  return params | {"upper": names.unflatten(stack)}, row[0]


def _take(
  left: dict[str, np.ndarray],
  origin: str | Path,
  name: str,
  shape: tuple[int, ...],
) -> np.ndarray:
  """Removes a tensor from `left`."""
  file = Path(origin) / WEIGHTS
  if name not in left:
    raise ValueError(f"{file}: tensor {name!r} is missing; export it again")
  if left[name].shape != shape:
    raise ValueError(
      f"{file}: tensor {name!r} has shape {left[name].shape}; the base and the"
      f" rank ask for {shape}"
    )
  return left.pop(name)


def _beside(path: str, leaf: str) -> str:
  """The path of a kernel's sibling."""
  return f"{path.rsplit('/', 1)[0]}/{leaf}"
