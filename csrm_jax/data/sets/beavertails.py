"""BeaverTails: responses ticked with harm categories, under specs of ours."""

import functools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.data.contract import Row, find, hash_family, objects
from csrm_jax.spec import Rule, Spec, complies

FILES = ("beavertails/responses.jsonl.gz",)


class Harm(NamedTuple):
  """Our wording of one annotated category: a title, a short and long form."""

  title: str
  short: str
  long: str


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
_DUOS = 64
# No spec of ours permits this one, by word or by silence: a response ticked
# with it is only ever a violation.
_NEVER = "child_abuse"


class Duo(NamedTuple):
  """Two specs that differ in one or two rules."""

  first: Spec
  second: Spec


def _rule(category: str, polarity: Any, rng: random.Random) -> Rule:
  harm = HARMS[category]
  return Rule(
    id=category,
    title=harm.title if rng.random() < 0.3 else "",
    guideline=harm.short if rng.random() < 0.7 else harm.long,
    polarity=polarity,
  )


@functools.lru_cache(maxsize=4)
def duos(seed: int, number: int = _DUOS) -> tuple[Duo, ...]:
  """A pool of spec duos, so that many rows share a spec and its prefix.

  Either spec forbids something that the other does not, so each is the strict
  one for some responses and the lenient one for others.
  """
  made = []
  targets = [c for c in CATEGORIES if c != _NEVER]
  for i in range(number):
    rng = random.Random(f"{seed}:duo:{i}")
    one = targets[i % len(targets)]
    others = [c for c in targets if c != one]
    rng.shuffle(others)
    two = others.pop()
    common = [
      _rule(c, "forbid" if rng.random() < 0.7 else "allow", rng)
      for c in others[: rng.choice((1, 2, 2, 3))]
    ]
    if i % 8 == 0:
      common[-1] = _rule(_NEVER, "forbid", rng)
    forbid = {c: _rule(c, "forbid", rng) for c in (one, two)}
    allow = {
      c: rule.model_copy(update={"polarity": "allow"})
      for c, rule in forbid.items()
    }
    parts = ([forbid[one]], [forbid[two]])
    if rng.random() < 0.6:
      parts = ([forbid[one], allow[two]], [allow[one], forbid[two]])
    # Last, the common rules are a shared prefix; but not always last, or only
    # the last rule would ever matter.
    at = len(common) if rng.random() < 0.5 else rng.randrange(len(common))
    specs = [Spec(rules=(*common[:at], *part, *common[at:])) for part in parts]
    made.append(Duo(*specs))
  return tuple(made)


def annotation(categories: tuple[str, ...]) -> dict[str, Any]:
  """1, 0 or None for each of the 14, out of the list of ticked ones."""
  unsure = set().union(*(_UNSURE[c] for c in categories))
  return {
    c: 1 if c in categories else None if c in unsure else 0 for c in CATEGORIES
  }


Ticked = tuple[str, ...]  # categories of one response, sorted


class _Choice(NamedTuple):
  """What the pool offers to one set of ticked categories."""

  duos: list[tuple[Spec, Spec]]  # (complied with, violated)
  weights: list[float]  # of the duos
  violated: list[Spec]


def _choices(often: Mapping[Ticked, int], seed: int) -> dict[Ticked, _Choice]:
  """The offers to every set of categories in the file.

  Duos are weighted so that each of the two specs is as often the strict one
  as the lenient one; where the file cannot do that, the duo goes unused.
  Otherwise a spec would tell the label without the response.

  Args:
    often: how many responses have each set of categories.
    seed: of the pool.
  """
  pool = duos(seed)
  verdicts = {
    ticked: [
      (complies(duo.first, truth), complies(duo.second, truth)) for duo in pool
    ]
    for ticked in often
    for truth in (annotation(ticked),)
  }
  # Rows: sets of categories; columns: duos. +1: complies with the first alone.
  sides = np.array([[a - b for a, b in verdicts[t]] for t in often], float)
  known = np.array([[-1 not in v for v in verdicts[t]] for t in often])
  permitted = np.array([[_NEVER not in t] for t in often])
  sides = np.where(known & permitted, sides, 0.0)
  mass = np.array([[n] for n in often.values()], float)
  weights = np.abs(sides)
  for _ in range(200):
    total = weights.sum(1, keepdims=True)
    used = mass * weights / np.where(total > 0, total, 1.0)
    plus = (used * (sides > 0)).sum(0)
    minus = (used * (sides < 0)).sum(0)
    share = np.sqrt((minus + 1e-9) / (plus + 1e-9))
    weights = weights * np.where(sides > 0, share, 1 / share)
    weights /= np.maximum(weights.max(1, keepdims=True), 1e-30)
  offers = {}
  for i, ticked in enumerate(often):
    duos_, weights_, violated = [], [], []
    for duo, side, weight, verdict in zip(
      pool, sides[i], weights[i], verdicts[ticked], strict=True
    ):
      violated += [s for s, v in zip(duo, verdict, strict=True) if v == 0]
      if side and weight > 1e-3:
        duos_.append(duo if side > 0 else (duo.second, duo.first))
        weights_.append(float(weight))
    offers[ticked] = _Choice(duos_, weights_, violated)
  return offers


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Label rows and spec pairs out of responses ticked with 14 categories.

  An unsafe response gets a duo of specs with opposite verdicts (two label
  rows, one spec pair) and, three times in four, another spec that it violates.
  A safe response complies with every spec; it gets one drawn as for the
  unsafe ones, so that a spec alone does not tell the label.
  """
  found = find(path, "beavertails", *FILES)
  raws = list(objects(found, ("id", "prompt", "response", "categories")))
  for raw in raws:
    unknown = sorted(set(raw["categories"]) - set(CATEGORIES))
    if unknown:
      raise ValueError(
        f"{found}: row {raw['id']!r}: field 'categories': {unknown[0]!r} is "
        "none of the 14; use the original file"
      )
  often = Counter(
    tuple(sorted(raw["categories"])) for raw in raws if raw["categories"]
  )
  often = dict(sorted(often.items()))  # whatever the order of the rows
  offers = _choices(often, seed)
  counts["beavertails_without_duo"] = 0
  for raw in raws:
    rng = random.Random(f"{seed}:{raw['id']}")
    ticked = tuple(sorted(raw["categories"]))
    common = {
      "messages": _turns(raw["prompt"], raw["response"]),
      "source": "beavertails",
      "family": hash_family(raw["prompt"]),
    }

    def label(name: str, spec: Spec, value: int, raw=raw, common=common) -> Row:
      row = {"id": f"{raw['id']}/{name}", **common, "label": value}
      return row | {"spec": spec.render()}

    other = ticked or rng.choices(list(often), list(often.values()))[0]
    choice = offers[other]
    if not ticked:
      yield label("safe", rng.choice(choice.violated), 1)
      continue
    strict = None
    if choice.duos:
      ((lenient, strict),) = rng.choices(choice.duos, choice.weights)
      yield label("lenient", lenient, 1)
      yield label("strict", strict, 0)
      yield {
        "id": f"{raw['id']}/duo",
        **common,
        "chosen_spec": lenient.render(),
        "rejected_spec": strict.render(),
      }
    else:
      counts["beavertails_without_duo"] += 1
    if rng.random() < 0.75:
      spec = rng.choice(choice.violated)
      if spec != strict:
        yield label("other", spec, 0)


def _turns(prompt: str, response: str) -> list[dict[str, str]]:
  return [
    {"role": "user", "content": prompt},
    {"role": "assistant", "content": response},
  ]
