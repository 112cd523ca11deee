"""Draft, criticise, revise: one batch of prompts of a constitutional round."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from csrm_jax.align import constitution
from csrm_jax.align.prompts import Prompt
from csrm_jax.align.setup import Setup
from csrm_jax.align.speaker import Speaker
from csrm_jax.eval.refusals import refuses
from csrm_jax.types import Params

# What may become of a revision; the first five are never judged.
OUTCOMES = (
  "long",  # critic's or reviser's prompt had no room
  "empty",  # no critique, or no revision
  "cut",  # not one whole sentence before the room ended
  "identical",  # to the answer it was to revise
  "copied",  # begins as a demonstration's revision does
  "unscored",  # log-odds or helpfulness are not finite
  "not_above",  # log-odds did not rise
  "less_helpful",  # by more than align.constitutional.help_fall
  "accepted",
)


class Task(NamedTuple):
  """A prompt to work on: its name, and whether the spec permits to answer."""

  id: str
  allowed: bool
  prompt: Prompt


def work(
  setup: Setup, params: Params, some: Sequence[Task], *, number: int
) -> list[dict[str, Any]]:
  """Lines of revisions.jsonl for the `number`-th batch of prompts.

  A line has `id`, `allowed`, `prompt`, `draft` and `final` (`text`, `z`, `h`,
  `refuses`, `monitor`), `revisions` (`rule`, `critique`, `text`, `z`, `h`,
  `outcome`), `sampled` (`text`, `z`), and `failure`: why there is no draft to
  revise, "" if there is one. A number that there is not is null.
  """
  own = setup.config.align.constitutional
  key = jax.random.fold_in(jax.random.key(setup.config.seed + 5), number)
  keys = iter(jax.random.split(key, 2 + 2 * own.revisions))
  say = Speaker(setup, params)
  asked = [task.prompt for task in some]
  texts = say(asked, next(keys), drafting=True)
  lines = [_started(t, text) for t, text in zip(some, texts, strict=True)]
  _judge(setup, lines, [line["draft"] for line in lines])
  for line in lines:
    if not line["failure"] and not _scored(line["draft"]):
      line["failure"] = "unscored"
    line["final"] = dict(line["draft"])
  for turn in range(own.revisions):
    open_lines = [line for line in lines if not _over(line, own.patience)]
    critic_key, reviser_key = next(keys), next(keys)
    if open_lines:
      _revise(setup, say, open_lines, turn, critic_key, reviser_key)
  if own.preferences:
    _sample(setup, say, lines, next(keys))
  _monitor(setup, lines)
  return lines


def _started(task: Task, said: tuple[str, str]) -> dict[str, Any]:
  text, failure = said
  return {
    "id": task.id,
    "allowed": task.allowed,
    "prompt": list(task.prompt),
    "draft": {"text": text, "refuses": refuses(text)},
    "final": {},
    "revisions": [],
    "sampled": [],
    "failure": failure,
  }


def _judge(
  setup: Setup,
  lines: Sequence[dict[str, Any]],
  answers: Sequence[dict[str, Any]],
) -> None:
  """Adds `z`, `h` to answers of lines; `rules`, where the draw needs them."""
  told = [(x, y) for x, y in zip(lines, answers, strict=True) if y["text"]]
  for _, answer in told:
    answer |= {"z": None, "h": None}
  if not told:
    return
  talks = [_with(line, answer["text"]) for line, answer in told]
  asked = np.ones((len(talks), len(setup.bound)), bool)
  if setup.config.align.constitutional.draw == "uniform":
    asked[:, 1:] = False
  z = np.asarray(setup.compliance(talks, asked), np.float64)
  h = None if setup.reward is None else np.asarray(setup.reward(talks))
  for i, (_, answer) in enumerate(told):
    answer["z"] = _number(z[i, 0])
    answer["rules"] = [_number(x) for x in z[i, 1:]]
    if h is not None:
      answer["h"] = _number(h[i])
      answer["unhelpful"] = answer["h"] is None


def _scored(answer: dict[str, Any]) -> bool:
  return answer.get("z") is not None and not answer.get("unhelpful")


def _number(x: Any) -> float | None:
  """As JSON has it: null for what is not finite."""
  return float(x) if math.isfinite(float(x)) else None


def _with(line: dict[str, Any], text: str) -> Prompt:
  return [*line["prompt"], {"role": "assistant", "content": text}]


def _over(line: dict[str, Any], patience: int) -> bool:
  """No draft, or as many revisions as patience lasts were no better than it."""
  worse = sum(
    x.get("z") is None or x["z"] <= line["draft"]["z"]
    for x in line["revisions"]
  )
  return bool(line["failure"]) or worse >= patience


def _revise(
  setup: Setup,
  say: Speaker,
  lines: Sequence[dict[str, Any]],
  turn: int,
  critic_key: jax.Array,
  reviser_key: jax.Array,
) -> None:
  """One critique, where one is asked for, and one revision of each answer."""
  own, rules = setup.config.align.constitutional, setup.bound[1:]
  steps: list[dict[str, Any]] = []
  asked: list[Prompt] = []
  for line in lines:
    now = line["final"]
    which = constitution.draw(
      _odds(now.get("rules", []), len(rules)),
      how=own.draw,
      seed=setup.config.seed,
      name=f"{line['id']}/{turn}",
    )
    rule = constitution.rule_text(rules[which])
    steps.append({"rule": rules[which].name})
    asked.append(constitution.to_criticise(line["prompt"], now["text"], rule))
    steps[-1]["text_of_rule"] = rule
  found = [("", "")] * len(steps)
  if own.critique_length:
    found = say(asked, critic_key, critique=True)
  for step, (text, wrong) in zip(steps, found, strict=True):
    step |= {"critique": text, "text": "", "outcome": wrong}
    if own.wording != "demonstrated":  # it does not read the critique
      step["outcome"] = ""
  going = [i for i, step in enumerate(steps) if not step["outcome"]]
  orders = [
    constitution.to_revise(
      lines[i]["prompt"],
      lines[i]["final"]["text"],
      steps[i]["text_of_rule"],
      steps[i]["critique"],
      wording=own.wording,
    )
    for i in going
  ]
  if going:
    for i, (text, wrong) in zip(going, say(orders, reviser_key), strict=True):
      now = lines[i]["final"]["text"]
      steps[i] |= {"text": text, "outcome": wrong or unusable(text, now)}
  judged = [i for i, x in enumerate(steps) if x["text"] and not x["outcome"]]
  _judge(setup, [lines[i] for i in judged], [steps[i] for i in judged])
  fall = own.help_fall
  for line, step in zip(lines, steps, strict=True):
    del step["text_of_rule"]
    if not step["outcome"]:
      step["outcome"] = outcome(step, line["final"], line["draft"], fall)
    line["revisions"].append(step)
    if step["outcome"] == "accepted":
      kept = ("text", "z", "h", "rules")
      line["final"] = {k: step[k] for k in kept if k in step}
      line["final"]["refuses"] = refuses(step["text"])


def _odds(
  values: Sequence[float | None], count: int
) -> Float[np.ndarray, " k"]:
  """Log-odds of each principle, NaN where nobody asked."""
  known = list(values) or [None] * count
  return np.array([math.nan if x is None else x for x in known], np.float64)


def unusable(text: str, answer: str) -> str:
  """Why a revision is not even judged; "" if it is."""
  if text.split() == answer.split():
    return "identical"
  for shown in constitution.DEMONSTRATIONS:
    if text.startswith(shown.revision.split(". ")[0]):
      return "copied"
  return ""


def outcome(
  new: dict[str, Any],
  now: dict[str, Any],
  draft: dict[str, Any],
  help_fall: float,
) -> str:
  """Whether a revision takes the answer's place, and if not, why.

  Args:
    new: the revision, with `z` (log-odds) and `h` (helpfulness, None without
      a reward model).
    now: the answer that it revises.
    draft: the first answer: helpfulness is bound by it, so that it cannot
      fall a little with every revision.
    help_fall: most that helpfulness may fall.
  """
  if not _scored(new):
    return "unscored"
  if new["z"] <= now["z"]:
    return "not_above"
  if new["h"] is not None and new["h"] < draft["h"] - help_fall:
    return "less_helpful"
  return "accepted"


def _sample(
  setup: Setup, say: Speaker, lines: Sequence[dict[str, Any]], key: jax.Array
) -> None:
  """Further answers to each prompt and their log-odds, for soft labels."""
  count = setup.config.align.constitutional.preferences
  asked = [line["prompt"] for line in lines]
  found = say(asked, key, drafting=True, samples=count)
  for at, (text, wrong) in enumerate(found):
    lines[at // count]["sampled"].append({"text": text, "outcome": wrong})
  pairs = [(line, x) for line in lines for x in line["sampled"]]
  _judge(setup, [line for line, _ in pairs], [x for _, x in pairs])


def _monitor(setup: Setup, lines: Sequence[dict[str, Any]]) -> None:
  """What the judge that took no part says of draft and final answer."""
  if setup.monitor is None:
    return
  told = [
    (line, line[side])
    for line in lines
    for side in ("draft", "final")
    if line[side]["text"]
  ]
  if not told:
    return
  asked = np.zeros((len(told), len(setup.bound)), bool)
  asked[:, 0] = True
  talks = [_with(line, answer["text"]) for line, answer in told]
  z = setup.monitor(talks, asked)[:, 0]
  for (_, answer), value in zip(told, z, strict=True):
    answer["monitor"] = _number(value)
