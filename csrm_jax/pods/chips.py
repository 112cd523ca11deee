"""What a chip has, and how many of them a topology names."""

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
  """Published peaks of one chip.

  Attributes:
    hbm: GiB that a program may fill.
    flops: bfloat16 operations a second.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second over all links of a chip to its neighbours,
      one direction.
    dcn_bandwidth: bytes a second of a chip's share of its host's network card,
      an assumption: 200 Gbit/s a host of four.
  """

  hbm: float
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float = 6.25e9


# Cloud TPU system architecture pages and NVIDIA's datasheets; bandwidth between
# chips is published as the sum of both directions and halved here. What XLA
# lets a program fill is a little less than the memory printed on the chip.
CHIPS: dict[str, Chip] = {
  "v4": Chip(32, 275e12, 1.2e12, 150e9),
  "v5e": Chip(16, 197e12, 0.82e12, 100e9),
  "v5p": Chip(95, 459e12, 2.77e12, 300e9),
  "v6e": Chip(32, 918e12, 1.64e12, 224e9),
  "h100": Chip(80, 989e12, 3.35e12, 450e9, 50e9),
}

_TOPOLOGY = re.compile(r"(\w+):(\d+(?:x\d+){0,2})")


class Topology(NamedTuple):
  """A described machine.

  Attributes:
    kind: key of CHIPS.
    shape: chips along each axis of a slice.
    slices: slices, joined by the data-centre network.
  """

  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    """Chips in all."""
    return math.prod(self.shape) * self.slices

  @property
  def platform(self) -> str:
    """Name of the XLA backend that compiles for it."""
    return "cuda" if self.kind == "h100" else "tpu"

  def __str__(self) -> str:
    name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
    return f"{self.slices} x {name}" if self.slices > 1 else name


def parse(text: str, slices: int = 1) -> Topology:
  """Reads `v5p:4x4x4`.

  Raises:
    ValueError: not of that form, or no such chip.
  """
  found = _TOPOLOGY.fullmatch(text)
  if not found or found[1] not in CHIPS:
    raise ValueError(
      f"--topology={text!r}: write KIND:AxB or KIND:AxBxC, say v5p:4x4x4, "
      f"with KIND one of {', '.join(CHIPS)}"
    )
  if slices < 1:
    raise ValueError(f"--slices={slices}: at least 1")
  shape = tuple(int(n) for n in found[2].split("x"))
  if min(shape) < 1:
    raise ValueError(f"--topology={text!r}: every axis has at least one chip")
  return Topology(found[1], shape, slices)
