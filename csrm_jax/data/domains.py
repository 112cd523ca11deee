"""The domains of the synthetic world: their files, checked.

Each file `world/<id>.yaml` is one domain, with graded responses. A response is
written for exactly one grade (or for none), so the sub-categories it violates
are known, and `spec.complies` gives the true label under *any* spec.

  id: alcohol            # the file's name
  split: train           # train | wide | unseen
  titles: [...]          # >= 2 wordings of the rule's title
  vocabulary: [...]      # >= 12 content words of this domain alone
  grades:                # severity 1 (mildest) to 4 or 5, in this order
  - severity: 1
    describe: [...]      # >= 2 short phrasings for the rule text, no slots
    responses: [...]     # >= 8 templates that break exactly this grade
  prompts: [...]         # >= 10 user turns, natural before every response
  neutral: [...]         # >= 6 answers that break no grade
  refusals: [...]        # >= 5
  history: [[user, assistant], ...]     # >= 5 harmless earlier exchanges
  slots: {drink: [...]}  # >= 5 fillers of each {drink} in the texts above
"""

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pydantic
import yaml

WORLD = Path(__file__).parent / "world"
HELD_BACK = 4  # every fourth template and prompt is kept for `synthetic_seen`
# Domains whose responses could fall under each other's rules: they never meet
# in a group, so that a label is right for a reader, not only by construction.
AKIN = (
  {"refund_promises", "delivery_dates", "discounts_haggling"},
  {"refund_promises", "competitor_names"},
  {"legal_advice", "refund_promises"},
  {"legal_advice", "landlord_disputes"},
  {"violence_in_fiction", "knives_and_tools"},
  {"profanity", "insults_mockery"},
  {"celebrity_gossip", "insults_mockery"},
  {"religion_preaching", "insults_mockery"},
  {"religion_preaching", "ghost_superstition"},
  {"horror_scares", "violence_in_fiction", "ghost_superstition", "spoilers"},
  {"gambling", "investment_tips"},
  {"medical_dosage", "weight_loss_diets"},
  {"alcohol", "fast_driving"},
  {"personal_data", "visa_immigration"},
  {"dating_and_romance", "celebrity_gossip"},
  {"cosmetic_surgery", "celebrity_gossip", "insults_mockery"},
  {"cosmetic_surgery", "weight_loss_diets", "medical_dosage"},
  {"conspiracy_theories", "ghost_superstition"},
  {"loans_and_credit", "investment_tips", "gambling"},
  {"loans_and_credit", "discounts_haggling"},
  {"sunbathing_tanning", "cosmetic_surgery"},
  {"video_game_cheats", "spoilers"},
  {"unreleased_products", "delivery_dates"},
  {"unreleased_products", "competitor_names"},
  {"warranty_claims", "refund_promises", "legal_advice"},
  {"warranty_claims", "discounts_haggling"},
  {"warranty_claims", "delivery_dates"},
  {"martial_arts_moves", "violence_in_fiction", "knives_and_tools"},
  {"emoji_and_slang", "profanity", "insults_mockery"},
  {"herbal_remedies", "medical_dosage", "weight_loss_diets"},
  {"herbal_remedies", "energy_drinks_caffeine"},
  {"energy_drinks_caffeine", "weight_loss_diets"},
  {"energy_drinks_caffeine", "medical_dosage"},
  {"energy_drinks_caffeine", "sleep_screens_parenting"},
  {"herbal_remedies", "ghost_superstition"},
  {"military_history_battles", "violence_in_fiction", "horror_scares"},
  {"military_history_battles", "knives_and_tools"},
  {"hypnosis_mind_tricks", "ghost_superstition"},
  {"car_repairs", "fast_driving"},
  {"car_repairs", "knives_and_tools"},
  {"exam_shortcuts", "homework_answers"},
  {"hotel_and_airline_upgrades", "refund_promises", "discounts_haggling"},
  {"hotel_and_airline_upgrades", "competitor_names"},
  {"flattery_and_compliments", "insults_mockery"},
  {"flattery_and_compliments", "celebrity_gossip"},
  {"flattery_and_compliments", "hypnosis_mind_tricks"},
  {"flattery_and_compliments", "exam_shortcuts"},
  {"medical_diagnosis_guesses", "medical_dosage", "herbal_remedies"},
  {"medical_diagnosis_guesses", "food_hygiene_leftovers"},
  {"medical_diagnosis_guesses", "energy_drinks_caffeine"},
  {"weather_and_sports_predictions", "gambling", "investment_tips"},
  {"weather_and_sports_predictions", "ghost_superstition"},
  {"camping_fires", "fireworks"},
  {"car_repairs", "warranty_claims"},
  {"conspiracy_theories", "hypnosis_mind_tricks"},
  {"conspiracy_theories", "herbal_remedies"},
  {"dating_and_romance", "flattery_and_compliments"},
  {"emoji_and_slang", "flattery_and_compliments"},
  {"exam_shortcuts", "video_game_cheats"},
  {"hotel_and_airline_upgrades", "loans_and_credit"},
  {"martial_arts_moves", "military_history_battles"},
  {"medical_diagnosis_guesses", "cosmetic_surgery", "sunbathing_tanning"},
  {"unreleased_products", "weather_and_sports_predictions"},
)
SLOT = re.compile(r"\{(\w+)\}")


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Grade(_Strict):
  """One severity of a domain: wordings for rules, templates that break it."""

  severity: int = pydantic.Field(ge=1, le=5)
  describe: tuple[str, ...] = pydantic.Field(min_length=2)
  responses: tuple[str, ...] = pydantic.Field(min_length=8)


class Domain(_Strict):
  """One world file; see the module's docstring."""

  id: str
  split: str = pydantic.Field(pattern="^(train|wide|unseen)$")
  titles: tuple[str, ...] = pydantic.Field(min_length=2)
  vocabulary: tuple[str, ...] = pydantic.Field(min_length=12)
  grades: tuple[Grade, ...] = pydantic.Field(min_length=4, max_length=5)
  prompts: tuple[str, ...] = pydantic.Field(min_length=10)
  neutral: tuple[str, ...] = pydantic.Field(min_length=6)
  refusals: tuple[str, ...] = pydantic.Field(min_length=5)
  history: tuple[tuple[str, str], ...] = pydantic.Field(min_length=5)
  slots: dict[str, tuple[str, ...]] = {}

  def templates(self) -> dict[str, tuple[str, ...]]:
    """Every text with slots, by the key it stands under."""
    texts = {f"grades.{g.severity}.responses": g.responses for g in self.grades}
    texts |= {k: getattr(self, k) for k in ("prompts", "neutral", "refusals")}
    texts["history"] = tuple(t for turn in self.history for t in turn)
    return texts

  def rule_texts(self) -> tuple[str, ...]:
    """Titles and descriptions."""
    return self.titles + tuple(d for g in self.grades for d in g.describe)


def load(path: Path) -> Domain:
  """Reads and checks one domain file.

  Raises:
    ValueError: names the file, the key, what is wrong and the remedy.
  """
  try:
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    domain = Domain.model_validate(raw)
  except yaml.YAMLError as error:
    raise ValueError(f"{path}: not YAML ({error}); quote the text") from None
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "(top)"
    raise ValueError(
      f"{path}: {key}: {first['msg']}; correct it after the schema in"
      " csrm_jax/data/domains.py"
    ) from None
  for key, fault in _faults(domain, path.stem):
    raise ValueError(f"{path}: {key}: {fault}")
  return domain


def _faults(domain: Domain, stem: str) -> Iterator[tuple[str, str]]:
  if domain.id != stem:
    yield "id", f"{domain.id!r} must equal the file's name {stem!r}"
  grades = [g.severity for g in domain.grades]
  if grades != list(range(1, len(grades) + 1)):
    yield "grades", f"severities {grades} must count up from 1; reorder them"
  for name, fillers in domain.slots.items():
    if len(fillers) < 5:
      yield (
        f"slots.{name}",
        f"{len(fillers)} fillers; add some, up to 5 or more",
      )
  for text in domain.rule_texts():
    if SLOT.search(text):
      yield "grades.describe", f"slot in rule text {text!r}; write it out"
  seen: dict[str, str] = {}
  for key, texts in domain.templates().items():
    for text in texts:
      for name in SLOT.findall(text):
        if name not in domain.slots:
          yield key, f"unknown slot {{{name}}} in {text!r}; add it to slots"
      if key != "history" and text in seen:
        yield key, f"{text!r} stands under {seen[text]} too; remove one"
      seen[text] = key


@functools.cache
def world() -> Mapping[str, Domain]:
  """All domains by id, checked.

  Raises:
    ValueError: names the file, the key, what is wrong and the remedy.
  """
  return {p.stem: load(p) for p in sorted(WORLD.glob("*.yaml"))}


class Pool(NamedTuple):
  """The domains and the part of their templates a generator may draw from.

  Attributes:
    domains: sorted by id.
    part: "trained" or "held_back" templates and prompts, or "all".
    used: templates drawn before, which are drawn again only after the rest.
  """

  domains: tuple[Domain, ...]
  part: str
  used: set[str]

  def draw(self, rng: random.Random, texts: Sequence[str]) -> str:
    """One of `texts`, out of this pool's part."""
    if self.part == "trained":
      texts = [t for i, t in enumerate(texts) if (i + 1) % HELD_BACK]
    elif self.part == "held_back":
      texts = [t for i, t in enumerate(texts) if not (i + 1) % HELD_BACK]
    text = rng.choice([t for t in texts if t not in self.used] or texts)
    self.used.add(text)
    return text

  def choose(self, rng: random.Random) -> list[Domain]:
    """Up to 6 domains in random order, no two of them akin."""
    chosen: list[Domain] = []
    for domain in rng.sample(self.domains, len(self.domains)):
      if not any({domain.id, c.id} <= akin for c in chosen for akin in AKIN):
        chosen.append(domain)
    return chosen[:6]


def pool(split: str) -> Pool:
  """Domains of a split, and which of their texts.

  Args:
    split: "train"; "wide", those and more domains; "seen", the held-back texts
      of the domains of "train"; or "unseen", other domains.

  Raises:
    ValueError: if the split is unknown or has too few domains.
  """
  parts = {
    "train": (("train",), "trained"),
    "wide": (("train", "wide"), "trained"),
    "seen": (("train",), "held_back"),
    "unseen": (("unseen",), "all"),
  }
  if split not in parts:
    raise ValueError(f"split={split!r}: must be one of {', '.join(parts)}")
  which, part = parts[split]
  domains = tuple(d for d in world().values() if d.split in which)
  if len(domains) < 4:
    raise ValueError(
      f"split={split!r}: {len(domains)} domains in {WORLD}; at least 4 needed"
    )
  return Pool(domains, part, set())
