"""The evaluation: its report, its files, its command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from csrm_jax import metrics
from csrm_jax.data import synthetic
from csrm_jax.eval import output, run, suites
from tests import tiny

SUITE = "synthetic_unseen"
SIZE = 60


def knowing(strength: float, *, name: str = SUITE):
  """A judge that was told the labels, and blurs them with noise."""
  gold = {r["id"]: r["label"] for r in synthetic.suite(name, size=SIZE)}

  def judge(rows):
    rng = np.random.default_rng(0)
    assert all(set(row) == {"id", "messages", "spec"} for row in rows)
    truth = np.array([2.0 * gold[row["id"]] - 1 for row in rows])
    return strength * truth + rng.normal(size=len(rows))

  return judge


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("rows") / "train.jsonl"
  rows = synthetic.rows(split="train", families=30, seed=0)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture(scope="module")
def evaluated(training, tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  report = run.evaluate(
    knowing(1.5),
    SUITE,
    output=folder / "report.json",
    train_rows=training,
    rows=SIZE,
    bootstrap=50,
  )
  return report, folder


def test_report_has_the_agreed_keys(evaluated):
  report, folder = evaluated
  assert json.loads((folder / "report.json").read_text()) == report
  assert {"model", "seconds", "peak_memory_gib", "suites"} <= set(report)
  assert report["seconds"] > 0 and 0.05 < report["peak_memory_gib"] < 64
  suite = report["suites"][SUITE]
  assert suite["rows"] == len(suites.read(SUITE, rows=SIZE).rows)
  assert 0 < suite["base_rate"] < 1
  assert list(suite["judges"]) == [
    "csrm",
    "spec_shuffled",
    "always_unsafe",
    "tfidf",
  ]
  for judge in suite["judges"].values():
    assert set(output.METRICS) <= set(judge)
    for name, (low, high) in judge["intervals"].items():
      assert low <= high
      if name != "smece":  # biased upwards by resampling, as ECE is
        assert low - 0.15 <= judge[name] <= high + 0.15


def test_report_is_what_the_rows_say(evaluated):
  """Every headline number again, from rows.jsonl alone."""
  report, folder = evaluated
  lines = [json.loads(x) for x in (folder / "rows.jsonl").open()]
  suite = report["suites"][SUITE]
  assert len(lines) == suite["rows"] * len(suite["judges"])
  for name, judge in suite["judges"].items():
    rows = [line for line in lines if line["judge"] == name]
    place = {row["id"]: i for i, row in enumerate(rows)}
    z = np.array([row["log_odds"] for row in rows])
    y = np.array([float(row["label"]) for row in rows])
    base = np.array([place.get(row.get("base"), -1) for row in rows])
    flips = [(i, b) for i, b in enumerate(base) if b >= 0 and y[i] != y[b]]
    lead = np.array([(z[i] - z[b]) * (y[i] - y[b]) for i, b in flips])
    expected = {
      "auroc": metrics.auroc(z, y),
      "auprc": metrics.auprc(z, y, positive=0),
      "f1_unsafe": metrics.f1_unsafe(z, y),
      "ece": metrics.ece(expit(z), y),
      "nll": metrics.nll(z, y),
      "flip_recall": metrics.flip_recall(z, y, base),
      "spurious_flips": metrics.spurious_flips(z, y, base),
      "preference_accuracy": np.mean((np.sign(lead) + 1) / 2),
    }
    for metric, value in expected.items():
      np.testing.assert_allclose(judge[metric], value, rtol=1e-9)
    for row in rows:
      assert row["verdict"] == (
        "comply" if row["p_comply"] >= 0.5 else "violate"
      )


def test_pictures_stand_beside_the_report(evaluated):
  _, folder = evaluated
  for name in ("reliability.png", "flips.png"):
    assert (folder / name).stat().st_size > 5000
  assert not (folder / "training.png").exists()  # a function has no workdir


def test_judges_rank_as_they_should(evaluated):
  judges = evaluated[0]["suites"][SUITE]["judges"]
  assert judges["csrm"]["auroc"] > 0.9
  assert judges["csrm"]["flip_recall"] > judges["tfidf"]["flip_recall"]
  assert judges["always_unsafe"]["auroc"] == 0.5
  assert judges["always_unsafe"]["flip_recall"] == 0.0
  assert judges["always_unsafe"]["f1_safe"] == 0.0


def test_table_shows_every_judge_and_metric(evaluated):
  text = output.table(evaluated[0])
  assert SUITE in text and "majority F1" in text
  for name, judge in evaluated[0]["suites"][SUITE]["judges"].items():
    (line,) = (x for x in text.splitlines() if x.startswith(name))
    assert len(line.split()) == 1 + len(output.METRICS)
    assert f"{judge['auroc']:.3f}" in line


def test_pairs_alone_give_preference_accuracy_alone(tmp_path):
  """Also: helpfulness pairs that the judge cannot answer are counted."""
  turn = [{"role": "user", "content": "Well?"}]
  rows = [
    {
      "id": f"p{i}",
      "prompt": turn,
      "chosen": [{"role": "assistant", "content": "good"}],
      "rejected": [{"role": "assistant", "content": text}],
      "kind": kind,
    }
    | ({} if kind == "help" else {"spec": "Be good."})
    for i, (text, kind) in enumerate(
      [("bad", "resp"), ("better", "resp"), ("bad", "help")]
    )
  ]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  value = {"bad": -1.0, "good": 1.0, "better": 2.0}

  def judge(rows):
    said = [value[row["messages"][-1]["content"]] for row in rows]
    asked = ["spec" in row for row in rows]
    return np.where(asked, said, np.nan)

  report = run.evaluate(
    judge, str(path), judge_names=["csrm", "spec_shuffled"], bootstrap=10
  )
  suite = report["suites"][str(path)]
  assert "base_rate" not in suite
  assert list(suite["judges"]) == ["csrm"]
  assert "two different specs" in report["notes"][0]
  assert suite["judges"]["csrm"]["preference_accuracy"] == 0.5
  assert suite["judges"]["csrm"]["pairs_without_answer"] == 1
  assert "auroc" not in suite["judges"]["csrm"]
  assert "pref_acc" in output.table(report)


def test_protocols_cuts_and_lengths_are_in_the_report(tmp_path):
  """Through a model of ours, whose context is 2048 tokens."""
  folder = tiny.write_workdir(tmp_path, tiny.judge())
  rules = [f"S{i}: Disallowed: matter {i}." for i in range(1, 31)]
  rules += ["S31: Disallowed: baking bread."]
  turns = [{"role": "user", "content": "Well? " * 900}]
  rows = [
    {
      "id": f"r{i}",
      "messages": [*turns[i:], {"role": "assistant", "content": "Bread."}],
      "label": i,
      "spec": "\n".join(rules),
    }
    for i in (0, 1)
  ]
  pair = {
    "id": "p",
    "prompt": [{"role": "user", "content": "Bread?"}],
    "kind": "resp",
    "spec": "S1: Disallowed: baking.",
  }
  for i, texts in enumerate((("No", "Never."), ("Sure, yes.", "Yes"))):
    win, lose = ([{"role": "assistant", "content": t}] for t in texts)
    rows.append(pair | {"id": f"p{i}", "chosen": win, "rejected": lose})
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  report = run.evaluate(
    folder,
    str(path),
    judge_names=["csrm", "always_unsafe"],
    protocol=["top_rules"],
    bootstrap=0,
  )
  assert report["protocol"] == ["top_rules"]
  judged = report["suites"][str(path)]["judges"]
  assert judged["csrm"]["rows_cut"] == 1
  assert "rows_cut" not in judged["always_unsafe"]
  mine = judged["csrm"]
  parts = [mine[f"preference_accuracy_{k}"] for k in ("shorter", "longer")]
  assert set(parts) <= {0.0, 0.5, 1.0}
  assert sum(parts) / 2 == mine["preference_accuracy_resp"]
  flat = judged["always_unsafe"]
  assert flat["preference_accuracy_longer"] == 0.5


def test_temperature_is_reported_before_and_after():
  suite = suites.read(SUITE, rows=SIZE)
  odds = 3 * knowing(1.0)(
    [{k: r[k] for k in ("id", "messages", "spec")} for r in suite.rows]
  )
  raw = run.measure(suite, odds, bootstrap=0)
  cooled = run.measure(suite, odds / 4, temperature=4.0, bootstrap=0)
  for name in ("ece", "smece", "nll"):
    np.testing.assert_allclose(cooled[f"{name}_uncalibrated"], raw[name])
  np.testing.assert_allclose(cooled["auroc"], raw["auroc"])
  assert cooled["intervals"] == {}


def test_rows_of_the_user_beside_the_report_are_kept(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"id": "1", "messages": []}\n')

  with pytest.raises(ValueError, match=r"rows\.jsonl would be overwritten"):
    run.evaluate(
      lambda rows: np.zeros(len(rows)),
      "synthetic_seen",
      output=tmp_path / "report.json",
    )

  assert path.read_text() == '{"id": "1", "messages": []}\n'


def test_tfidf_is_left_out_of_a_file_with_a_note(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = synthetic.suite(SUITE, size=SIZE)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  report = run.evaluate(knowing(1.0), str(path), bootstrap=0)
  assert "tfidf" not in report["suites"][str(path)]["judges"]
  assert "--train_rows" in report["notes"][0]


@pytest.mark.parametrize("of_file", [False, True])
def test_probes_of_a_suite_by_name_and_by_file(of_file, tmp_path):
  name = SUITE
  if of_file:
    name = str(tmp_path / "rows.jsonl")
    rows = synthetic.suite(SUITE, size=SIZE)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

  def judge(rows):
    return np.array([len(str(row.get("spec"))) % 7 - 3.0 for row in rows])

  report = run.evaluate(
    judge,
    name,
    output=tmp_path / "out" / "report.json",
    judge_names=["csrm", "always_safe"],
    rows=SIZE,
    probe=12,
    bootstrap=5,
  )
  for part in ("sensitivity", "failures"):
    assert set(report[part][name]) == {"csrm", "always_safe"}
  assert report["failures"][name]["csrm"]["spec_ignored"]["n"] > 0
  stem = Path(name).stem
  assert (tmp_path / "out" / stem / "sensitivity.png").is_file()
  page = (tmp_path / "out" / "report.html").read_text()
  assert f"Failure checks: {name}, csrm" in page
  assert f"failure checks: {name}, always_safe" in output.table(report)
  beside = (tmp_path / "out" / "probes.md").read_text().splitlines()
  flips = {j: r["flips"] for j, r in report["sensitivity"][name].items()}
  line = next(x for x in beside if x.startswith("| verdicts that follow"))
  cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
  for cell, found in zip(cells, flips.values(), strict=True):
    low, high = found["intervals"]["flip_recall"]
    assert cell == f"{found['flip_recall']:.3f} ({low:.3f} to {high:.3f})"
  assert "| check | mark | csrm | always_safe |" in beside
  assert f"## Sensitivity: `{name}`" in beside


@pytest.mark.parametrize(
  ("names", "judges", "message"),
  [
    (" , ", ["csrm"], "--suite is empty"),
    (SUITE, ["gpt"], "--judges: 'gpt'.*always_unsafe"),
  ],
)
def test_unknown_names_are_refused(names, judges, message):
  with pytest.raises(ValueError, match=message):
    run.evaluate(knowing(1.0), names, judge_names=judges)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--suite=synthetic_seen"], ["--model is missing"]),
    (["--model=nowhere", "--suite=nothing"], ["--suite=nothing", "heldout"]),
    (
      ["--model=nowhere", "--suite=synthetic_seen", "--rows=20"],
      ["--model=nowhere"],
    ),
  ],
)
def test_command_exits_2_without_a_traceback(flags, words, tmp_path):
  script = Path(__file__).parent.parent / "launch" / "evaluate.py"
  done = subprocess.run(
    [sys.executable, str(script), *flags, f"--output={tmp_path}/r.json"],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
  )
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  for word in words:
    assert word in done.stderr


def test_bad_rows_of_a_file_stop_or_are_put_aside(tmp_path):
  judge = tiny.judge()
  model = tiny.write_workdir(tmp_path / "judge", judge)
  context = judge.context
  rows = list(synthetic.suite(SUITE, size=SIZE))[:6]
  rows = [{k: v for k, v in r.items() if k != "base"} for r in rows]
  long = {"role": "assistant", "content": "so " * context}
  rows[1] |= {"messages": [*rows[1]["messages"][:-1], long]}
  rows[3] |= {"label": 7}
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  script = Path(__file__).parent.parent / "launch" / "evaluate.py"

  def launch(*flags):
    return subprocess.run(
      [
        sys.executable,
        str(script),
        f"--model={model}",
        f"--suite={path}",
        f"--output={tmp_path}/out/report.json",
        "--judges=csrm,always_unsafe",
        "--bootstrap=0",
        *flags,
      ],
      capture_output=True,
      text=True,
      check=False,
    )

  done = launch()
  assert done.returncode == 2
  assert f"{path}:2: field 'messages': " in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "out").exists()

  done = launch("--on_bad_row=quarantine")
  assert done.returncode == 0, done.stderr
  assert "2 bad rows put aside in" in done.stdout
  suite = json.loads((tmp_path / "out" / "report.json").read_text())["suites"]
  assert (suite[str(path)]["rows"], suite[str(path)]["quarantined"]) == (4, 2)
  aside = tmp_path / "out" / "report.json.quarantine.jsonl"
  found = [json.loads(line) for line in aside.read_text().splitlines()]
  assert [(e["suite"], e["line"]) for e in found] == [
    (str(path), 2),
    (str(path), 4),
  ]
  assert [e["row"] for e in found] == [rows[1], rows[3]]


def test_rows_are_put_aside_only_beside_a_report():
  with pytest.raises(ValueError, match="without a place for the rows"):
    run.evaluate(knowing(1.0), SUITE, on_bad_row="quarantine")
  with pytest.raises(ValueError, match="must be 'stop' or 'quarantine'"):
    run.evaluate(knowing(1.0), SUITE, on_bad_row="skip")
