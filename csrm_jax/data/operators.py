"""The operators of augmentation by name, and what they do to a label."""

from collections.abc import Callable, Mapping

from csrm_jax.data.edits import Edit
from csrm_jax.data.edits_flip import (
  add_trigger,
  allow,
  carve_out,
  contradict,
  forbid_refusal,
  ladder,
  leave_out,
  refuse_sub,
  swap_spec,
)
from csrm_jax.data.edits_keep import (
  add_inert,
  borrow,
  distract,
  drop_inert,
  paraphrase,
  permute,
)

Operator = Callable[..., Edit | None]

OPERATORS: Mapping[str, Operator] = {
  "drop_inert": drop_inert,
  "leave_out": leave_out,
  "add_trigger": add_trigger,
  "add_inert": add_inert,
  "allow": allow,
  "ladder": ladder,
  "permute": permute,
  "paraphrase": paraphrase,
  "borrow": borrow,
  "swap_spec": swap_spec,
  "contradict": contradict,
  "forbid_refusal": forbid_refusal,
  "distract": distract,
  "carve_out": carve_out,
  "refuse_sub": refuse_sub,
}
"""O1 to O15: (row, spec, taxonomy, seed) -> Edit, or None if not applicable.

name            applies if                                effect on the label
drop_inert      a rule not broken, beside another rule    none
leave_out       label 0, and known to be 1 without V      0 -> 1
add_trigger     a rule the spec lacks is broken           any -> 0
add_inert       a rule the spec lacks is not broken       none; alone: 1
allow           exactly one rule is broken                0 -> 1
ladder          a rule with severities is broken          either; a spec pair
permute         two rules or more                         none
paraphrase      a rule has another wording                none
borrow          a rule others break is not broken here    none
swap_spec       label known under other rules             either
contradict      exactly one rule is broken, no level      unknown; two pairs
forbid_refusal  refusal known, nothing else is required   refusal: 0; or none
distract        rules the spec lacks are not broken       none
carve_out       sub-category known, another one stays     0 -> 1 or none
refuse_sub      no refusal yet, nothing is required       any -> 1
"""
NEUTRAL = ("permute", "paraphrase", "borrow", "distract")
# These leave one label alone; the others meet both.
ONE_SIDED = ("leave_out", "add_trigger", "allow", "contradict", "refuse_sub")
INSERTING = ("add_trigger", "add_inert", "borrow", "distract")


def parse(text: str) -> tuple[str, ...]:
  """Operators in "a,b", all but them in "-a,-b", all in "", () in "none".

  Raises:
    ValueError: an unknown name, or some with a minus and some without.
  """
  if text.strip() == "none":
    return ()
  names = [n for n in (part.strip() for part in text.split(",")) if n]
  bare = [n.removeprefix("-") for n in names]
  if unknown := [n for n in bare if n not in OPERATORS]:
    raise ValueError(
      f"--config.data.operators={text}: {unknown[0]!r} is no operator; choose "
      f'from {", ".join(OPERATORS)}, or "none"'
    )
  left_out = [n for n in names if n.startswith("-")]
  if left_out and len(left_out) < len(names):
    raise ValueError(
      f"--config.data.operators={text}: {left_out[0]!r} leaves one out, others "
      "are named without a minus; use one way or the other"
    )
  if left_out or not names:
    return tuple(op for op in OPERATORS if op not in bare)
  return tuple(op for op in OPERATORS if op in bare)
