"""Annotated conversations to augment, and what their sets can be ruled on."""

import random
from collections.abc import Iterator
from pathlib import Path

from csrm_jax.data import contract, domains, groups
from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.domains import Domain
from csrm_jax.data.sets import beavertails
from csrm_jax.spec import Rule, Subcategory, Truth

# Rules that no spec of ours permits, for `augment(never=...)`.
BEAVERTAILS_NEVER = ("child_abuse",)
_WORDINGS = 6  # of a rule of the synthetic world

# -- The synthetic world --------------------------------------------------


def synthetic_taxonomy(split: str = "train") -> Taxonomy:
  """One forbid rule per domain, its grades as sub-categories.

  Args:
    split: "train" and "seen" have the training domains, "unseen" the others.

  Raises:
    ValueError: unknown split.
  """
  rules, wordings = [], {}
  for domain in domains.pool(split).domains:
    rng = random.Random(f"taxonomy:{domain.id}")
    found = [_graded(domain, 0)]
    found += [_graded(domain, i) for i in range(1, _WORDINGS // 2)]
    found += [groups.word(rng, groups.Clause(domain, "forbid"))]
    plain = list(
      dict.fromkeys(r.model_copy(update={"id": domain.id}) for r in found)
    )
    rules.append(plain[0])
    wordings[domain.id] = tuple(plain[1:])
  return Taxonomy(_name(split), tuple(rules), wordings)


def _name(split: str) -> str:
  return "synthetic_unseen" if split == "unseen" else "synthetic"


def _graded(domain: Domain, wording: int) -> Rule:
  return Rule(
    id=domain.id,
    title=domain.titles[wording % len(domain.titles)],
    polarity="forbid",
    subcategories=tuple(
      Subcategory(
        id=f"{domain.id}.{g.severity}",
        title=g.describe[wording % len(g.describe)],
        severity=g.severity,
      )
      for g in domain.grades
    ),
    domain=domain.id,
  )


def synthetic_annotated(
  *, split: str, prompts: int, seed: int, first: int = 0
) -> Iterator[Annotated]:
  """Conversations of the synthetic world, 3 or 4 responses to a prompt.

  What a response does in domains akin to its own is unknown: a reader might
  find it there too.

  Args:
    split: "train", "seen" (templates held back from training) or "unseen".
    prompts: number of prompts; equal ones are one family.
    seed: same seed, same conversations.
    first: number of the first prompt; each depends on its own number alone.

  Raises:
    ValueError: unknown split.
  """
  pool = domains.pool(split)
  for index in range(first, first + prompts):
    name = f"synthetic-{split}-{seed}-p{index}"
    rng = random.Random(name)
    drawn = pool._replace(used=set())
    domain = rng.choice(pool.domains)
    grades = rng.sample(range(1, len(domain.grades) + 1), 2)
    others = rng.sample(("neutral", "refusal"), rng.choice((1, 1, 2)))
    kinds = [*grades, *others]
    found = groups.converse(rng, drawn, domain, kinds)
    prompt = "\n".join(text for _, text in found[0].messages[:-1])
    for i, made in enumerate(found):
      yield Annotated(
        id=f"{name}/{i}",
        family=contract.hash_family(prompt),
        messages=made.messages,
        violated=_violated(domain, made, pool.domains),
        refusal=1 if made.refusal else 0,
        severity=made.severity,
        helpfulness=None,
        taxonomy=_name(split),
        source="synthetic",
      )


def _violated(
  own: Domain, made: groups.Conversation, known: tuple[Domain, ...]
) -> dict[str, Truth]:
  """Every grade of every domain; a refusal breaks none anywhere."""
  akin = set().union(*(a for a in domains.AKIN if own.id in a))
  out: dict[str, Truth] = {}
  for domain in known:
    for grade in domain.grades:
      key = f"{domain.id}.{grade.severity}"
      if domain.id == own.id:
        out[key] = 1 if grade.severity == made.severity else 0
      else:
        out[key] = None if domain.id in akin and not made.refusal else 0
  return out


# -- BeaverTails ----------------------------------------------------------


def beavertails_taxonomy() -> Taxonomy:
  """The 14 categories in four wordings of ours each; no severities."""
  rules, wordings = [], {}
  for category, harm in beavertails.HARMS.items():
    found = [
      Rule(id=category, title=title, guideline=text, polarity="forbid")
      for title in ("", harm.title)
      for text in (harm.short, harm.long)
    ]
    rules.append(found[0])
    wordings[category] = tuple(found[1:])
  return Taxonomy("beavertails", tuple(rules), wordings)


def beavertails_annotated(path: str | Path | None) -> Iterator[Annotated]:
  """Responses ticked with categories; one that is ticked is no refusal.

  Whether the others are refusals is unknown.

  Args:
    path: folder of the real sets.

  Raises:
    ValueError: the file is missing or broken, or has an unknown category.
  """
  (file,) = beavertails.FILES
  found = contract.find(path, "beavertails", file)
  fields = ("id", "prompt", "response", "categories")
  for raw in contract.objects(found, fields):
    ticked = tuple(sorted(raw["categories"]))
    if unknown := sorted(set(ticked) - set(beavertails.CATEGORIES)):
      raise ValueError(
        f"{found}: row {raw['id']!r}: field 'categories': {unknown[0]!r} is "
        "none of the 14; use the original file"
      )
    yield Annotated(
      id=raw["id"],
      family=contract.hash_family(raw["prompt"]),
      messages=(("user", raw["prompt"]), ("assistant", raw["response"])),
      violated=beavertails.annotation(ticked),
      refusal=0 if ticked else None,
      severity=None,
      helpfulness=None,
      taxonomy="beavertails",
      source="beavertails",
    )
