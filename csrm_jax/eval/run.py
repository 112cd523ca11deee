"""Evaluation: suites x judges to a report."""

import collections
import functools
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from csrm_jax import metrics, storage
from csrm_jax.data import contract, template
from csrm_jax.eval import cases as editing
from csrm_jax.eval import (
  endpoint,
  failures,
  plots,
  protocols,
  recipes,
  sensitivity,
  suites,
)
from csrm_jax.eval import judges as judging
from csrm_jax.eval import output as writing
from csrm_jax.eval.gaps import unseen_gaps
from csrm_jax.eval.judges import Judge, Row
from csrm_jax.eval.measured import key_of, remember
from csrm_jax.eval.suites import Suite
from csrm_jax.judge import load
from csrm_jax.storage import AnyPath

OURS = {"csrm", "spec_shuffled"}  # judges that are the model itself
# Environment variable with the API key of "endpoint:" judges.
ENDPOINT_KEY = "CSRM_ENDPOINT_KEY"


class Model(NamedTuple):
  """The model under evaluation.

  Attributes:
    judge: its calibrated log-odds.
    facts: what the report says of it: fingerprints, temperature.
    temperature: that the log-odds were divided by.
    cut: counts the rows that it shortened to its context.
    fits: raises ValueError for a row that it cannot read.
  """

  judge: Judge
  facts: dict[str, Any]
  temperature: float
  cut: collections.Counter[str]
  fits: Callable[[Row], object] = lambda row: None


def evaluate(
  model: str | AnyPath | Judge,
  suite_names: str | Sequence[str],
  *,
  data: str | Path | None = None,
  output: str | AnyPath | None = None,
  judge_names: Sequence[str] = judging.NAMES,
  train_rows: str | Path | None = None,
  rows: int = 0,
  protocol: Sequence[str] = (),
  probe: int = 0,
  bootstrap: int = 500,
  seed: int = 0,
  on_bad_row: str = "stop",
) -> dict[str, Any]:
  """Judges suites with a model and its baselines.

  Args:
    model: a workdir, a checkpoint or a Hugging Face folder, here or gs://; or
      any judge, a function from rows to log-odds.
    suite_names: of `suites.read`, or "real" for all of `real.REAL`; one string
      joined by commas or several.
    data: folder of real sets or of prepared rows.
    output: where the report goes, here or gs://, usually report.json;
      rows.jsonl, the PNGs, a page (.html) and, with probes, probes.md go beside
      it. None: nothing is written.
    judge_names: of `judges.NAMES` and `judges.BASELINES`, "hf:FOLDER",
      "endpoint:MODEL@URL" (key in the environment, `ENDPOINT_KEY`), or any
      model that `judge.load` takes.
    train_rows: .jsonl file that baselines learn from; default: the rows that
      the model was trained on.
    rows: of each suite, by whole families; 0: all, or the suite's own number.
    protocol: of `protocols.NAMES`, for all judges.
    probe: cases of each suite for the sensitivity report and the failure
      checks of every judge; 0: neither is made.
    bootstrap: resamples of conversation families for the 95 % intervals.
    seed: of synthetic suites, of the shuffled specs and of the resamples.
    on_bad_row: of suites that are files. "stop" raises at the first bad row,
      "quarantine" writes bad rows to OUTPUT.quarantine.jsonl and judges the
      others.

  Returns:
    The report, as written.

  Raises:
    ValueError: an unknown suite or judge, a bad row, a folder without model,
      or a rows.jsonl beside `output` that no evaluation wrote.
  """
  began = time.perf_counter()
  if output is not None:
    output = storage.path(output, flag="--output")
    writing.check(output)
  suite_names = suites.names(suite_names)
  _check_judges(judge_names)
  contract.check_option(on_bad_row, output, "output=")
  folder = None if callable(model) else recipes.here(model)
  # A wrong suite is told before a model is opened.
  opened = functools.cache(lambda: open_model(model))
  aside: dict[str, list[dict[str, Any]]] = {name: [] for name in suite_names}
  loaded = [
    suites.read(
      name,
      data=data,
      model=folder,
      rows=rows,
      seed=seed,
      fits=lambda row: opened().fits(row),
      aside=aside[name] if on_bad_row == "quarantine" else None,
    )
    for name in suite_names
  ]
  entry = opened()
  asked = entry._replace(judge=protocols.under(entry.judge, protocol))
  panel, notes = _panel(
    asked, judge_names, folder, train_rows, data, loaded, seed
  )
  for name in panel.keys() - OURS:
    # The same text may stand in several suites.
    panel[name] = protocols.under(remember(panel[name]), protocol)
  report: dict[str, Any] = {
    "model": entry.facts,
    "seconds": 0.0,
    "peak_memory_gib": 0.0,
    "suites": {},
  }
  if protocol:
    report["protocol"] = list(protocol)
  if "any_turn" in protocol:
    notes.append("any_turn: the lowest of several turns is not calibrated")
  lines: list[dict[str, Any]] = []
  scored: dict[str, plots.Scored] = {}
  answers: dict[tuple[str, str], np.ndarray] = {}
  for suite in loaded:
    described = describe(suite)
    if "top_rules" in protocol and (r := protocols.gold_recall(suite.rows)):
      described["gold_recall"] = r
    # Nobody sees a label, a family or an edit.
    questions = [
      {k: row[k] for k in ("id", "messages", "spec") if k in row}
      for row in suite.rows
    ]
    for name, judge in panel.items():
      before = entry.cut.total()
      try:
        odds = np.asarray(judge(questions), np.float64)
      except ValueError as error:
        if name == "csrm":
          raise
        notes.append(f"{suite.name}: {error}")
        continue
      odds, wrong = endpoint.count_as_wrong(odds, suite.rows)
      if wrong:
        notes.append(f"{suite.name}, {name}: {wrong} unanswered rows are wrong")
      described["judges"][name] = measure(
        suite,
        odds,
        temperature=entry.temperature if name == "csrm" else 1.0,
        bootstrap=bootstrap,
        seed=seed,
      )
      answers[suite.name, name] = odds
      if cut := entry.cut.total() - before:
        described["judges"][name]["rows_cut"] = cut
        notes.append(f"{suite.name}, {name}: {cut} rows cut to the context")
      lines += writing.lines_of(suite, name, odds)
      if name == "csrm":
        scored[suite.name] = _scored(suite, odds, entry.temperature)
    report["suites"][suite.name] = described
    if probe:
      _probe(report, suite, panel, probe, rows, bootstrap, seed)
    if bad := aside[suite.name]:
      described["quarantined"] = len(bad)
      notes.append(f"{suite.name}: {len(bad)} bad rows put aside")
    if suite.note:
      notes.append(f"{suite.name}: {suite.note}")
  by_name = {suite.name: suite for suite in loaded}
  gaps = unseen_gaps(by_name, answers, bootstrap=bootstrap, seed=seed)
  if gaps:
    report["unseen_gap"] = gaps
  report["seconds"] = time.perf_counter() - began
  report["peak_memory_gib"] = peak_memory_gib()
  if notes:
    report["notes"] = [*report.get("notes", []), *notes]
  if output is not None:
    with storage.naming(output), storage.writing_beside(output) as local:
      if on_bad_row == "quarantine":
        writing.write_aside(local, aside)
      writing.write(local, report, lines, scored, folder)
  return report


def open_model(model: str | AnyPath | Judge) -> Model:
  """A model folder, or a function from rows to log-odds, as a `Model`."""
  if callable(model):
    return Model(remember(model), {}, 1.0, collections.Counter())
  loaded = load(model)
  facts = {
    "model_fingerprint": loaded.fingerprint,
    "template_fingerprint": template.fingerprint(loaded.tokenizer),
    "tokenizer_fingerprint": loaded.tokenizer.fingerprint(),
    "temperature": loaded.temperature,
  }
  cut, total = collections.Counter(), collections.Counter()
  known = remember(judging.csrm(loaded, cut=cut))

  def judge(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    odds = known(rows)
    total["rows"] += sum(cut[key_of(row)] for row in rows)
    return odds

  return Model(
    judge,
    facts,
    loaded.temperature,
    total,
    functools.partial(judging.check_row, loaded),
  )


def _check_judges(names: Sequence[str]) -> None:
  """Refuses an unknown name before anything is loaded."""
  known = (*judging.NAMES, *judging.BASELINES, "smollm2")
  for name in names:
    prefixed = name.startswith(("hf:", "endpoint:"))
    if name not in known and not prefixed and not Path(name).exists():
      raise ValueError(
        f"--judges: {name!r}: no such judge; use {', '.join(known)}, "
        "hf:FOLDER, endpoint:MODEL@URL or the folder of a model"
      )


def _probe(
  report: dict[str, Any],
  suite: Suite,
  panel: Mapping[str, Judge],
  count: int,
  rows: int,
  bootstrap: int,
  seed: int,
) -> None:
  """Adds sensitivity and failure checks of every judge to the report."""
  if suite.name in suites.SYNTHETIC:
    size = rows or suites.SYNTHETIC_ROWS
    found = editing.synthetic(suite.name, size=size, seed=seed)
  else:
    found = editing.from_rows(
      r for r in suite.rows if "label" in r and r.get("spec") is not None
    )
  found = editing.some(found, count)
  if not found:
    report.setdefault("notes", []).append(
      f"{suite.name}: no label rows with a spec, so none were probed"
    )
    return
  # Some probes ask many rows a case.
  how: dict[str, Any] = {
    "limit": max(count // 4, 1),
    "bootstrap": bootstrap,
    "seed": seed,
  }
  for name, judge in panel.items():
    told = remember(judge)  # report and checks ask much of the same
    try:
      moves = sensitivity.report(told, found, **how)
      checks = failures.check(told, found, **how)
    except ValueError as error:
      report.setdefault("notes", []).append(
        f"{suite.name}, {name}: not probed: {error}"
      )
      continue
    for part, result in (("sensitivity", moves), ("failures", checks)):
      by_suite = report.setdefault(part, {})
      by_suite.setdefault(suite.name, {})[name] = result


def _panel(
  entry: Model,
  names: Sequence[str],
  folder: Path | None,
  train_rows: str | Path | None,
  data: Any,
  loaded: Sequence[Suite],
  seed: int,
) -> tuple[dict[str, Judge], list[str]]:
  """Judges by name, in the order asked for, and notes on those left out."""
  panel: dict[str, Judge] = {}
  notes: list[str] = []
  # A workdir says where its sets are; an exported adapter which they were.
  known = recipes.workdir_of(folder) is not None
  known = known or (recipes.is_known(folder) and data is not None)

  @functools.cache
  def training() -> list[Row]:
    if train_rows:
      return list(contract.read_rows(train_rows))
    return list(recipes.training_rows(folder if known else None, data=data))

  for name in names:
    if name == "csrm":
      panel[name] = entry.judge
    elif name == "spec_shuffled":
      panel[name] = judging.spec_shuffled(entry.judge, seed=seed)
    elif name.startswith("endpoint:"):
      panel[name] = _endpoint(name)
    elif name not in judging.LEARNING:
      panel[name] = judging.baseline(name)
    elif train_rows:
      panel[name] = judging.baseline(name, training())
    else:
      if not known and any(s.name not in suites.SYNTHETIC for s in loaded):
        notes.append(
          f"{name} left out: the model's training rows are unknown; give "
          "--train_rows=FILE, or the folder of the sets for an adapter that"
          " names them: --data=DIR"
        )
        continue
      try:
        panel[name] = judging.baseline(name, training())
      except ValueError as error:
        notes.append(f"{name} left out: {error}")
  return panel, notes


def _endpoint(name: str) -> Judge:
  """The judge that "endpoint:MODEL@URL" means."""
  model, at, url = name.removeprefix("endpoint:").partition("@")
  if not (model and at and url):
    raise ValueError(
      f"--judges: {name!r}: give endpoint:MODEL@URL, for example "
      "endpoint:my-model@http://localhost:8000/v1"
    )
  key = ENDPOINT_KEY if ENDPOINT_KEY in os.environ else ""
  return endpoint.endpoint_judge(url, model, key_variable=key)


def describe(suite: Suite) -> dict[str, Any]:
  """What a suite is, before anybody judges it."""
  labelled = [r for r in suite.rows if "label" in r]
  described: dict[str, Any] = {
    "rows": len(suite.rows),
    "families": len({r["family"] for r in suite.rows}),
    "pairs": len(suite.pairs),
  }
  if labelled:
    weight = np.array([r["weight"] for r in labelled])
    gold = metrics.complies(np.array([float(r["label"]) for r in labelled]))
    described["base_rate"] = float(weight @ gold / weight.sum())
  return described | {"judges": {}}


def measure(
  suite: Suite,
  log_odds: Float[np.ndarray, " n"],
  *,
  temperature: float = 1.0,
  bootstrap: int = 500,
  seed: int = 0,
) -> dict[str, Any]:
  """Every metric that the suite allows, with bootstrap intervals.

  `auprc` seeks violating rows, like `f1_unsafe`; `auprc_safe` complying ones.
  With a temperature, `nll_uncalibrated` and its like are of the raw log-odds.

  Args:
    suite: rows and pairs.
    log_odds: calibrated, one for each row; NaN: no answer.
    temperature: that they were divided by.
    bootstrap: resamples.
    seed: of the resamples.
  """
  at = np.array([i for i, r in enumerate(suite.rows) if "label" in r], int)
  place = {int(i): n for n, i in enumerate(at)}
  rows = [suite.rows[i] for i in at]
  z, label = log_odds[at], np.array([float(r["label"]) for r in rows])
  base = np.array([place.get(r.get("base_row", -1), -1) for r in rows], int)
  pairs = [
    p
    for p in suite.pairs
    if np.isfinite(log_odds[p.win]) and np.isfinite(log_odds[p.lose])
  ]
  win = log_odds[[p.win for p in pairs]] if pairs else np.zeros(0)
  lose = log_odds[[p.lose for p in pairs]] if pairs else np.zeros(0)
  kinds = np.array([p.kind for p in pairs], str)
  size = [len(row["messages"][-1]["content"]) for row in suite.rows]
  lead = np.array([size[p.win] - size[p.lose] for p in pairs], int)
  p, raw = expit(z), z * temperature

  def values(weight: np.ndarray) -> dict[str, Any]:
    w, of_pairs = weight[..., : len(rows)], weight[..., len(rows) :]
    found = {
      "auroc": metrics.auroc(z, label, w),
      "auprc": metrics.auprc(z, label, w, positive=0),
      "auprc_safe": metrics.auprc(z, label, w),
      "f1_unsafe": metrics.f1_unsafe(z, label, w),
      "f1_safe": metrics.f1_safe(z, label, w),
      "ece": metrics.ece(p, label, w),
      "smece": metrics.smece(p, label, w),
      "brier": metrics.brier(p, label, w),
      "nll": metrics.nll(z, label, w),
      "flip_recall": metrics.flip_recall(z, label, base, w),
      "spurious_flips": metrics.spurious_flips(z, label, base, w),
    }
    if not rows:
      found = {}
    elif temperature != 1.0:
      found |= {
        "ece_uncalibrated": metrics.ece(expit(raw), label, w),
        "smece_uncalibrated": metrics.smece(expit(raw), label, w),
        "nll_uncalibrated": metrics.nll(raw, label, w),
      }
    accuracy = metrics.preference_accuracy
    found["preference_accuracy"] = accuracy(win, lose, of_pairs)
    parts = {kind: kinds == kind for kind in sorted(set(kinds.tolist()))}
    # Of responses, where the preferred one is the shorter and the longer.
    parts["shorter"] = (kinds == "resp") & (lead < 0)
    parts["longer"] = (kinds == "resp") & (lead > 0)
    for part, one in parts.items():
      found[f"preference_accuracy_{part}"] = accuracy(
        win[one], lose[one], of_pairs[..., one]
      )
    return found

  weight = np.array([r["weight"] for r in rows] + [p.weight for p in pairs])
  groups = [r["family"] for r in rows]
  groups += [suite.rows[p.win]["family"] for p in pairs]
  result: dict[str, Any] = {
    name: float(value)
    for name, value in values(weight).items()
    if np.isfinite(value)
  }
  spread = metrics.intervals(
    values, groups, weight, resamples=bootstrap, seed=seed
  )
  result["intervals"] = {k: list(v) for k, v in spread.items() if k in result}
  skipped = len(suite.pairs) - len(pairs)
  if skipped:
    result["pairs_without_answer"] = skipped
  return result


def _scored(
  suite: Suite, log_odds: np.ndarray, temperature: float
) -> plots.Scored:
  at = [i for i, r in enumerate(suite.rows) if "label" in r]
  place = {i: n for n, i in enumerate(at)}
  rows = [suite.rows[i] for i in at]
  return plots.Scored(
    log_odds[at],
    np.array([float(r["label"]) for r in rows]),
    np.array([place.get(r.get("base_row", -1), -1) for r in rows], int),
    [r.get("edit", "") for r in rows],
    temperature,
  )


def peak_memory_gib(whose: int = resource.RUSAGE_SELF) -> float:
  """Largest resident size of this process so far, or of one it waited for."""
  # Linux counts KiB, macOS bytes.
  unit = 1 if os.uname().sysname == "Darwin" else 1024
  usage = resource.getrusage(whose).ru_maxrss
  return usage * unit / 2**30
