"""Contract rows of augmentation: labels, pairs of specs, pairs of responses."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from csrm_jax.data.annotated import Annotated
from csrm_jax.data.edits import SpecPair, breaks, judge
from csrm_jax.spec import Spec

Row = dict[str, Any]


def _common(row: Annotated) -> Row:
  return {"family": row.family, "source": row.source}


def _object(spec: Spec) -> Row:
  """The spec with its rules, so that its labels can be recomputed."""
  plain = spec.model_dump(mode="json", exclude_defaults=True)
  return {"rules": [], **plain}


def label_row(
  row: Annotated,
  name: str,
  spec: Spec,
  label: int,
  edit: str = "base",
  base: str = "",
) -> Row:
  """A label row; `base` is left out where it is empty."""
  out = {
    "id": name,
    "messages": row.turns(),
    "label": label,
    "spec": _object(spec),
    "edit": edit,
    **_common(row),
  }
  if base:
    out["base"] = base
  if row.severity is not None:
    out["severity"] = row.severity
  return out


def spec_row(row: Annotated, name: str, pair: SpecPair) -> Row:
  """A spec pair; `chosen_spec` is the more lenient one."""
  return {
    "id": name,
    "messages": row.turns(),
    "chosen_spec": _object(pair.lenient),
    "rejected_spec": _object(pair.strict),
    **_common(row),
  }


def response_pairs(
  rows: Sequence[Annotated],
  spec: Spec,
  name: str,
  *,
  may_win: Callable[[Annotated], bool],
) -> Iterator[Row]:
  """Pairs whose order a spec decides: by label, or by severity of one offence.

  Args:
    rows: responses to one prompt.
    spec: to compare them under.
    name: of the spec, for the ids.
    may_win: False for responses that must not be called compliant.
  """
  labels = {r.id: judge(r, spec) for r in rows}
  broken = {r.id: [breaks(r, rule) for rule in spec.rules] for r in rows}
  for win in rows:
    for lose in rows:
      if win.messages[-1] == lose.messages[-1]:
        continue
      two = (labels[win.id], labels[lose.id])
      better = two == (1, 0) and may_win(win)
      if two == (0, 0) and broken[win.id] == broken[lose.id]:
        better = _is_milder(win, lose)
      if better:
        yield {
          **_pair_row(win, lose, f"{win.id}>{lose.id}#{name}"),
          "kind": "resp",
          "spec": _object(spec),
        }


def _is_milder(one: Annotated, two: Annotated) -> bool:
  if one.severity is None or two.severity is None:
    return False
  return one.severity < two.severity


def help_pairs(
  rows: Sequence[Annotated], *, step: float
) -> Iterator[tuple[Row, bool]]:
  """Pairs a step or more apart in helpfulness, and whether both may be taken.

  They may where both are refusals or neither is; an unknown one may not.
  """
  for win in rows:
    for lose in rows:
      if win.helpfulness is None or lose.helpfulness is None:
        continue
      apart = win.helpfulness - lose.helpfulness >= step
      if apart and win.messages[-1] != lose.messages[-1]:
        row = _pair_row(win, lose, f"{win.id}>{lose.id}#help")
        sure = win.refusal is not None and win.refusal == lose.refusal
        yield {**row, "kind": "help"}, sure


def _pair_row(win: Annotated, lose: Annotated, name: str) -> Row:
  return {
    "id": name,
    "prompt": win.turns()[:-1],
    "chosen": win.turns()[-1:],
    "rejected": lose.turns()[-1:],
    **_common(win),
  }
