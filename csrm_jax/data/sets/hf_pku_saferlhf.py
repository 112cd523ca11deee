"""PKU-SafeRLHF as published: two responses, which is safer, which is better."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.duos import Harm, Item, pool
from csrm_jax.data.sets.duos import rows as duo_rows
from csrm_jax.data.sets.shapes import (
  HARMLESSNESS,
  drop,
  exchange,
  text_id,
  wording,
)
from csrm_jax.data.sets.tables import records, truth
from csrm_jax.spec import Truth

FILES = ("PKU-SafeRLHF/",)
_NAME = "hf_pku_saferlhf"
_KINDS = {"resp": "safer_response_id", "help": "better_response_id"}

HARMS = {
  "Endangering National Security": Harm(
    "State security", "threats to a state", "espionage, sabotage or revolt"
  ),
  "Insulting Behavior": Harm(
    "Insults", "insults", "mocking or abusing somebody"
  ),
  "Discriminatory Behavior": Harm(
    "Discrimination",
    "unequal treatment of groups",
    "contempt for people because of origin, sex, faith or age",
  ),
  "Endangering Public Health": Harm(
    "Public health",
    "dangers to public health",
    "spreading disease, false cures, unsafe food or medicine",
  ),
  "Copyright Issues": Harm(
    "Copyright", "breach of copyright", "pirated works and how to get them"
  ),
  "Violence": Harm(
    "Violence",
    "violence or help with it",
    "attacks and threats, or how to",
  ),
  "Drugs": Harm("Drugs", "illegal drugs", "making, trading or hiding drugs"),
  "Privacy Violation": Harm(
    "Privacy", "breach of privacy", "spying on people or exposing their data"
  ),
  "Economic Crime": Harm(
    "Theft and fraud", "theft or fraud", "stealing, scams, money laundering"
  ),
  "Mental Manipulation": Harm(
    "Manipulation",
    "manipulating people",
    "ways to deceive, pressure or control somebody",
  ),
  "Human Trafficking": Harm(
    "Trafficking", "trade in people", "buying, selling or forcing people"
  ),
  "Physical Harm": Harm(
    "Injury", "bodily harm", "advice that gets people or oneself hurt"
  ),
  "Sexual Content": Harm(
    "Adult content",
    "sexual content about adults",
    "explicit talk of sex among adults",
  ),
  "Cybercrime": Harm(
    "Cybercrime", "computer crime", "breaking into systems, malware, phishing"
  ),
  "Disrupting Public Order": Harm(
    "Public order", "disturbing public order", "riots, hoaxes and false alarms"
  ),
  "Environmental Damage": Harm(
    "Environment", "harm to nature", "dumping, poaching, polluting"
  ),
  "Psychological Harm": Harm(
    "Mental harm",
    "harm to somebody's mind",
    "bullying, humiliation, or talk that deepens despair",
  ),
  "White-Collar Crime": Harm(
    "Office crime",
    "crime in business",
    "bribes, insider trading, false books, tax evasion",
  ),
  "Animal Abuse": Harm(
    "Animals", "cruelty to animals", "hurting or neglecting animals"
  ),
}


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Response and help pairs, label rows, and duos where harms are named.

  A response that is judged several times has their mean as its label, and a
  harm on which the judgements differ counts as unknown. So do all harms where
  they contradict the verdict.
  """
  fields = ("prompt", "response_0", "response_1", *_KINDS.values())
  fields += ("is_response_0_safe", "is_response_1_safe")
  said: dict[tuple[str, str], list[Row]] = {}
  pairs: dict[tuple[str, str, str, str], None] = {}
  for file, raw in records(path, _NAME, FILES[0][:-1], fields, counts):
    sides = [raw["response_0"], raw["response_1"]]
    if not all(text and text.strip() for text in (raw["prompt"], *sides)):
      drop(counts, _NAME, "empty")
      continue
    for i, response in enumerate(sides):
      safe = truth(raw[f"is_response_{i}_safe"], f"is_response_{i}_safe", file)
      said.setdefault((raw["prompt"], response), []).append(
        {
          "safe": safe,
          "truth": _annotation(raw, i, bool(safe), file),
          "severity": raw.get(f"response_{i}_severity_level"),
        }
      )
    for kind, field in _KINDS.items():
      first = int(raw[field])
      if sides[0] == sides[1] or first not in (0, 1):
        drop(counts, _NAME, f"{kind}_equal")
        continue
      pair = (kind, raw["prompt"], sides[first], sides[1 - first])
      if pair in pairs:
        drop(counts, _NAME, f"{kind}_duplicate")
      pairs[pair] = None
  yield from _responses(said, seed, counts)
  for kind, prompt, chosen, rejected in sorted(pairs):
    if (kind, prompt, rejected, chosen) in pairs:
      drop(counts, _NAME, f"{kind}_contradictory")
      continue
    family = hash_family(prompt)
    spec = wording(HARMLESSNESS, seed, family)
    yield {
      "id": f"{text_id(_NAME, prompt, chosen, rejected)}/{kind}",
      "prompt": [{"role": "user", "content": prompt}],
      "chosen": [{"role": "assistant", "content": chosen}],
      "rejected": [{"role": "assistant", "content": rejected}],
      "kind": kind,
      **({"spec": spec} if kind == "resp" else {}),
      "source": _NAME,
      "family": family,
    }


def _annotation(
  raw: Row, i: int, safe: bool, file: Path
) -> Mapping[str, Truth] | None:
  """1, 0 or None for each harm; None where the file names no harms."""
  ticked: Any = raw.get(f"response_{i}_harm_category")
  if not isinstance(ticked, dict):
    return None
  found: dict[str, Truth] = dict.fromkeys(HARMS, 0)
  for harm, value in ticked.items():
    if harm not in HARMS:
      raise ValueError(
        f"{file}: field 'response_{i}_harm_category': {harm!r}: is none of "
        "the 19; use the published file"
      )
    found[harm] = 1 if truth(value, harm, file) else 0
  if safe == (1 in found.values()):  # harms and verdict contradict each other
    return dict.fromkeys(HARMS)
  return found


def _responses(
  said: Mapping[tuple[str, str], list[Row]], seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  items = []
  for (prompt, response), found in sorted(said.items()):
    stem, family = text_id(_NAME, prompt, response), hash_family(prompt)
    messages = exchange(prompt, response)
    more = len(found) - 1
    counts[f"{_NAME}_merged"] = counts.get(f"{_NAME}_merged", 0) + more
    grades = [f["severity"] for f in found if f["severity"] is not None]
    row = {
      "id": f"{stem}/label",
      "messages": messages,
      "label": sum(f["safe"] for f in found) / len(found),
      "spec": wording(HARMLESSNESS, seed, family),
      "source": _NAME,
      "family": family,
    }
    yield row | (
      {"severity": sum(map(float, grades)) / len(grades)} if grades else {}
    )
    truths = [f["truth"] for f in found]
    if None not in truths:
      merged = {
        c: truths[0][c] if len({t[c] for t in truths}) == 1 else None
        for c in HARMS
      }
      items.append(Item(stem, messages, family, merged))
  if items:
    duos = pool(HARMS, seed=seed)
    yield from duo_rows(items, duos, name=_NAME, seed=seed, counts=counts)
