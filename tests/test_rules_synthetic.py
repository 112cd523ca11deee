"""rules/synthetic.py, launch/rules.py: from nothing to fitted weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from csrm_jax.rules import (
  completions,
  phrases,
  propositions,
  synthetic,
  weights,
)

ROOT = Path(__file__).parent.parent
BOOK = propositions.read()
DOMAINS = ("gambling", "medical_dosage")


@pytest.fixture(scope="module")
def composed():
  counts = {}
  asked = synthetic.prompts(DOMAINS)
  return asked, synthetic.compose(BOOK, asked, counts=counts), counts


def test_every_class_of_every_type_is_composed(composed):
  _, rows, counts = composed
  assert counts["composed"] == len(rows)
  found = completions.class_counts(BOOK, rows)
  for kind in BOOK.types:
    assert all(n >= 10 for n in found[kind].values()), found


def test_the_class_asked_for_is_the_class_of_the_truths(composed):
  _, rows, _ = composed
  for row in rows:
    number = propositions.classify(BOOK, row.response_type, row.truths[None])[0]
    wanted = row.id.split("/")[-2]
    assert BOOK.class_names(row.response_type)[number] == wanted


def test_sentences_are_there_just_where_they_hold(composed):
  _, rows, _ = composed
  pieces = phrases.OPENING | phrases.CLOSING
  for row in rows:
    text = row.messages[-1]["content"]
    holds = dict(zip(BOOK.names, row.truths, strict=True))
    for name, sentences in pieces.items():
      there = any(s.split("{topic}")[-1] in text for s in sentences)
      assert there == holds[name], (name, text)
    assert not re.search(r"[{}]", text)


def test_over_refusal_prompts_are_answered_rightly(composed):
  asked, rows, _ = composed
  names = [one.name for one in asked if "/boundary" in one.name]
  assert len(names) == 2 * 5  # the fourth is held back
  by_id = {row.id: row for row in rows}
  for name in names:
    best = by_id[f"{name}/ideal/0"]
    poor = by_id[f"{name}/poor/0"]
    assert best.response_type == poor.response_type == "comply"
    assert best.family == poor.family
  ideal = by_id["gambling/boundary0/ideal/0"].messages
  word = re.search(r'"(.+)"', ideal[0]["content"]).group(1)
  assert f"{len(word.replace(' ', ''))} letters" in ideal[-1]["content"]


def test_one_seed_one_result_and_templates_kept_apart(composed):
  asked, rows, _ = composed
  again = synthetic.compose(BOOK, synthetic.prompts(DOMAINS))
  assert [r.messages for r in again] == [r.messages for r in rows]
  held = synthetic.prompts(DOMAINS, heldout=True)
  assert not {o.name for o in held} & {o.name for o in asked}
  with pytest.raises(ValueError, match="no domain 'moon'"):
    synthetic.prompts(["moon"])


def test_a_language_model_is_told_what_must_hold():
  asked = synthetic.prompts(["gambling"])[:3]
  said = []

  def ask(text):
    said.append(text)
    return f" Reply {len(said)}. "

  rows = synthetic.compose(BOOK, asked, ask=ask)
  assert rows[0].messages[-1]["content"] == "Reply 1."
  assert len(said) == len(rows)
  yes, no = said[0].split("must be yes:\n")[1].split("\n\nand to each")
  for p, holds in zip(BOOK.propositions, rows[0].truths, strict=True):
    assert (p.question in yes) == holds and (p.question in no) == (not holds)
  assert asked[0].prompt[0]["content"] in said[0]
  with pytest.raises(ValueError, match="the model wrote nothing"):
    synthetic.compose(BOOK, asked, ask=lambda text: " ")
  with pytest.raises(ValueError, match="for these propositions alone"):
    small = {
      "propositions": {"a": {"question": "A?", "rule": "a"}},
      "classes": {"hard": [{"good": "a"}, {"poor": "not a"}]},
    }
    synthetic.compose(propositions.parse(small), asked)


def noisy(rows, *, seed=0):
  """Probabilities of a grader that is right nine times in ten, h of one that
  likes whatever answers at length."""
  rng = np.random.default_rng(seed)
  out = []
  for row in rows:
    wrong = rng.random(len(BOOK.names)) < 0.1
    chances = np.where(row.truths ^ wrong, 0.85, 0.15)
    helpful = len(row.messages[-1]["content"]) / 100 + 0.3 * rng.normal()
    out.append(row._replace(chances=chances, helpfulness=float(helpful)))
  return out


def test_weights_halve_the_error_of_helpfulness(composed):
  """On prompts held out, with a grader that errs."""
  _, rows, _ = composed
  made = weights.fit_rows(BOOK, noisy(rows), heldout=0.25)
  for kind in BOOK.types:
    held = made.report[kind]["heldout"]
    assert held["pairs"] >= 20
    assert held["pair_error"] <= 0.5 * held["pair_error_helpfulness"], kind


def launch(*flags):
  return subprocess.run(
    [sys.executable, "launch/rules.py", *flags],
    cwd=ROOT, text=True, capture_output=True, check=False,
  )  # fmt: skip


def test_the_commands_go_from_end_to_end(tmp_path):
  rows, graded = tmp_path / "composed.jsonl", tmp_path / "graded.jsonl"
  done = launch("compose", "--domains=gambling", f"--output={rows}")
  assert done.returncode == 0, done.stderr
  done = launch(
    "grade", f"--input={rows}", f"--output={graded}", "--grader=labels"
  )
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "graded.report.json").read_text())
  assert report["accuracy"] == 1.0 and report["smece"] < 1e-3
  done = launch(
    "fit", f"--input={graded}", f"--output={tmp_path}", "--heldout=0.2"
  )
  assert done.returncode == 0, done.stderr
  assert "held out: error 0.000" in done.stdout
  made = weights.load(tmp_path)
  assert set(made.weights) == set(BOOK.types)
  for name in ("weights.png", "rewards.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
  done = launch("fit", f"--input={tmp_path}/no.jsonl", f"--output={tmp_path}")
  assert done.returncode == 2 and "no such file" in done.stderr
