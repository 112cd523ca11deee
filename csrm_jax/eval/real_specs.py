"""Suite out of BeaverTails: responses whose label depends on the spec."""

import hashlib
import random
from collections.abc import Mapping, Sequence

from csrm_jax.data import augment_sources
from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.contract import Row
from csrm_jax.data.edits import breaks
from csrm_jax.data.operators import OPERATORS
from csrm_jax.data.sets import beavertails, duos
from csrm_jax.spec import Spec

DRAWS = 2  # duos of specs for each response
PER_RESPONSE = 4 * DRAWS  # rows, where nothing is left out
_DUOS = 160  # drawn anew: training has other ones
# One of these edits both specs of a duo and keeps both labels.
_KEEPING = ("permute", "add_inert", "paraphrase", "borrow")


def rows(
  annotated: Sequence[Annotated], *, seed: int, counts: dict[str, int]
) -> list[Row]:
  """Label rows: two duos of specs a response, and both specs edited once.

  A duo gives a response both labels, and an edit keeps them, so that the text
  alone tells nothing; duos are weighted as in `sets/duos.py`, so that a spec
  is as often the strict one as the lenient one.

  Args:
    annotated: responses with some category of BeaverTails, and not with the
      one that no spec permits.
    seed: of the recipe; specs are drawn from others.
    counts: receives what could not be made.
  """
  drawn = {x.id: x for x in annotated}
  whole = augment_sources.beavertails_taxonomy()
  never = augment_sources.BEAVERTAILS_NEVER
  rules = tuple(r for r in whole.rules if r.id not in never)
  taxonomy = Taxonomy(whole.name, rules, whole.wordings)
  pool = duos.pool(
    beavertails.HARMS, seed=_anew(seed), never=never[0], number=_DUOS
  )
  specs = {spec.render(): spec for duo in pool for spec in duo}
  items = [
    duos.Item(x.id, x.turns(), x.family, x.violated) for x in drawn.values()
  ]
  out: list[Row] = []
  used: set[tuple[str, str]] = set()
  for key in ("without_duo", "duo_drawn_twice"):
    counts[key] = 0
  for draw in range(DRAWS):
    here: dict[str, int] = {}
    made = duos.rows(
      items,
      pool,
      name="beavertails",
      seed=_anew(seed, draw + 1),
      counts=here,
      never=never[0],
      other=0.0,
    )
    pairs: dict[str, dict[str, Row]] = {}
    for row in made:
      stem, part = row["id"].rsplit("/", 1)
      pairs.setdefault(stem, {})[part] = row
    counts["without_duo"] += here["beavertails_without_duo"]
    for stem, pair in pairs.items():
      lenient, strict = pair["lenient"]["spec"], pair["strict"]["spec"]
      if (stem, lenient) in used:
        counts["duo_drawn_twice"] += 1
        continue
      used.add((stem, lenient))
      sides = {"lenient": specs[lenient], "strict": specs[strict]}
      out += _of_duo(
        drawn[stem], f"{stem}/{draw}", sides, taxonomy, seed + draw
      )
  return out


def _anew(*parts: int) -> int:
  """A seed that training does not draw from."""
  digest = hashlib.sha256(f"resampled:{parts}".encode()).hexdigest()
  return int(digest[:8], 16)


def _of_duo(
  row: Annotated,
  stem: str,
  sides: Mapping[str, Spec],
  taxonomy: Taxonomy,
  seed: int,
) -> list[Row]:
  """Four label rows: both specs, and both after one and the same operator."""

  def made(part: str, spec: Spec, label: int, edit: str = "", base: str = ""):
    gold = [i for i, r in enumerate(spec.rules) if breaks(row, r) == 1]
    made_row = {
      "id": f"{stem}/{part}",
      "messages": row.turns(),
      "label": label,
      "spec": spec.render(),
      "source": "beavertails",
      "family": row.family,
    }
    if base:
      made_row |= {"edit": edit, "base": f"{stem}/{base}"}
    return made_row | ({} if label else {"gold": gold})

  out = [
    made("lenient", sides["lenient"], 1),
    made("strict", sides["strict"], 0, "other_spec", "lenient"),
  ]
  names = list(_KEEPING)
  random.Random(f"{_anew(seed)}:{stem}").shuffle(names)
  for name in names:
    how = {"alone": 0.0} if name == "add_inert" else {}
    edits = {
      part: OPERATORS[name](row, spec, taxonomy, _anew(seed), **how)
      for part, spec in sides.items()
    }
    if all(edits.values()):
      out += [
        made(f"{part}_{name}", edit.spec, edit.label, name, part)
        for part, edit in edits.items()
        if edit
      ]
      break
  return out
