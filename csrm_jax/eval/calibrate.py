"""Temperature: one number, fitted on rows held out from training."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from jaxtyping import Float

from csrm_jax import metrics, score, storage
from csrm_jax.data import contract
from csrm_jax.eval import suites
from csrm_jax.judge import load
from csrm_jax.storage import AnyPath

# One parameter needs few rows, and a CPU scores some four a second.
ROWS = 400
_BOUNDS = (-3.0, 3.0)  # of log T


def fit_temperature(
  log_odds: Float[np.ndarray, " n"],
  label: Float[np.ndarray, " n"],
  weight: Float[np.ndarray, " n"] | None = None,
) -> float:
  """The T > 0 that minimises the mean cross-entropy of `log_odds / T`.

  Convex in 1/T, so the bounded search over log T finds the one minimum. T
  stays in [e^-3, e^3]: separable rows would ask for 0, rows that the model
  gets wrong on balance for infinity.

  Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.

  Args:
    log_odds: raw, of rows held out from training.
    label: gold probability of compliance.
    weight: of each row.

  Returns:
    The temperature; calibrated log-odds are `log_odds / T`.

  Raises:
    ValueError: no rows, or log-odds that are not finite.
  """
  z, y = np.asarray(log_odds, np.float64), np.asarray(label, np.float64)
  if not len(z) or not np.all(np.isfinite(z)):
    raise ValueError(
      f"temperature: {np.sum(np.isfinite(z))} finite log-odds of {len(z)}; "
      "give labelled rows that were held out from training"
    )
  found = scipy.optimize.minimize_scalar(
    lambda log_t: metrics.nll(z / np.exp(log_t), y, weight),
    bounds=_BOUNDS,
    method="bounded",
    options={"xatol": 1e-6},
  )
  return float(np.exp(found.x))


def at_bound(temperature: float) -> bool:
  """Whether the rows asked for more than `fit_temperature` gives."""
  return bool(np.min(np.abs(np.log(temperature) - np.array(_BOUNDS))) < 1e-3)


def calibrate_workdir(
  workdir: str | AnyPath, heldout: str | Path, *, rows: int = ROWS
) -> dict[str, Any]:
  """Fits the temperature of a trained workdir and writes it to model.json.

  Args:
    workdir: of a finished run.
    heldout: contract rows kept from its training (`heldout.jsonl`).
    rows: labelled rows used, by whole families (`suites.some_families`).

  Returns:
    temperature, calibration_rows, and mean nats per row before and after;
    without labelled rows, calibration_rows = 0 and the temperature stays 1.
    A temperature at its bound is told of on stderr.
  """
  heldout = Path(heldout)
  found = []
  if heldout.is_file() and heldout.stat().st_size:
    found = [r for r in contract.read_rows(heldout) if "label" in r]
  kept = suites.some_families(found, rows)
  temperature, report = 1.0, {}
  if kept:
    label = np.array([float(row["label"]) for row in kept])
    weight = np.array([float(row.get("weight", 1.0)) for row in kept])
    raw = dataclasses.replace(load(workdir), temperature=1.0)
    scores = score.score_rows(raw, kept, progress=sys.stderr.isatty())
    z = np.array([s.log_odds for s in scores])
    temperature = fit_temperature(z, label, weight)
    if at_bound(temperature):
      print(
        f"{heldout}: its {len(kept)} labelled rows put the temperature to its"
        f" bound, {temperature:.3g}: the model separates them all, or is wrong"
        " on balance. Its probabilities are not calibrated; give more data, or"
        " hold more families out (--config.data.heldout)",
        file=sys.stderr,
      )
    report = {
      "calibration_nll_before": float(metrics.nll(z, label, weight)),
      "calibration_nll": float(metrics.nll(z / temperature, label, weight)),
    }
  path = storage.path(workdir) / "model.json"
  described = storage.read_json(path, remedy="train again")
  storage.write_json(path, described | {"temperature": temperature})
  return {"temperature": temperature, "calibration_rows": len(kept)} | report
