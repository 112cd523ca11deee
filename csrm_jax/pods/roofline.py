"""How long a training step takes at least, by counting.

A lower bound, not a forecast: products at the chip's peak, weights read from
HBM once a pass, collectives at the links' full bandwidth, and whichever of the
three takes longest hides the others.
"""

from typing import NamedTuple

from csrm_jax.config import Config
from csrm_jax.model.reward import RewardModel
from csrm_jax.pods import hlo
from csrm_jax.pods.chips import Topology


class Flops(NamedTuple):
  """Floating-point operations of one step over all chips.

  Attributes:
    model: what the mathematics asks for, the usual count behind "MFU".
    hardware: with what rematerialisation computes again, and every element of
      the L x L products whose mask the kernels cannot skip.
  """

  model: float
  hardware: float


class Times(NamedTuple):
  """Seconds of one step, each as if alone.

  Attributes:
    products: hardware FLOPs at the chip's bfloat16 peak.
    hbm: weights, their gradients and moments through HBM.
    links: collectives; None where the compiled text hides how often they run.
  """

  products: float
  hbm: float
  links: float | None

  @property
  def bound(self) -> float:
    """The longest of them."""
    return max(self.products, self.hbm, self.links or 0.0)


def kernel_parameters(model: RewardModel) -> int:
  """Weights of one layer that enter products."""
  a = model.architecture
  attention = a.width * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
  return attention + 3 * a.width * a.ffn


def flops(config: Config, model: RewardModel) -> Flops:
  """Counts a training step of a recipe; rows are counted as full."""
  return passes(model, rows=config.batch_rows, length=config.data.row_length)


def passes(model: RewardModel, *, rows: int, length: int) -> Flops:
  """Counts a pass forwards and back: 2 operations a weight and token, 4 back.

  Layers below the lowest trained one run forward alone; under adapters, no
  gradient of the kernels is taken (2 operations fewer).

  Args:
    model: of the recipe.
    rows: over all devices.
    length: of a row, tokens.
  """
  a = model.architecture
  tokens = rows * length
  per_layer = 2.0 * kernel_parameters(model) * tokens
  # Scores and weighted sum; a causal mask leaves half of them.
  square = 4.0 * tokens * length * a.heads * a.head_dim
  trained, frozen = a.layers - model.lower_layers, model.lower_layers
  backward = 1.0 if model.lora_rank else 2.0
  again = 0.0 if model.remat == "none" else 1.0
  wanted = trained * (per_layer * (1 + backward) + square / 2 * 3)
  wanted += frozen * (per_layer + square / 2)
  # "dots" keeps the products of weights and computes attention again.
  redone = per_layer if model.remat == "layer" else 0.0
  done = trained * (
    per_layer * (1 + backward) + again * redone + square * (3 + again)
  )
  done += frozen * (per_layer + square)
  return Flops(wanted, done)


def vocabulary(model: RewardModel, *, rows: int, length: int) -> Flops:
  """Counts the logits of every token, forwards and back, computed twice.

  Their backward pass reaches the states alone unless the output embedding is
  trained, that is: tied to an input embedding that is.
  """
  a = model.architecture
  once = 2.0 * a.vocab_size * a.width * rows * length
  trained = a.tied and model.train_embedding
  wanted = once * (3.0 if trained else 2.0)
  return Flops(wanted, wanted + once)


def times(
  counted: Flops,
  topology: Topology,
  *,
  state_bytes: int,
  weight_bytes: float,
  collectives: list[hlo.Collective],
  replicas: int = 1,
) -> Times:
  """Seconds of a step by each resource.

  Args:
    counted: of `flops`.
    topology: the machine.
    state_bytes: parameters and moments on one chip: read and written once.
    weight_bytes: of all weights in the dtype of compute; a chip reads them
      forwards, backwards and for their gradients.
    collectives: of the compiled step.
    replicas: chips that a gradient's all-reduce spans; across slices it runs
      at the network's speed.
  """
  chip = topology.chip
  links: float | None = 0.0
  for one in collectives:
    if one.times is None or links is None:
      links = None
      break
    # Several slices: an all-reduce over all replicas leaves the slice.
    crosses = topology.slices > 1 and one.kind == "all-reduce"
    crosses = crosses and one.group % replicas == 0 and replicas > 1
    speed = chip.dcn_bandwidth if crosses else chip.ici_bandwidth
    links += one.times * one.moved / speed
  return Times(
    products=counted.hardware / (topology.chips * chip.flops),
    hbm=(2.0 * state_bytes + 3.0 * weight_bytes) / chip.hbm_bandwidth,
    links=links,
  )
