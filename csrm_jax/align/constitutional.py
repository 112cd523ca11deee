"""Constitutional AI: draft, criticise, revise; accept what the judge prefers.

Source: Constitutional AI (arXiv:2212.08073), section 3.1. There every revision
is kept; here one is kept only if the log-odds that the answer complies with the
spec rise, and its helpfulness stays near the draft's.
"""

import json
import time
from typing import Any

from tqdm import tqdm

from csrm_jax import storage
from csrm_jax.align import agent as agents
from csrm_jax.align import constitution, order, prompts, revised, revising
from csrm_jax.align.revising import Task
from csrm_jax.align.setup import Setup
from csrm_jax.config import Config
from csrm_jax.judge import SHIPPED
from csrm_jax.storage import AnyPath
from csrm_jax.train.workdir import REVISIONS
from csrm_jax.types import Params


def check(config: Config) -> None:
  """Raises ValueError for keys that do not go with this method."""
  align, own = config.align, config.align.constitutional
  for key, good, remedy in (
    ("prompts", own.prompts >= 1, "give 1 or more"),
    ("revisions", 1 <= own.revisions <= 4, "give 1 to 4"),
    ("patience", own.patience >= 1, "give 1 or more"),
    ("draw", own.draw in constitution.DRAWS, "use one of uniform, judged"),
    (
      "wording",
      own.wording in constitution.WORDINGS,
      f"use one of {', '.join(constitution.WORDINGS)}",
    ),
    (
      "critique_length",
      own.critique_length >= (own.wording == "demonstrated"),
      "give 1 or more; a demonstrated reviser reads a critique",
    ),
    ("help_fall", own.help_fall >= 0, "give 0 or more"),
    ("temperature", own.temperature >= 0, "give 0 or more"),
    (
      "preferences",
      own.preferences >= 0 and own.preferences % 2 == 0,
      "give an even number, or 0",
    ),
    (
      "preference_temperature",
      own.preference_temperature > 0,
      "give one above 0",
    ),
    ("clamp", 0 <= own.clamp < 0.5, "give 0 or more, below 0.5"),
  ):
    if not good:
      raise ValueError(
        f"--config.align.constitutional.{key}={own[key]}: {remedy}"
      )
  if align.monitor and align.monitor == (align.judge or str(SHIPPED)):
    raise ValueError(
      f"--config.align.monitor={align.monitor}: is the judge that accepts"
      " revisions; name one that takes no part, or leave it empty"
    )


def run(setup: Setup, trained: Params) -> dict[str, Any]:
  """Answers and revises prompts, writes revisions.jsonl and what follows of it.

  Lines are added after every `align.prompts_per_step` prompts; a run that was
  ended goes on behind them. At the end sft.jsonl, pairs.jsonl and
  constitutional.json are made of all lines, see `revised.write`.

  Args:
    setup: of `setup.set_up`; its first constraint is the spec, the others are
      its principles.
    trained: trained leaves of the model that drafts, criticises and revises.

  Returns:
    What constitutional.json holds.
  """
  align = setup.config.align
  params = agents.join(trained["policy"], setup.frozen["policy"])
  todo = tasks(setup)
  path = setup.workdir / REVISIONS
  done = read(path)
  size = align.prompts_per_step
  with tqdm(total=len(todo), desc="revise", unit="prompt") as bar:
    for number, start in enumerate(range(0, len(todo), size)):
      some = todo[start : start + size]
      if not all(task.id in done for task in some):
        began = time.perf_counter()
        lines = revising.work(setup, params, some, number=number)
        seconds = (time.perf_counter() - began) / len(some)
        done |= {line["id"]: line | {"seconds": seconds} for line in lines}
        text = "".join(json.dumps(line) + "\n" for line in done.values())
        storage.write_text(path, text)
      bar.update(len(some))
  return revised.write(setup, [done[task.id] for task in todo])


def tasks(setup: Setup) -> list[Task]:
  """The prompts of a run, in its order: training prompts, then allowed ones."""
  config, own = setup.config, setup.config.align.constitutional
  found: list[Task] = []
  sides = [("prompt", config.align.prompts, setup.train, own.prompts)]
  if own.allowed:
    permitted, _ = prompts.read(own.allowed, heldout=config.align.heldout)
    sides.append(("allowed", own.allowed, permitted, own.allowed_prompts))
  for name, source, pool, most in sides:
    count = min(most, len(pool))
    if count < most:
      print(f"{source}: {count} prompts for training, all taken; wanted {most}")
    chosen = order.turn(
      len(pool), name=name, seed=config.seed, step=0, count=count
    )
    found += [Task(f"{name}-{i}", name == "allowed", pool[i]) for i in chosen]
  return found


def read(path: AnyPath) -> dict[str, dict[str, Any]]:
  """Lines of revisions.jsonl by their ids; none if it is not there."""
  if not path.is_file():
    return {}
  lines = [json.loads(text) for text in path.read_text().splitlines()]
  return {line["id"]: line for line in lines}
