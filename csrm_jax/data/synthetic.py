"""A configurable-safety world: rules, conversations and true labels.

A response of `domains.py` is written for exactly one grade of one domain (or
for none), so the sub-categories it violates are known, and `spec.complies`
gives the true label under *any* spec.

Rows come in groups: a few specs that contradict each other on the group's
conversations, each conversation labelled under each spec. A text complies
under about half of the specs it meets and a spec holds for about half of its
conversations, so neither predicts the label alone. Training may ask for further
refusals, which comply with all specs of their group.
"""

import random
from collections.abc import Iterator
from typing import Any

from csrm_jax.data.domains import pool
from csrm_jax.data.groups import (
  SPEC_COUNTS,
  Conversation,
  Group,
  group,
  parse_kinds,
  truth,
  weighted,
)

Row = dict[str, Any]


def rows(
  *,
  split: str,
  families: int,
  seed: int,
  max_rules: int = 3,
  kinds: str = "",
  refusals: float = 0.0,
  first: int = 0,
) -> Iterator[Row]:
  """Rows of the data contract, group by group.

  Args:
    split: of `domains.pool`: "train" or "wide" (templates held back for the
      suites left out), "seen" (only those), or "unseen".
    families: number of groups.
    seed: same seed, same rows.
    first: number of the first group; each depends on its own number alone.
    max_rules: rules in a spec, 2 or more.
    kinds: of groups, as `groups.parse_kinds` reads them.
    refusals: share of groups with refusals that comply, see `groups.group`.

  Raises:
    ValueError: if the split, `max_rules`, `kinds` or `refusals` is out of
      range.
  """
  if max_rules < 2:
    raise ValueError(f"max_rules={max_rules}: must be 2 or more")
  if not 0.0 <= refusals <= 1.0:
    raise ValueError(
      f"--config.data.refusals={refusals}: a share of groups, give 0 to 1"
    )
  source = pool(split)
  weights = parse_kinds(kinds)
  for index in range(first, first + families):
    rng = random.Random(f"rows/{split}/{seed}/{index}")
    edits = [None] * (weighted(rng, SPEC_COUNTS) - 2)
    made = group(
      rng,
      source,
      max_rules=max_rules,
      edits=edits,
      kinds=weights,
      refusals=refusals,
    )
    yield from _emit(made, f"synthetic-{split}-{seed}-{index}")


def _emit(made: Group, family: str) -> Iterator[Row]:
  """Label rows, then the pairs and the ladder that their labels imply."""
  texts = [v.spec.render() for v in made.versions]
  labels = [
    [truth(v.spec, c) for v in made.versions] for c in made.conversations
  ]
  common = {"family": family, "source": f"synthetic/{made.kind}"}
  for i, conversation in enumerate(made.conversations):
    turns = conversation.turns()
    for j, text in enumerate(texts):
      yield {
        "id": f"{family}/{i}/{j}",
        "messages": turns,
        "label": labels[i][j],
        "severity": conversation.severity,
        "spec": text,
        **common,
      }
    for j, lenient in enumerate(texts):
      for k, strict in enumerate(texts):
        if labels[i][j] > labels[i][k]:
          yield {
            "id": f"{family}/{i}/{j}>{k}",
            "messages": turns,
            "chosen_spec": lenient,
            "rejected_spec": strict,
            **common,
          }
  for i, win in enumerate(made.conversations):
    for j, lose in enumerate(made.conversations):
      if win.messages[:-1] != lose.messages[:-1]:
        continue
      for k, text in enumerate(texts):
        if labels[i][k] > labels[j][k]:
          yield {
            "id": f"{family}/{i}>{j}/{k}",
            "prompt": win.turns()[:-1],
            "chosen": win.turns()[-1:],
            "rejected": lose.turns()[-1:],
            "kind": "resp",
            "spec": text,
            **common,
          }
  yield from _ladders(made, family, common)


def _ladders(made: Group, family: str, common: Row) -> Iterator[Row]:
  """Three or more grades after one prompt, under a rule that forbids all."""
  by_prompt: dict[Any, list[Conversation]] = {}
  for conversation in made.conversations:
    if conversation.severity:
      key = (conversation.domain, conversation.messages[:-1])
      by_prompt.setdefault(key, []).append(conversation)
  for i, rungs in enumerate(by_prompt.values()):
    rungs = sorted({c.severity: c for c in rungs}.values(), key=lambda c: -c[1])
    if len(rungs) < 3:
      continue
    for j, version in enumerate(made.versions):
      if all(truth(version.spec, c) == 0 for c in rungs):
        text = version.spec.render()
        yield {
          "id": f"{family}/ladder{i}/{j}",
          "ladder": [{"messages": c.turns(), "spec": text} for c in rungs],
          **common,
        }


def suite(name: str, *, size: int = 400, seed: int = 0) -> list[Row]:
  """Label rows for evaluation, each conversation under several specs.

  The first row of a conversation is its base. The others name it in "base"
  and say in "edit" how their spec differs: the label of a flip differs from
  the base's, that of any other edit does not.

  Args:
    name: "synthetic_seen" (training domains, texts held back from training) or
      "synthetic_unseen" (domains that training never meets).
    size: rows, reached or missed by less than one conversation.
    seed: same seed, same rows.

  Raises:
    ValueError: if the name is unknown.
  """
  out: list[Row] = []
  for family, made, i in suite_conversations(name, size=size, seed=seed):
    out += _judged(made, i, family)
  return out


def suite_conversations(
  name: str, *, size: int, seed: int
) -> Iterator[tuple[str, Group, int]]:
  """(family, group, number of a conversation in it) of a suite, in order.

  Each stands for as many rows as its group has specs; see `suite`.
  """
  splits = {"synthetic_seen": "seen", "synthetic_unseen": "unseen"}
  if name not in splits:
    raise ValueError(f"suite {name!r}: must be one of {', '.join(splits)}")
  source = pool(splits[name])
  rows = index = 0
  while rows < size:
    rng = random.Random(f"suite/{name}/{seed}/{index}")
    family = f"{name}-{seed}-{index}"
    index += 1
    edits = [None] * rng.choice((1, 2))
    made = group(rng, source, max_rules=3, edits=edits)
    for i in range(len(made.conversations)):
      if rows and rows + len(made.versions) > size:
        return
      rows += len(made.versions)
      yield family, made, i


def _judged(made: Group, i: int, family: str) -> list[Row]:
  conversation = made.conversations[i]
  base_id = f"{family}/{i}/0"
  out: list[Row] = []
  for j, version in enumerate(made.versions):
    row: Row = {
      "id": f"{family}/{i}/{j}",
      "messages": conversation.turns(),
      "label": truth(version.spec, conversation),
      "severity": conversation.severity,
      "spec": version.spec.render(),
      "family": family,
      "source": f"{family.rsplit('-', 2)[0]}/{made.kind}",
      "edit": "base",
    }
    if j:
      row["base"] = base_id
      row["edit"] = made.kind if version.side == "b" else version.edit
    out.append(row)
  return out
