"""The suites that `--suite=real` means, out of public sets never trained on.

A suite holds families that the model's recipe kept from training, if it trains
on that set, else all of them; and in either case no family in which a text of
the training rows occurs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from csrm_jax.data import augment_sources, sources
from csrm_jax.data.contract import Row, hash_family, kind_of
from csrm_jax.data.prepare import is_heldout
from csrm_jax.data.sets import polyguard
from csrm_jax.eval import real_rules, real_specs
from csrm_jax.eval.recipes import Split, texts_of
from csrm_jax.metrics import complies

ROWS = 600  # of a suite, unless told otherwise
# Sets that are suites as their sources make them; the rest of the ids of the
# rows that are meant, where only a part is.
_OF_SETS: Mapping[str, tuple[str, str]] = {
  "pku_pairs": ("pku_pairs", ""),
  "xstest_must_answer": ("xstest_completions", "/must_answer"),
  "xstest_must_refuse": ("xstest_completions", "/must_decline"),
  "teen_safety_policies": ("teen_safety_policies", ""),
  "pyrit_scored": ("pyrit_scored", ""),
  "cosa": ("cosa", ""),
  "openai_moderation": ("openai_moderation", ""),
  "rm_bench": ("rm_bench", ""),
}
_POLYGUARD = {
  f"polyguard_{side}_{kind}": (side, kind)
  for side in ("unseen", "seen")
  for kind in real_rules.KINDS
}
RESAMPLED = "beavertails_resampled"
NAMES = (*_POLYGUARD, RESAMPLED, *_OF_SETS)
# Whole policies are long, so the two suites of them are run by name alone.
REAL = tuple(n for n in NAMES if not n.endswith("_policy"))


def build(
  name: str,
  *,
  path: str | Path | None,
  split: Split,
  rows: int = 0,
  counts: dict[str, int],
) -> list[Row]:
  """The rows of a suite: contract rows; `gold` names deciding lines of a spec.

  Args:
    name: of NAMES.
    path: folder of the real sets.
    split: what its recipe kept from training.
    rows: roughly, by whole families; 0: ROWS.
    counts: receives how much was read and left out, by reason.

  Raises:
    ValueError: an unknown name, a missing or broken file.
  """
  rows = rows or ROWS
  if name in _POLYGUARD:
    side, kind = _POLYGUARD[name]
    lines = list(polyguard.texts(path))
    return real_rules.rows(
      _polyguard(lines, side, split, counts),
      kind,
      policies=real_rules.policies_of(lines),
      size=rows,
      counts=counts,
    )
  if name == RESAMPLED:
    return _resampled(path, split, rows, counts)
  if name not in _OF_SETS:
    raise ValueError(f"{name!r} is no real suite; use {', '.join(NAMES)}")
  source, ending = _OF_SETS[name]
  found = list(sources.load(source, path=path, seed=split.seed, counts=counts))
  asked = [r for r in found if r["id"].endswith(ending)]
  if len(asked) < len(found):
    counts["under_other_specs"] = len(found) - len(asked)
  made = _flips(asked)
  kept = _kept(made, source, split, lambda r: r["family"], texts_of, counts)
  return _some(kept, rows, counts)


def _kept(
  items: Sequence,
  source: str,
  split: Split,
  family: Callable[..., str],
  texts: Callable[..., frozenset[str]],
  counts: dict[str, int],
  *,
  everything: bool = False,
) -> list:
  """Those of families that the recipe did not train on, in their order.

  Args:
    items: rows, or lines of a set.
    source: name of the set.
    split: what its recipe kept from training.
    family: of an item.
    texts: of a list of items.
    counts: receives what was left out.
    everything: the recipe cannot train on any of them.
  """
  bases = {name.removesuffix("_augmented") for name in split.trained}
  whole = everything or source not in bases
  families: dict[str, list] = {}
  for item in items:
    families.setdefault(family(item), []).append(item)
  good: set[str] = set()
  lost = {"of_training_families": 0, "with_texts_of_training": 0}
  for name, found in families.items():
    out = whole or is_heldout(name, seed=split.seed, share=split.share)
    if not out:
      lost["of_training_families"] += len(found)
    elif split.texts & texts(found):
      lost["with_texts_of_training"] += len(found)
    else:
      good.add(name)
  for key, number in lost.items():
    if number:
      counts[key] = counts.get(key, 0) + number
  return [item for item in items if family(item) in good]


def _some(rows: Sequence[Row], count: int, counts: dict[str, int]) -> list[Row]:
  """Families, by a hash of their names, until they hold `count` sequences."""
  families: dict[str, int] = {}
  for row in rows:
    size = 1 if kind_of(row) == "label" else 2
    families[row["family"]] = families.get(row["family"], 0) + size
  kept: set[str] = set()
  total = 0
  for family in sorted(families, key=hash_family):
    if total >= count:
      break
    kept.add(family)
    total += families[family]
  made = [row for row in rows if row["family"] in kept]
  if len(made) < len(rows):
    counts["not_drawn"] = len(rows) - len(made)
  return made


def _flips(rows: Sequence[Row]) -> list[Row]:
  """Spec pairs whose sides are label rows too become edits of one another.

  So nothing is judged twice, and flips are counted. Others stay as they are.
  """
  labelled = {
    (_stem(row), row["spec"]): row for row in rows if kind_of(row) == "label"
  }
  edited: dict[str, str] = {}
  gone: set[str] = set()
  for row in rows:
    if kind_of(row) != "spec_pair":
      continue
    win, lose = (
      labelled.get((_stem(row), row[side]))
      for side in ("chosen_spec", "rejected_spec")
    )
    if win is None or lose is None or win["messages"] != row["messages"]:
      continue
    if complies(win["label"]) and not complies(lose["label"]):
      edited[lose["id"]] = win["id"]
      gone.add(row["id"])
  return [
    row | {"base": edited[row["id"]], "edit": "other_spec"}
    if row["id"] in edited
    else row
    for row in rows
    if row["id"] not in gone
  ]


def _stem(row: Row) -> str:
  return row["id"].rsplit("/", 1)[0]


# ---------------------------------------------------------------- polyguard


def _polyguard(
  found: Sequence[Row], side: str, split: Split, counts: dict[str, int]
) -> list[Row]:
  """Lines of unseen policies, or of seen ones whose families were held out."""
  counts["read"] = len(found)
  unseen = side == "unseen"
  mine = [
    raw
    for raw in found
    if (raw["policy"] in polyguard.UNSEEN_POLICIES) == unseen
  ]
  counts["of_other_policies"] = len(found) - len(mine)
  return _kept(
    mine,
    "polyguard",
    split,
    lambda raw: hash_family(raw["violating"]),
    lambda raws: frozenset(
      hash_family(raw[key])
      for raw in raws
      for key in ("violating", "compliant")
    ),
    counts,
    everything=unseen,
  )


# -------------------------------------------------------------- beavertails


def _resampled(
  path: str | Path | None, split: Split, size: int, counts: dict[str, int]
) -> list[Row]:
  """Responses under duos of specs drawn anew, and edits that change nothing.

  Each duo gives a response both labels; each of the two specs is edited once
  so that its label stays. Responses ticked with no category are left out: all
  specs of a duo would let them pass.
  """
  found = list(augment_sources.beavertails_annotated(path))
  never = set(augment_sources.BEAVERTAILS_NEVER)
  counts["read"] = len(found)
  ticked = {x.id: {c for c, v in x.violated.items() if v} for x in found}
  usable = [x for x in found if ticked[x.id] and not ticked[x.id] & never]
  counts["without_category"] = sum(not ticked[x.id] for x in found)
  counts["never_permitted"] = sum(bool(ticked[x.id] & never) for x in found)
  kept = _kept(
    usable,
    "beavertails",
    split,
    lambda x: x.family,
    lambda xs: texts_of({"messages": x.turns()} for x in xs),
    counts,
  )
  some = _some(
    [{"id": x.id, "label": 0, "family": x.family} for x in kept],
    -(-size // real_specs.PER_RESPONSE),
    counts,
  )
  chosen = {row["id"] for row in some}
  return real_specs.rows(
    [x for x in kept if x.id in chosen], seed=split.seed, counts=counts
  )
