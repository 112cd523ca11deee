"""Plots: they are drawn, and show what they say."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import expit

from csrm_jax import metrics
from csrm_jax.eval import plots


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved, for a test to look at."""
  figures = []
  save = plots.save

  def keep(figure, path):
    figures.append(figure)
    save(figure, path)

  monkeypatch.setattr(plots, "save", keep)
  return figures


def scored(n: int = 200, temperature: float = 2.0) -> plots.Scored:
  rng = np.random.default_rng(0)
  z = rng.normal(size=n) * 2
  label = (rng.random(n) < expit(z)).astype(np.float64)
  base = np.where(np.arange(n) % 2 == 0, -1, np.arange(n) - 1)
  edit = ["base" if b < 0 else "swap" for b in base]
  return plots.Scored(z, label, base, edit, temperature)


def is_png(path) -> bool:
  return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_reliability_shows_bins_and_both_curves(tmp_path, drawn):
  s = scored()
  path = tmp_path / "reliability.png"
  plots.reliability({"one": s, "two": s._replace(temperature=1.0)}, path)
  assert is_png(path)
  one, two = drawn[0].axes[:2]
  assert len(one.lines) == len(two.lines) + 1  # the raw curve
  points = one.containers[0].lines[0].get_xydata()
  p = expit(s.log_odds)
  index = metrics.bin_index(p, bins=15)
  for (x, y), b in zip(points, np.unique(index), strict=True):
    np.testing.assert_allclose(
      (x, y), (p[index == b].mean(), s.label[index == b].mean())
    )


def test_reliability_of_a_constant_judge(tmp_path):
  s = scored()._replace(log_odds=np.full(200, -10.0))
  plots.reliability({"constant": s}, tmp_path / "r.png")
  assert is_png(tmp_path / "r.png")


def test_flips_bars_are_the_report_s_numbers(tmp_path, drawn):
  s = scored()
  judge = {
    "flip_recall": float(metrics.flip_recall(s.log_odds, s.label, s.base)),
    "spurious_flips": float(
      metrics.spurious_flips(s.log_odds, s.label, s.base)
    ),
    "intervals": {"flip_recall": [0.1, 0.9]},
  }
  silent = {"intervals": {}}
  path = tmp_path / "flips.png"
  plots.flips(
    {"suite": {"judges": {"csrm": judge, "tfidf": silent}}}, {"suite": s}, path
  )
  assert is_png(path)
  left, right = drawn[0].axes
  np.testing.assert_allclose(
    [left.patches[0].get_height(), left.patches[2].get_height()],
    [judge["flip_recall"], judge["spurious_flips"]],
  )
  # One edit, half of it gold flips: the bars by edit are the totals again.
  np.testing.assert_allclose(
    [bar.get_width() for bar in right.patches],
    [judge["flip_recall"], judge["spurious_flips"]],
  )


def test_training_draws_the_terms_that_occur(tmp_path, drawn):
  lines = [
    {
      "step": k + 1,
      "loss": 1.0 / (k + 1),
      "loss_spec": 0.0 if k % 2 else 0.7,
      "loss_help": 0.0,
      "tokens_per_second": 100.0,
    }
    for k in range(40)
  ]
  log = tmp_path / "metrics.jsonl"
  log.write_text("".join(json.dumps(line) + "\n" for line in lines))
  path = tmp_path / "training.png"
  assert plots.training(tmp_path, path) and is_png(path)
  names = [t.get_text() for t in drawn[0].axes[0].get_legend().get_texts()]
  assert names == ["loss", "loss_spec"]
  smooth = drawn[0].axes[0].lines[3].get_ydata()
  np.testing.assert_allclose(smooth, 0.7)


def test_training_without_a_log_draws_nothing(tmp_path):
  assert not plots.training(tmp_path, tmp_path / "training.png")
  (tmp_path / "metrics.jsonl").write_text("")
  assert not plots.training(tmp_path, tmp_path / "training.png")
  assert not (tmp_path / "training.png").exists()


def test_pictures_leave_pyplot_to_the_user(tmp_path):
  """A notebook's figures went missing once pyplot's backend was changed."""
  script = (
    "import matplotlib.pyplot as plt\n"
    "plt.switch_backend('svg')\n"
    "import csrm_jax.align.report, csrm_jax.eval.audit\n"
    "import csrm_jax.eval.sensitivity, csrm_jax.rules.plots\n"
    "from csrm_jax.eval import plots\n"
    "figure, axis = plots.subplots(figsize=(3, 2))\n"
    "axis.plot([0, 1])\n"
    f"plots.save(figure, {str(tmp_path / 'p.png')!r})\n"
    "print(plt.get_backend(), plt.get_fignums())\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True
  )

  assert done.stdout == "svg []\n", done.stderr
  assert is_png(tmp_path / "p.png")
