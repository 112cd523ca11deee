"""Prompts of an alignment run: from a file, or from the synthetic world."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from csrm_jax.align import order
from csrm_jax.data import contract
from csrm_jax.data.domains import HELD_BACK, SLOT, Domain, world
from csrm_jax.data.template import Message

Prompt = list[Message]


def read(source: str, *, heldout: float) -> tuple[list[Prompt], list[Prompt]]:
  """(training, held-out) prompts, without repetitions.

  Args:
    source: "synthetic", "synthetic/DOMAIN,DOMAIN", or a JSON-lines file whose
      rows have a "prompt" (messages), or "messages" whose last, the
      assistant's, is left out.
    heldout: share of a file's prompts that is held out, every so many-th; of
      the synthetic world, whole templates are.

  Raises:
    ValueError: file, line, field and remedy; fewer than two prompts.
  """
  if source.split("/")[0] == "synthetic":
    return _synthetic(source)
  if not source or not Path(source).is_file():
    raise ValueError(
      f"--config.align.prompts={source!r}: no such file; give JSON lines with"
      ' a "prompt" each, or "synthetic", or "synthetic/DOMAIN,DOMAIN"'
    )
  prompts = _unique(_from_file(Path(source)))
  every = max(2, round(1 / heldout)) if heldout > 0 else len(prompts) + 1
  kept = [p for i, p in enumerate(prompts) if (i + 1) % every]
  apart = [p for i, p in enumerate(prompts) if not (i + 1) % every]
  if not kept or (heldout > 0 and not apart):
    raise ValueError(
      f"{source}: {len(prompts)} prompts; too few to hold out {heldout:.0%};"
      " add some, or set --config.align.heldout=0"
    )
  return kept, apart


def _from_file(path: Path) -> list[Prompt]:
  prompts = []
  for number, raw in contract.raw_lines(path):
    where = f"{path}:{number}"
    row = contract.parse_line(raw, where)
    if not isinstance(row, dict) or not {"prompt", "messages"} & row.keys():
      raise ValueError(
        f"{where}: field 'prompt': missing; give a text or a list of messages"
      )
    field = "prompt" if "prompt" in row else "messages"
    messages = row[field]
    if isinstance(messages, str):
      messages = [{"role": "user", "content": messages}]
    contract.check_messages(messages, field, where, response=False)
    if field == "messages" and messages and messages[-1]["role"] == "assistant":
      messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
      raise ValueError(
        f"{where}: field '{field}': nothing to answer; end with a message of"
        " the user"
      )
    prompts.append(messages)
  return prompts


def _synthetic(source: str) -> tuple[list[Prompt], list[Prompt]]:
  """Every prompt template of the domains, with two fillings each."""
  names = [n for n in source.partition("/")[2].split(",") if n]
  domains = world()
  for name in names:
    if name not in domains:
      raise ValueError(
        f"--config.align.prompts={source}: no domain {name!r}; use some of"
        f" {', '.join(domains)}"
      )
  names = names or [d.id for d in domains.values() if d.split == "train"]
  kept: list[Prompt] = []
  apart: list[Prompt] = []
  for name in names:
    domain = domains[name]
    for i, template in enumerate(domain.prompts):
      side = kept if (i + 1) % HELD_BACK else apart
      side += [_filled(domain, template, i, turn) for turn in range(2)]
  return _unique(kept), _unique(apart)


def _filled(domain: Domain, template: str, index: int, turn: int) -> Prompt:
  rng = random.Random(f"prompt/{domain.id}/{index}/{turn}")
  text = SLOT.sub(lambda m: rng.choice(domain.slots[m.group(1)]), template)
  return [{"role": "user", "content": text[0].upper() + text[1:]}]


def _unique(prompts: Sequence[Prompt]) -> list[Prompt]:
  return list({json.dumps(p): p for p in prompts}.values())


def batch(
  prompts: Sequence[Prompt], *, seed: int, step: int, count: int
) -> list[Prompt]:
  """The `count` prompts of update `step`: a pure function of its arguments.

  Every prompt comes once before any comes twice.
  """
  n = len(prompts)
  chosen = order.turn(n, name="prompts", seed=seed, step=step, count=count)
  return [prompts[i] for i in chosen]
