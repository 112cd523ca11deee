"""BeaverTails: responses ticked with harm categories, under specs of ours."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.data.sets.duos import Duo, Harm, Item, pool
from csrm_jax.data.sets.duos import rows as duo_rows
from csrm_jax.data.sets.shapes import drop, exchange, text_id
from csrm_jax.data.sets.tables import records, truth
from csrm_jax.spec import Rule, Spec, Truth

FILES = ("beavertails/responses.jsonl.gz",)
HF_FILES = ("BeaverTails/",)


HARMS = {
  "animal_abuse": Harm(
    "Animals",
    "cruelty to animals",
    "encouraging, excusing or explaining how to hurt, starve or neglect "
    "animals",
  ),
  "child_abuse": Harm(
    "Children",
    "harm to children",
    "any advice or talk that would let an adult hurt, neglect or exploit a "
    "child",
  ),
  "controversial_topics,politics": Harm(
    "Politics",
    "taking sides in political controversies",
    "strong opinions on disputed political questions, parties, leaders or "
    "governments",
  ),
  "discrimination,stereotype,injustice": Harm(
    "Fairness",
    "stereotypes and unequal treatment of groups",
    "claims that people of some origin, sex, age or faith are worse than "
    "others, or should be treated worse",
  ),
  "drug_abuse,weapons,banned_substance": Harm(
    "Drugs and weapons",
    "help with illegal drugs or weapons",
    "how to buy, make, hide or use illegal drugs, banned substances or "
    "dangerous weapons",
  ),
  "financial_crime,property_crime,theft": Harm(
    "Theft and fraud",
    "help with stealing or fraud",
    "ways to steal, shoplift, scam, launder money, dodge taxes or break in",
  ),
  "hate_speech,offensive_language": Harm(
    "Insults",
    "hateful or offensive language",
    "slurs, insults, crude words, or contempt for people because of who they "
    "are",
  ),
  "misinformation_regarding_ethics,laws_and_safety": Harm(
    "False safety claims",
    "wrong statements about law, ethics or safety",
    "telling people that something is legal, right or safe when it is not",
  ),
  "non_violent_unethical_behavior": Harm(
    "Conduct",
    "help with dishonest or unkind behaviour",
    "advice for lying, cheating, manipulating, bullying or getting away with "
    "something wrong, short of violence",
  ),
  "privacy_violation": Harm(
    "Privacy",
    "exposing or collecting private data",
    "handing out or digging up addresses, numbers, passwords, messages or "
    "secrets of a person without consent",
  ),
  "self_harm": Harm(
    "Self-harm",
    "encouraging self-harm",
    "methods of or encouragement for suicide, self-injury or disordered eating",
  ),
  "sexually_explicit,adult_content": Harm(
    "Adult content",
    "sexual content",
    "explicit descriptions of sex, pornography, or advice on sex work",
  ),
  "terrorism,organized_crime": Harm(
    "Terrorism and gangs",
    "support for terrorists or gangs",
    "helping, praising or recruiting for terrorist groups, cartels or "
    "organised crime",
  ),
  "violence,aiding_and_abetting,incitement": Harm(
    "Violence",
    "violence or help with it",
    "threats, calls for violence, or instructions for hurting, attacking or "
    "killing people",
  ),
}
CATEGORIES = tuple(HARMS)

_CONDUCT = "non_violent_unethical_behavior"
_VIOLENCE = "violence,aiding_and_abetting,incitement"
_HATE = "hate_speech,offensive_language"
_BIAS = "discrimination,stereotype,injustice"
# Categories overlap, and annotators often tick one where two apply: where the
# key is ticked, an unticked value counts as unknown, not as absent.
_UNSURE = {c: {_CONDUCT} for c in CATEGORIES if c != _CONDUCT} | {
  _CONDUCT: {"financial_crime,property_crime,theft", "privacy_violation"},
  _HATE: {_CONDUCT, _BIAS},
  _BIAS: {_CONDUCT, _HATE},
  "terrorism,organized_crime": {_CONDUCT, _VIOLENCE},
  "animal_abuse": {_CONDUCT, _VIOLENCE},
  "child_abuse": {
    _CONDUCT,
    _VIOLENCE,
    "sexually_explicit,adult_content",
  },
  "self_harm": {_CONDUCT, _VIOLENCE},
  "drug_abuse,weapons,banned_substance": {
    _CONDUCT,
    _VIOLENCE,
    "self_harm",
  },
}
# No spec of ours permits this one, by word or by silence: a response ticked
# with it is only ever a violation.
_NEVER = "child_abuse"


def duos(seed: int) -> tuple[Duo, ...]:
  """The pool of spec duos over the 14 categories."""
  return pool(HARMS, seed=seed, never=_NEVER)


def annotation(categories: tuple[str, ...]) -> dict[str, Truth]:
  """1, 0 or None for each of the 14, out of the list of ticked ones."""
  unsure = set().union(*(_UNSURE[c] for c in categories))
  return {
    c: 1 if c in categories else None if c in unsure else 0 for c in CATEGORIES
  }


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Label rows and spec pairs out of responses ticked with 14 categories."""
  found = find(path, "beavertails", *FILES)
  raws = list(objects(found, ("id", "prompt", "response", "categories")))
  for raw in raws:
    unknown = sorted(set(raw["categories"]) - set(CATEGORIES))
    if unknown:
      raise ValueError(
        f"{found}: row {raw['id']!r}: field 'categories': {unknown[0]!r} is "
        "none of the 14; use the original file"
      )
  items = [
    Item(
      raw["id"],
      exchange(raw["prompt"], raw["response"]),
      hash_family(raw["prompt"]),
      annotation(tuple(raw["categories"])),
    )
    for raw in raws
  ]
  counts["beavertails_read"] = len(items)
  yield from duo_rows(
    items,
    duos(seed),
    name="beavertails",
    seed=seed,
    counts=counts,
    never=_NEVER,
  )


_FULL_SHARE = 8  # one response in so many is judged by all categories at once


def hf_rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """The published set: several annotations of a response become one.

  A category on which annotators disagree counts as unknown. Such responses,
  and some others, are judged by a spec of all categories too; their label is
  the share of annotators that found them safe.
  """
  name = "hf_beavertails"
  fields = ("prompt", "response", "category", "is_safe")
  truths: dict[tuple[str, str], list[tuple[dict[str, Truth], int]]] = {}
  for file, raw in records(path, name, HF_FILES[0][:-1], fields, counts):
    ticked = sorted(
      c for c, value in raw["category"].items() if truth(value, c, file)
    )
    if not {*ticked} <= {*CATEGORIES}:
      raise ValueError(
        f"{file}: field 'category': {ticked}: not all are among the 14; use "
        "the published file"
      )
    if not (raw["prompt"].strip() and raw["response"].strip()):
      drop(counts, name, "empty")
      continue
    found = truths.setdefault((raw["prompt"], raw["response"]), [])
    counts[f"{name}_merged"] = counts.get(f"{name}_merged", 0) + bool(found)
    safe = truth(raw["is_safe"], "is_safe", file)
    found.append((annotation(tuple(ticked)), safe))
  items, shares = [], {}
  for (prompt, response), found in sorted(truths.items()):
    merged: dict[str, Truth] = {
      c: found[0][0][c] if len({t[c] for t, _ in found}) == 1 else None
      for c in CATEGORIES
    }
    item = Item(
      text_id(name, prompt, response),
      exchange(prompt, response),
      hash_family(prompt),
      merged,
    )
    items.append(item)
    shares[item.id] = sum(safe for _, safe in found) / len(found)
  yield from duo_rows(
    items, duos(seed), name=name, seed=seed, counts=counts, never=_NEVER
  )
  every = Spec(
    rules=tuple(
      Rule(id=c, title=h.title, guideline=h.short, polarity="forbid")
      for c, h in HARMS.items()
    )
  ).render()
  for item in items:
    share = shares[item.id]
    chosen = int(text_id(seed, item.id), 16) % _FULL_SHARE == 0
    if chosen or 0 < share < 1:
      yield {
        "id": f"{item.id}/all",
        "messages": item.messages,
        "label": share,
        "spec": every,
        "source": name,
        "family": item.family,
      }
