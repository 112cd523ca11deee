"""Specs over an annotated taxonomy, two at a time and with opposite verdicts.

Duos are weighted so that each of the two specs is as often the strict one as
the lenient one; where the file cannot do that, the duo goes unused. Otherwise
a spec would tell the label without the response.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from csrm_jax.data.contract import Row
from csrm_jax.spec import Rule, Spec, Truth, complies

_TRIES = 50  # draws of a spec that is known to be complied with
POOL = 64  # duos; few, so that many rows share a spec and its prefix


class Harm(NamedTuple):
  """Our wording of one annotated category: a title, a short and long form."""

  title: str
  short: str
  long: str


class Duo(NamedTuple):
  """Two specs; for each there is something that only it forbids."""

  first: Any
  second: Any


class Item(NamedTuple):
  """A conversation and which categories it is in; None: nobody knows."""

  id: str
  messages: list[dict[str, str]]
  family: str
  truth: Mapping[str, Truth]


Key = tuple[tuple[str, ...], tuple[str, ...]]  # categories: present, unknown


class _Choice(NamedTuple):
  """What the pool offers to one set of categories."""

  duos: list[tuple[Any, Any]]  # (complied with, violated)
  weights: list[float]  # of the duos
  violated: list[Any]
  kept: float  # share of the conversations that get a duo at all


def _rule(
  harms: Mapping[str, Harm], category: str, polarity: Any, rng: random.Random
) -> Rule:
  harm = harms[category]
  return Rule(
    id=category,
    title=harm.title if rng.random() < 0.3 else "",
    guideline=harm.short if rng.random() < 0.7 else harm.long,
    polarity=polarity,
  )


def pool(
  harms: Mapping[str, Harm],
  *,
  seed: int,
  never: str = "",
  number: int = POOL,
  forbidding: float = 0.7,
) -> tuple[Duo, ...]:
  """Spec duos that differ in one or two rules.

  Args:
    harms: categories and their wordings, at least four without `never`.
    seed: decides everything.
    never: a category that no spec permits, by word or by silence.
    number: of duos.
    forbidding: share of the further rules that forbid; 0 where annotations
      know little, or hardly any verdict is certain.
  """
  made = []
  targets = [c for c in harms if c != never]
  for i in range(number):
    rng = random.Random(f"{seed}:duo:{i}")
    one = targets[i % len(targets)]
    others = [c for c in targets if c != one]
    rng.shuffle(others)
    two = others.pop()
    common = [
      _rule(harms, c, "forbid" if rng.random() < forbidding else "allow", rng)
      for c in others[: rng.choice((1, 2, 2, 3))]
    ]
    if never and i % 8 == 0:
      common[-1] = _rule(harms, never, "forbid", rng)
    forbid = {c: _rule(harms, c, "forbid", rng) for c in (one, two)}
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


def rows(
  items: Sequence[Item],
  duos: Sequence[Duo],
  *,
  name: str,
  seed: int,
  counts: dict[str, int],
  never: str = "",
  thin: bool = False,
  other: float = 0.75,
  verdict: Callable[[Any, Mapping[str, Truth]], int] = complies,
  render: Callable[[Any], str] = Spec.render,
) -> Iterator[Row]:
  """Label rows and spec pairs out of conversations annotated with categories.

  A conversation in some category gets a duo of specs with opposite verdicts
  (two label rows, one spec pair) and, with probability `other`, one more spec
  that it violates. One in no category gets a spec drawn as for the others,
  which it complies with, so that a spec alone does not tell the label. No row
  is made that depends on an unknown category.

  Args:
    items: conversations; all of them name the same categories.
    duos: what to draw from.
    name: of the set.
    seed: decides the draws, with the item's id.
    counts: receives `{name}_without_duo` (only violations can be shown) and
      `{name}_without_spec` (no row at all).
    never: a category that no spec permits.
    thin: leave out duos of frequent categories where no weights can balance
      the pool; counted as `{name}_thinned`.
    other: probability of another spec that an item violates.
    verdict: 1, 0 or -1 (unknown) for a spec and a truth.
    render: text of a spec.
  """
  often = Counter(key_of(item.truth) for item in items)
  often = {k: often[k] for k in sorted(often) if k[0]}  # in any file order
  truths = {key_of(item.truth): item.truth for item in items}
  offers = _choices(often, truths, duos, never, thin, verdict)
  harmful, mass = list(often), list(often.values())
  for reason in ("without_duo", "without_spec"):
    counts[f"{name}_{reason}"] = 0
  for item in items:
    rng = random.Random(f"{seed}:{item.id}")
    key = key_of(item.truth)
    common = {
      "messages": item.messages,
      "source": name,
      "family": item.family,
    }

    def label(part: str, spec: Any, value: int, item=item, common=common):
      row = {"id": f"{item.id}/{part}", **common, "label": value}
      return row | {"spec": render(spec)}

    if not key[0]:
      for _ in range(_TRIES if harmful else 0):
        choice = offers[rng.choices(harmful, mass)[0]]
        if not choice.violated:
          continue
        spec = rng.choice(choice.violated)
        if verdict(spec, item.truth) == 1:
          yield label("safe", spec, 1)
          break
      else:
        counts[f"{name}_without_spec"] += 1
      continue
    choice = offers[key]
    strict = None
    if choice.duos and choice.kept < 1 and rng.random() > choice.kept:
      counts[f"{name}_thinned"] = counts.get(f"{name}_thinned", 0) + 1
    elif choice.duos:
      ((lenient, strict),) = rng.choices(choice.duos, choice.weights)
      yield label("lenient", lenient, 1)
      yield label("strict", strict, 0)
      yield {
        "id": f"{item.id}/duo",
        **common,
        "chosen_spec": render(lenient),
        "rejected_spec": render(strict),
      }
    else:
      counts[f"{name}_without_duo"] += 1
    if not choice.violated:
      counts[f"{name}_without_spec"] += strict is None
    elif rng.random() < other:
      spec = rng.choice(choice.violated)
      if spec != strict:
        yield label("other", spec, 0)


def key_of(truth: Mapping[str, Truth]) -> Key:
  """(categories present, categories unknown), each sorted."""
  return (
    tuple(sorted(c for c, value in truth.items() if value)),
    tuple(sorted(c for c, value in truth.items() if value is None)),
  )


def _choices(
  often: Mapping[Key, int],
  truths: Mapping[Key, Mapping[str, Truth]],
  duos: Iterable[Duo],
  never: str,
  thin: bool,
  verdict: Callable[[Any, Mapping[str, Truth]], int],
) -> dict[Key, _Choice]:
  """What the pool offers to every set of categories in the file."""
  duos = list(duos)
  verdicts = {
    key: [
      (verdict(duo.first, truths[key]), verdict(duo.second, truths[key]))
      for duo in duos
    ]
    for key in often
  }
  if not often:
    return {}
  # Rows: sets of categories; columns: duos. +1: complies with the first alone.
  sides = np.array([[a - b for a, b in verdicts[k]] for k in often], float)
  known = np.array([[-1 not in v for v in verdicts[k]] for k in often])
  permitted = np.array([[never not in k[0]] for k in often])
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
  kept = np.ones((len(often), 1))
  for _ in range(200 if thin else 0):
    share = weights / np.maximum(weights.sum(1, keepdims=True), 1e-30)
    used = mass * kept * share
    plus = (used * (sides > 0)).sum(0) + 1e-9
    minus = (used * (sides < 0)).sum(0) + 1e-9
    room = np.where(sides > 0, minus / plus, plus / minus)
    room = (share * np.minimum(room, 1.0)).sum(1, keepdims=True)
    kept = np.clip(kept * np.sqrt(room), 0.02, 1.0)
  offers = {}
  for i, key in enumerate(often):
    pairs, shares, violated = [], [], []
    for duo, side, weight, verdict_ in zip(
      duos, sides[i], weights[i], verdicts[key], strict=True
    ):
      violated += [s for s, v in zip(duo, verdict_, strict=True) if v == 0]
      if side and weight > 1e-3:
        pairs.append((duo[0], duo[1]) if side > 0 else (duo[1], duo[0]))
        shares.append(float(weight))
    offers[key] = _Choice(pairs, shares, violated, float(kept[i, 0]))
  return offers
