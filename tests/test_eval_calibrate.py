"""Temperature: recovered, never worse, written where scoring reads it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from csrm_jax import metrics
from csrm_jax.eval import calibrate


@dataclasses.dataclass(frozen=True)
class FakeJudge:
  """What `calibrate_workdir` needs to know of a loaded model."""

  temperature: float = 7.0


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_recovers_the_temperature(temperature):
  rng = np.random.default_rng(0)
  z = rng.normal(size=50_000) * 2
  y = (rng.random(50_000) < expit(z)).astype(np.float64)
  fitted = calibrate.fit_temperature(z * temperature, y)
  np.testing.assert_allclose(fitted, temperature, rtol=0.03)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_is_the_minimum_of_the_reference(seed):
  """Newton's method on 1/T, in which the loss is convex, agrees."""
  rng = np.random.default_rng(seed)
  z, w = rng.normal(size=80) * 3, rng.uniform(0.2, 2.0, 80)
  y = (rng.random(80) < expit(z / 2)).astype(np.float64)

  def slope(inverse):
    return np.sum(w * z * (expit(z * inverse) - y))

  inverse = scipy.optimize.brentq(slope, -5.0, 50.0)
  fitted = calibrate.fit_temperature(z, y, w)
  expected = np.clip(1 / inverse if inverse > 0 else np.inf, *np.exp([-3, 3]))
  np.testing.assert_allclose(fitted, expected, rtol=1e-3)
  assert metrics.nll(z / fitted, y, w) <= metrics.nll(z, y, w) + 1e-9


def test_padding_with_weight_zero_is_inert():
  z, y = np.array([2.0, -1.0, 0.5, -2.0]), np.array([1.0, 0.0, 0.0, 1.0])
  padded = calibrate.fit_temperature(
    np.r_[z, 9.0, -9.0], np.r_[y, 0.0, 1.0], np.array([1, 1, 1, 1, 0.0, 0.0])
  )
  np.testing.assert_allclose(padded, calibrate.fit_temperature(z, y), rtol=1e-5)


def test_stays_in_bounds_and_refuses_nothing_to_fit():
  z = np.array([-3.0, 3.0])
  separable = calibrate.fit_temperature(z, np.array([0.0, 1.0]))
  backwards = calibrate.fit_temperature(z, np.array([1.0, 0.0]))
  np.testing.assert_allclose([separable, backwards], np.exp([-3, 3]), rtol=1e-3)
  for bad in (np.zeros(0), np.array([np.nan, 1.0])):
    with pytest.raises(ValueError, match="held out"):
      calibrate.fit_temperature(bad, np.ones(len(bad)))


def workdir(tmp_path, labels: int):
  rows = [
    {
      "id": str(i),
      "messages": [{"role": "assistant", "content": f"Answer {i}."}],
      "label": i % 2,
      "spec": "No answers.",
      "family": f"f{i // 4}",
    }
    for i in range(labels)
  ]
  heldout = tmp_path / "heldout.jsonl"
  heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "model.json").write_text('{"head": "linear", "temperature": 7.0}')
  return heldout


def overconfident(monkeypatch, wrong=4):
  """One row in `wrong` is wrong at log-odds 4; for 4, T is 4 / log 3."""
  monkeypatch.setattr(calibrate, "load", lambda path: FakeJudge())

  def score_rows(judge, rows, **_):
    assert judge.temperature == 1.0
    signs = [
      (2 * row["label"] - 1) * (-1 if int(row["id"]) % wrong == 0 else 1)
      for row in rows
    ]
    return [SimpleNamespace(log_odds=4.0 * sign) for sign in signs]

  monkeypatch.setattr(calibrate.score, "score_rows", score_rows)


def test_workdir_gets_its_temperature(tmp_path, monkeypatch, capsys):
  overconfident(monkeypatch)
  heldout = workdir(tmp_path, 64)
  report = calibrate.calibrate_workdir(tmp_path, heldout, rows=48)
  np.testing.assert_allclose(report["temperature"], 4 / np.log(3), rtol=1e-4)
  assert report["calibration_rows"] == 48
  assert report["calibration_nll"] < report["calibration_nll_before"]
  written = json.loads((tmp_path / "model.json").read_text())
  assert written == {"head": "linear", "temperature": report["temperature"]}
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("wrong", "bound"), [(99, -3), (1, 3)])
def test_a_temperature_at_its_bound_is_told(
  tmp_path, monkeypatch, capsys, wrong, bound
):
  """All rows right but the first, of weight 0; or all of them wrong."""
  overconfident(monkeypatch, wrong)
  heldout = workdir(tmp_path, 6)
  first, *rest = heldout.read_text().splitlines(keepends=True)
  unweighted = json.dumps(json.loads(first) | {"weight": 0.0}) + "\n"
  heldout.write_text(unweighted + "".join(rest))

  report = calibrate.calibrate_workdir(tmp_path, heldout)

  np.testing.assert_allclose(report["temperature"], np.exp(bound), rtol=1e-3)
  told = capsys.readouterr().err
  assert f"{heldout}: its 6 labelled rows" in told
  assert "--config.data.heldout" in told


@pytest.mark.parametrize("exists", [True, False])
def test_without_labels_the_temperature_is_one(tmp_path, exists):
  heldout = workdir(tmp_path, 0)
  if not exists:
    heldout.unlink()
  report = calibrate.calibrate_workdir(tmp_path, heldout)
  assert report == {"temperature": 1.0, "calibration_rows": 0}
  written = json.loads((tmp_path / "model.json").read_text())
  assert written["temperature"] == 1.0
