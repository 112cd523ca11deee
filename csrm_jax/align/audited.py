"""The audit of a finished alignment run, from what its workdir holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.special import expit

from csrm_jax import storage
from csrm_jax.align import feedback
from csrm_jax.align import report as reports
from csrm_jax.align.evaluation import responses
from csrm_jax.config import Config
from csrm_jax.data import contract
from csrm_jax.eval import audit, judges, overoptimisation
from csrm_jax.eval.checks_policy import Sample
from csrm_jax.eval.overoptimisation import Point
from csrm_jax.judge import SHIPPED, load
from csrm_jax.spec import Spec

Line = Mapping[str, Any]
_AROUND = 2  # updates on each side whose mean KL is that of a checkpoint


def audit_run(
  workdir: str | Path,
  output: str | Path,
  *,
  gold: str = "",
  allowed: str = "",
) -> dict[str, dict[str, Any]]:
  """Audits the first against the last evaluation, one spec after the other.

  Checkpoints in between count as points where both judges were asked about
  them: where gold is the run's own `align.monitor`.

  Args:
    workdir: of a run of launch/align.py.
    output: folder; each spec's report goes to a folder of its name in it.
    gold: folder of the judge that had no part in training; "": the monitor.
    allowed: "FIELD=VALUE": of the file of prompts, rows with that value are
      such that the spec allows an answer, all others such that it does not.
      "": unknown.

  Returns:
    What `audit.audit` found, by the name of the constraint.

  Raises:
    ValueError: not a run that was evaluated twice, no gold, prompts without
      the field.
  """
  run = reports.read(workdir)
  config: Config = ConfigDict(run["config"])
  gold = gold or config.align.monitor
  if not gold:
    raise ValueError(
      f"{workdir}: the run asked no second judge; name one, --gold=FOLDER"
    )
  by_step = responses(Path(workdir))
  if len(by_step) < 2:
    raise ValueError(
      f"{workdir}: evaluated at steps {list(by_step)} only; an audit wants"
      " responses from before and after"
    )
  permits = _permits(config.align.prompts, allowed) if allowed else {}
  judge = judges.csrm(load(config.align.judge or str(SHIPPED)))
  second = judges.csrm(load(gold))
  found = {}
  for constraint in feedback.constraints(config):
    name = constraint.name
    folder = Path(output) / name
    folder.mkdir(parents=True, exist_ok=True)
    found[name] = audit.audit(
      judge,
      second,
      _samples(by_step, constraint.spec, permits),
      kl=_kl(run["updates"], max(by_step)),
      points=_points(by_step, run["updates"], name)
      if gold == config.align.monitor
      else (),
    )
    audit.report(found[name], folder)
  storage.write_json(
    Path(output) / "failed.json", {k: v["failed"] for k, v in found.items()}
  )
  return found


def _samples(
  by_step: Mapping[int, Sequence[Line]], spec: Spec, permits: Mapping[str, bool]
) -> list[Sample]:
  first, last = (by_step[step] for step in (min(by_step), max(by_step)))
  return [
    Sample(
      id=str(a["id"]),
      family=str(a["id"]),
      prompt=a["messages"][:-1],
      spec=spec,
      before=a["messages"][-1]["content"],
      after=b["messages"][-1]["content"],
      allowed=permits.get(a["messages"][-2]["content"]),
    )
    for a, b in zip(first, last, strict=True)
  ]


def _kl(updates: Sequence[Line], step: int) -> float:
  """Nats at a step: the mean over the updates around it, as each is noisy."""
  if step == 0:
    return 0.0
  near = [u["kl"] for u in updates if abs(u["step"] - step) <= _AROUND]
  return max(0.0, float(np.mean(near)))


def _points(
  by_step: Mapping[int, Sequence[Line]], updates: Sequence[Line], name: str
) -> list[Point]:
  """Both judges at the evaluations between the first and the last."""
  between = sorted(by_step)[1:-1]
  return [
    overoptimisation.point(
      f"update {step}",
      _kl(updates, step),
      expit(np.array([x["log_odds"][name] for x in by_step[step]])),
      expit(np.array([x["monitor_log_odds"][name] for x in by_step[step]])),
      [x["id"] for x in by_step[step]],
    )
    for step in between
  ]


def _permits(prompts: str, allowed: str) -> dict[str, bool]:
  """Whether an answer is allowed, by the text of the prompt.

  Raises:
    ValueError: no FIELD=VALUE, no file of prompts, or a row without it.
  """
  field, equals, value = allowed.partition("=")
  if not equals:
    raise ValueError(f"--allowed={allowed!r}: write FIELD=VALUE")
  if not Path(prompts).is_file():
    raise ValueError(
      f"--allowed={allowed!r}: align.prompts={prompts!r} of the run is no file"
    )
  found = {}
  for number, raw in contract.raw_lines(Path(prompts)):
    row = contract.parse_line(raw, f"{prompts}:{number}")
    if field not in row:
      raise ValueError(f"{prompts}:{number}: field '{field}': missing")
    prompt = row.get("prompt", row.get("messages"))
    if not isinstance(prompt, str):
      prompt = [m for m in prompt if m["role"] == "user"][-1]["content"]
    found[prompt] = str(row[field]) == value
  return found
