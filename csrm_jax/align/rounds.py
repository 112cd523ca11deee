"""Rounds: align, have responses labelled, refit the judge, align again."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from scipy.special import expit

from csrm_jax import storage
from csrm_jax.align import feedback, order, prompts, rollout
from csrm_jax.align import setup as setups
from csrm_jax.align.feedback import (
  ComplianceFunction,
  Constraint,
  RewardFunction,
)
from csrm_jax.align.rollout import Rollouts
from csrm_jax.align.run import POLICY, align
from csrm_jax.config import Config, from_file
from csrm_jax.data import contract
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.judge import SHIPPED, load
from csrm_jax.model import reward as reward_models
from csrm_jax.storage import AnyPath
from csrm_jax.train import loop

ROWS = "rows.jsonl"
JUDGE = "judge"


def align_rounds(
  config: Config,
  workdir: str | AnyPath,
  *,
  reward: RewardFunction | None = None,
  compliance: ComplianceFunction | None = None,
) -> dict[str, Any]:
  """`align.rounds` runs, each from the policy of the one before.

  Between two rounds responses of the policy to training prompts are labelled
  (`relabel`), and if `align.refit` names a config file, the judge is trained on
  the rows of all rounds so far. Each round is a workdir, WORKDIR/round-1 and
  so on; what is finished is not done again.

  Args:
    config: of `config.default()`.
    workdir: a folder of this machine.
    reward: as for `run.align`.
    compliance: as for `run.align`; labels responses as well. Not together with
      `align.refit`, which would have no effect.

  Returns:
    What the last round's result.json holds, and "round".

  Raises:
    ValueError: as `run.align` and `train.loop.fit`; a method without a policy;
      the workdir is remote.
  """
  workdir = storage.path(workdir)
  _check(config, workdir, compliance)
  result: dict[str, Any] = {}
  for number in range(1, config.align.rounds + 1):
    folder = Path(workdir) / f"round-{number}"
    current = _round(config, Path(workdir), number)
    result = align(current, folder, reward=reward, compliance=compliance)
    result = result | {"round": number}
    if "params_sha256" not in result or number == config.align.rounds:
      return result
    rows = folder / ROWS
    if not rows.is_file():
      earlier = folder.with_name(f"round-{number - 1}") / ROWS
      before = earlier.read_text("utf-8") if earlier.is_file() else ""
      made = relabel(current, folder / POLICY, number, compliance=compliance)
      text = before + "".join(json.dumps(row) + "\n" for row in made)
      storage.write_text(rows, text)
    if config.align.refit:
      fitted = loop.fit(refit_config(current, rows), folder / JUDGE)
      if "params_sha256" not in fitted:
        return result
  return result


def _check(
  config: Config, workdir: AnyPath, compliance: ComplianceFunction | None
) -> None:
  chosen = config.align
  if storage.is_remote(workdir):
    raise ValueError(f"--workdir={workdir}: align.rounds needs a local folder")
  if chosen.rounds < 1 or chosen.method in setups.UNTRAINED:
    raise ValueError(
      f"--config.align.rounds={chosen.rounds}, method {chosen.method!r}: give 1"
      " or more rounds of a method that trains a policy"
    )
  if chosen.refit and not Path(chosen.refit).is_file():
    raise ValueError(
      f"--config.align.refit={chosen.refit}: no such file; name a config file,"
      " such as configs/demo.py"
    )
  if chosen.refit and compliance is not None:
    raise ValueError(
      f"--config.align.refit={chosen.refit} refits the judge, but compliance="
      " stands in its place; leave one of them out"
    )


def _round(config: Config, workdir: Path, number: int) -> Config:
  """The configuration of one round."""
  current = config.copy_and_resolve_references()
  current.align.rounds = 1
  current.seed = config.seed + number - 1  # other prompts, other samples
  if number > 1:
    before = workdir / f"round-{number - 1}"
    current.model.path = str(before / POLICY)
    current.model.tokenizer = "auto"
    if config.align.refit:
      current.align.judge = str(before / JUDGE)
  return current


def refit_config(config: Config, rows: Path) -> Config:
  """The recipe of `align.refit` on the rows of a round.

  It begins with the round's judge; where that is the shipped one, with the
  model that the recipe names.
  """
  recipe = from_file(config.align.refit)
  recipe.data.source = "jsonl"
  recipe.data.path = str(rows)
  if config.align.judge:
    recipe.model.path = config.align.judge
    recipe.model.tokenizer = "auto"
  return recipe


def relabel(
  config: Config,
  policy: Path,
  number: int,
  *,
  compliance: ComplianceFunction | None = None,
) -> list[contract.Row]:
  """Rows of the data contract out of a policy's responses.

  `align.samples` (two at least) responses to `align.relabel_prompts` training
  prompts are judged under every constraint, by `align.labeller` or else by the
  round's judge.

  Args:
    config: of the round.
    policy: its folder.
    number: of the round.
    compliance: in place of the labeller.
  """
  chosen = config.align
  bound = feedback.constraints(config)
  if compliance is None:
    where = chosen.labeller or chosen.judge or str(SHIPPED)
    compliance = feedback.compliance_of(load(where), bound)
  train, _ = prompts.read(chosen.prompts, heldout=chosen.heldout)
  count = min(chosen.relabel_prompts, len(train))
  picked = order.turn(
    len(train), name="relabel", seed=config.seed, step=0, count=count
  )
  model, load_params = reward_models.make(
    config.model,
    path=str(policy),
    row_length=chosen.prompt_length + chosen.response_length,
    language_model=True,
  )
  key = jax.random.key(config.seed)
  sampled = rollout.sample(
    model,
    load_params(key),
    tokenizers.load(policy),
    [train[i] for i in picked],
    key=jax.random.fold_in(key, 4),
    samples=max(2, chosen.samples),
    prompt_length=chosen.prompt_length,
    response_length=chosen.response_length,
    temperature=chosen.temperature,
    spec=feedback.policy_spec(config, bound),
    on_long="cut",
  )
  asked = np.ones((len(sampled.messages), len(bound)), bool)
  z = np.asarray(compliance(sampled.messages, asked))
  return rows_of(sampled, z, bound, name=f"round-{number}")


def rows_of(
  sampled: Rollouts,
  log_odds: Float[np.ndarray, "n k"],
  bound: list[Constraint],
  *,
  name: str,
) -> list[contract.Row]:
  """A label row a response and spec, a pair a prompt and spec.

  Blank responses and repeated ones are left out and counted on the screen. The
  label is the probability of compliance; a pair is the best and the worst
  response of a prompt, unless they tie.
  """
  rows: list[contract.Row] = []
  kept: dict[tuple[int, str], int] = {}
  blank = 0
  for i, text in enumerate(sampled.texts):
    if not text.strip():
      blank += 1
    else:
      kept.setdefault((int(sampled.prompt[i]), text), i)
  again = len(sampled.texts) - blank - len(kept)
  print(f"{name}: {len(kept)} responses labelled; {blank} blank, {again} twice")
  for k, constraint in enumerate(bound):
    spec = constraint.spec.render()
    groups: dict[int, list[int]] = {}
    for i in kept.values():
      groups.setdefault(int(sampled.prompt[i]), []).append(i)
      rows.append(
        {
          "id": f"{name}-{k}-{i}",
          "messages": list(sampled.messages[i]),
          "label": float(expit(np.float64(log_odds[i, k]))),
          "spec": spec,
          "source": name,
        }
      )
    for prompt, some in groups.items():
      best = max(some, key=lambda i: float(log_odds[i, k]))
      worst = min(some, key=lambda i: float(log_odds[i, k]))
      if log_odds[best, k] > log_odds[worst, k]:
        rows.append(
          {
            "id": f"{name}-{k}-pair-{prompt}",
            "prompt": list(sampled.messages[best][:-1]),
            "chosen": list(sampled.messages[best][-1:]),
            "rejected": list(sampled.messages[worst][-1:]),
            "kind": "resp",
            "spec": spec,
            "source": name,
          }
        )
  return rows
