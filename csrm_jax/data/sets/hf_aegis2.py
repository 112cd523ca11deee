"""AEGIS 2.0 as published: dialogues with the hazards of a broad taxonomy."""

from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data.contract import Row, hash_family
from csrm_jax.data.sets.duos import Harm, Item, pool
from csrm_jax.data.sets.duos import rows as duo_rows
from csrm_jax.data.sets.shapes import (
  HARMLESSNESS,
  drop,
  exchange,
  pseudo,
  settled,
  text_id,
  wording,
)
from csrm_jax.data.sets.tables import records
from csrm_jax.spec import Truth

FILES = ("Aegis-AI-Content-Safety-Dataset-2.0/",)
_NAME = "hf_aegis2"

HARMS = {
  "Violence": Harm("Violence", "violence", "attacks, and help with them"),
  "Sexual": Harm("Adult content", "sexual content", "explicit talk of sex"),
  "Criminal Planning/Confessions": Harm(
    "Crime", "planning or confessing crimes", "how to commit or hide a crime"
  ),
  "Guns and Illegal Weapons": Harm(
    "Weapons", "weapons", "buying, making or misusing guns and other weapons"
  ),
  "Controlled/Regulated Substances": Harm(
    "Drugs", "drugs", "making, trading or taking controlled substances"
  ),
  "Suicide and Self Harm": Harm(
    "Self-harm", "self-harm", "suicide or self-injury, encouraged or explained"
  ),
  "Sexual (minor)": Harm(
    "Minors", "sexual content about minors", "any sexual talk of a minor"
  ),
  "Hate/Identity Hate": Harm(
    "Hate", "hatred of groups", "contempt for people because of who they are"
  ),
  "PII/Privacy": Harm(
    "Privacy", "private data", "exposing or seeking data of private persons"
  ),
  "Harassment": Harm(
    "Harassment", "harassment", "pestering, bullying or stalking somebody"
  ),
  "Threat": Harm("Threats", "threats", "announcing harm to somebody"),
  "Profanity": Harm("Swearing", "swear words", "crude and obscene words"),
  "Manipulation": Harm(
    "Manipulation", "manipulation", "deceiving or pressuring people"
  ),
  "Fraud/Deception": Harm(
    "Fraud", "fraud", "scams, forgery, impersonation for gain"
  ),
  "Malware": Harm("Malware", "malware", "harmful code and how to spread it"),
  "High Risk Gov Decision Making": Harm(
    "State decisions",
    "decisions for the state",
    "deciding on rights, asylum, benefits or arrests",
  ),
  "Political/Misinformation/Conspiracy": Harm(
    "Misinformation",
    "false claims on politics",
    "conspiracy tales and misleading political claims",
  ),
  "Copyright/Trademark/Plagiarism": Harm(
    "Copyright", "breach of copyright", "piracy, plagiarism, forged brands"
  ),
  "Unauthorized Advice": Harm(
    "Advice",
    "advice reserved to professionals",
    "medical, legal or financial advice as if from a professional",
  ),
  "Illegal Activity": Harm(
    "Law", "unlawful acts", "help with other acts against the law"
  ),
  "Immoral/Unethical": Harm(
    "Conduct", "unethical conduct", "advice that is lawful but wrong"
  ),
}
_NEVER = "Sexual (minor)"
# Open ended: they say that something is wrong, not what.
_VAGUE = {"Needs Caution", "Other"}
# Neighbours annotators mix up: where one is ticked, the others are unknown.
_NEAR = (
  {"Criminal Planning/Confessions", "Illegal Activity", "Immoral/Unethical"},
  {"Violence", "Threat", "Harassment", "Criminal Planning/Confessions"},
  {"Hate/Identity Hate", "Harassment", "Profanity"},
  {"Fraud/Deception", "Manipulation", "Illegal Activity", "Malware"},
  {"Sexual", "Sexual (minor)", "Profanity"},
)


def annotation(categories: str) -> dict[str, Truth]:
  """1, 0 or None for each hazard, out of the published list in one string.

  Raises:
    ValueError: a hazard is unknown.
  """
  ticked = {c.strip() for c in categories.split(",") if c.strip()}
  unknown = ticked - {*HARMS} - _VAGUE
  if unknown:
    raise ValueError(
      f"{_NAME}: field 'violated_categories': {sorted(unknown)[0]!r} is not in "
      "the taxonomy; use the published file"
    )
  vague = bool(ticked & _VAGUE)
  truth: dict[str, Truth] = dict.fromkeys(HARMS, None if vague else 0)
  for near in _NEAR:
    truth |= dict.fromkeys(near if near & ticked else (), None)
  for hazard in ticked - _VAGUE:
    truth[hazard] = 1
  return truth


def rows(
  path: str | Path | None, *, seed: int, counts: dict[str, int]
) -> Iterator[Row]:
  """Duos over the hazards, and a label row under harmlessness each.

  Without a response the prompt is judged as a pseudo-response. Hazards are
  given for prompt and response together: only those of an unsafe response (or
  pseudo-response) count as its own.
  """
  fields = ("prompt", "response", "prompt_label", "response_label")
  fields += ("violated_categories",)
  raws = settled(
    (
      raw | {"id": text_id(_NAME, raw["prompt"], raw["response"])}
      for _, raw in records(path, _NAME, FILES[0][:-1], fields, {})
    ),
    lambda raw: (raw["prompt"], raw["response"] or "no response"),
    lambda raw: (raw["prompt_label"], raw["response_label"]),
    name=_NAME,
    counts=counts,
  )
  items = []
  for raw in raws:
    label = raw["response_label" if raw["response"] else "prompt_label"]
    if "REDACTED" in (raw["prompt"], raw["response"]):
      drop(counts, _NAME, "redacted")
      continue
    if label not in ("safe", "unsafe"):
      drop(counts, _NAME, "unlabelled")
      continue
    messages = pseudo(raw["prompt"])
    if raw["response"]:
      messages = exchange(raw["prompt"], raw["response"])
    family = hash_family(raw["prompt"])
    yield {
      "id": f"{raw['id']}/label",
      "messages": messages,
      "label": int(label == "safe"),
      "spec": wording(HARMLESSNESS, seed, family),
      "source": _NAME,
      "family": family,
    }
    truth = annotation(
      (raw["violated_categories"] or "") if label == "unsafe" else ""
    )
    if label == "unsafe" and 1 not in truth.values():
      drop(counts, _NAME, "duo_without_hazard")
      continue
    items.append(Item(raw["id"], messages, family, truth))
  duos = pool(HARMS, seed=seed, never=_NEVER)
  yield from duo_rows(
    items, duos, name=_NAME, seed=seed, counts=counts, never=_NEVER
  )
