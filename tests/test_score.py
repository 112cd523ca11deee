"""Score: independent of packing, any turn, files, refusals."""

import dataclasses
import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import csrm_jax as csrm
from csrm_jax import score as score_lib
from csrm_jax.data import template, trie
from csrm_jax.judge import SHIPPED, load
from csrm_jax.score_file import score_file
from csrm_jax.spec import Rule, Spec
from csrm_jax.types import Example, Segment
from launch import score as launcher
from tests import tiny

ROOT = Path(__file__).parents[1]
WORDS = ("bread", "safe", "policy", "message", "swearing", "spoilers", "judge")


@pytest.fixture(scope="module")
def judge():
  return tiny.judge(temperature=1.7)


def _text(rng, longest=12):
  return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def _rows(count, seed=0, turns=4):
  rng = random.Random(seed)
  specs = [f"S1: Disallowed: {_text(rng)}." for _ in range(3)]
  return [
    {
      "id": f"r{i}",
      "spec": rng.choice(specs),
      "messages": [
        {"role": role, "content": _text(rng)}
        for role in ("user", "assistant") * rng.randint(1, turns // 2)
      ],
    }
    for i in range(count)
  ]


def _alone(judge, ids):
  """Readouts of one sequence in a row of its own."""
  packed = trie.pack(
    [Example("x", (Segment(tuple(ids)),))],
    row_length=-(-len(ids) // 256) * 256,
    slots=1,
    pairs=1,
  )
  return np.asarray(_apply(judge.model)(judge.params, packed.batch))[0, 0]


@functools.cache
def _apply(model):
  return jax.jit(model.apply)


def test_score_does_not_depend_on_neighbours_or_packing(judge):
  rows = _rows(60)
  together = score_lib.score_rows(judge, rows, helpfulness=True)

  backwards = score_lib.score_rows(judge, rows[::-1], helpfulness=True)[::-1]
  for i, row in enumerate(rows):
    ids = template.encode(judge.tokenizer, row["messages"], row["spec"])
    free = template.encode(judge.tokenizer, row["messages"], None)
    z = _alone(judge, ids)[0] / judge.temperature
    h = _alone(judge, free)[1]
    assert together[i].log_odds == pytest.approx(z, abs=1e-5)
    assert together[i].helpfulness == pytest.approx(h, abs=1e-5)
    assert backwards[i].log_odds == pytest.approx(z, abs=1e-5)
  assert np.std([s.log_odds for s in together]) > 0.05
  for row, expected in zip(rows[:5], together[:5], strict=True):
    (single,) = score_lib.score_rows(judge, [row])
    assert single.log_odds == pytest.approx(expected.log_odds, abs=1e-5)


@pytest.mark.parametrize("chunk, rows_a_call", [(7, 1), (1000, 8)])
def test_score_does_not_depend_on_batch_size(
  judge, monkeypatch, chunk, rows_a_call
):
  rows = _rows(40, seed=3)
  expected = [s.log_odds for s in score_lib.score_rows(judge, rows)]

  monkeypatch.setattr(score_lib, "_CHUNK", chunk)
  backend = "cpu" if rows_a_call == 1 else "tpu"
  monkeypatch.setattr(score_lib.jax, "default_backend", lambda: backend)
  found = [s.log_odds for s in score_lib.score_rows(judge, rows)]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_score_fields(judge):
  spec = Spec(rules=(Rule(id="a", guideline="bread", polarity="forbid"),))
  chats = [row["messages"] for row in _rows(4)]
  scores = csrm.score(judge, spec, chats)

  for s in scores:
    assert s.p_comply == pytest.approx(1 / (1 + np.exp(-s.log_odds)))
    assert s.verdict == ("comply" if s.log_odds >= 0 else "violate")
    assert s.spec_fingerprint == spec.fingerprint()
    assert s.model_fingerprint == judge.fingerprint
    assert s.helpfulness is None and s.calibrated and not s.truncated
  assert {s.verdict for s in csrm.score(judge, "x", chats)} <= {
    "comply", "violate",
  }  # fmt: skip
  assert csrm.score(judge, spec, []) == []


def test_temperature_divides_the_log_odds(judge):
  row = _rows(1)
  raw = dataclasses.replace(judge, temperature=1.0)

  (cold,) = score_lib.score_rows(raw, row)
  (warm,) = score_lib.score_rows(judge, row)
  assert warm.log_odds == pytest.approx(cold.log_odds / 1.7, rel=1e-6)
  assert raw.fingerprint != judge.fingerprint


def test_fingerprint_follows_the_weights(judge):
  params = judge.params | {
    "head": {"kernel": judge.params["head"]["kernel"] + 1e-6}
  }
  assert dataclasses.replace(judge).fingerprint == judge.fingerprint
  changed = dataclasses.replace(judge, params=params)
  assert changed.fingerprint != judge.fingerprint


def test_any_turn_is_the_lowest_of_the_turns(judge):
  rows = _rows(20, seed=1, turns=8)
  found = score_lib.score_rows(judge, rows, turns="any")

  several = 0
  for row, s in zip(rows, found, strict=True):
    messages = row["messages"]
    parts = [
      row | {"messages": messages[: i + 1]}
      for i, m in enumerate(messages)
      if m["role"] == "assistant"
    ]
    each = [s.log_odds for s in score_lib.score_rows(judge, parts)]
    assert s.log_odds == pytest.approx(min(each), abs=1e-5)
    assert messages[s.turn]["role"] == "assistant"
    assert s.turn == 2 * int(np.argmin(each)) + 1
    assert s.calibrated == (len(parts) == 1)
    several += len(parts) > 1
  assert several > 5


def test_truncation_is_flagged_and_leaves_others_alone(judge):
  short, long = _rows(2, turns=2)
  long = long | {
    "messages": [
      {"role": "user", "content": "bread " * 300},
      *long["messages"],
    ]
  }
  plain, cut = score_lib.score_rows(judge, [short, long], max_tokens=150)

  assert (plain.truncated, cut.truncated) == (False, True)
  (alone,) = score_lib.score_rows(judge, [short])
  assert plain.log_odds == pytest.approx(alone.log_odds, abs=1e-5)


def test_sequences_longer_than_the_usual_row(judge):
  row = _rows(1)[0]
  row["messages"][0]["content"] = "bread " * 1200
  ids = template.encode(judge.tokenizer, row["messages"], row["spec"])
  assert len(ids) > 1024

  (found,) = score_lib.score_rows(judge, [row])
  expected = _alone(judge, ids)[0] / judge.temperature
  assert found.log_odds == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"spec": None}, r"row 'r0'.*field 'spec': missing"),
    ({"spec": " "}, r"row 'r0'.*empty"),
    ({"messages": []}, r"row 'r0'.*last message"),
    (
      {"messages": [{"role": "assistant", "content": "bread " * 900}]},
      r"row 'r0'.*raise max_tokens",
    ),
  ],
)
def test_bad_rows_are_named(judge, change, message):
  (row,) = _rows(1)
  with pytest.raises(ValueError, match=message):
    score_lib.score_rows(judge, [row | change], max_tokens=800)


def test_options_that_the_judge_cannot_follow(judge):
  with pytest.raises(ValueError, match=r"max_tokens = 9999.*2048"):
    score_lib.score_rows(judge, [], max_tokens=9999)
  with pytest.raises(ValueError, match="turns 'first'"):
    score_lib.score_rows(judge, [], turns="first")
  kernel = judge.params["head"]["kernel"] * jnp.array([[1.0], [0.0]])
  blind = dataclasses.replace(
    judge, params=judge.params | {"head": {"kernel": kernel}}
  )
  with pytest.raises(ValueError, match="no trained helpfulness head"):
    score_lib.score_rows(blind, [], helpfulness=True)


# -- Loading ---------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(judge, tmp_path_factory):
  return tiny.write_workdir(tmp_path_factory.mktemp("run"), judge)


@pytest.mark.parametrize("path", [".", "checkpoints/7"])
def test_load_workdir(judge, workdir, path):
  loaded = csrm.load(workdir / path)

  assert loaded.fingerprint == judge.fingerprint
  rows = _rows(3)
  found, expected = (
    [s.log_odds for s in score_lib.score_rows(j, rows)] for j in (loaded, judge)
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_load_refuses_another_template(judge, tmp_path, monkeypatch):
  tiny.write_workdir(tmp_path, judge)
  monkeypatch.setattr(template, "INSTRUCTION", "Judge.")

  with pytest.raises(
    ValueError,
    match="template_fingerprint is sha256:",
  ):
    csrm.load(tmp_path)


def test_load_refuses_what_is_no_model(tmp_path):
  with pytest.raises(ValueError, match="absent: no such folder"):
    csrm.load(tmp_path / "absent")
  with pytest.raises(ValueError, match="tokenizer"):
    csrm.load(tmp_path)


def test_public_names():
  assert csrm.Spec is Spec
  assert csrm.load is load
  with pytest.raises(AttributeError, match="no attribute 'scores'"):
    _ = csrm.scores
  script = "import sys, csrm_jax; csrm_jax.Spec; print('jax' in sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
  )
  assert done.stdout.strip() == "False", done.stderr


# -- Files -----------------------------------------------------------------


def _write(path, rows):
  lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
  path.write_text("\n".join(lines) + "\n")
  return path


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_file_writes_the_contract_in_order(judge, tmp_path):
  rows = _rows(9)
  rows[2]["label"] = 1
  counts = score_file(
    judge, _write(tmp_path / "rows.jsonl", rows), tmp_path / "scores.jsonl"
  )

  assert counts["rows"] == 9 and counts["truncated"] == 0
  lines = _read(tmp_path / "scores.jsonl")
  assert [line["id"] for line in lines] == [row["id"] for row in rows]
  expected = score_lib.score_rows(judge, rows)
  for line, s in zip(lines, expected, strict=True):
    assert set(line) == {
      "id", "log_odds", "p_comply", "verdict", "truncated",
      "spec_fingerprint", "model_fingerprint",
    }  # fmt: skip
    assert line["log_odds"] == pytest.approx(s.log_odds, abs=1e-5)
    assert line["verdict"] == s.verdict


def test_score_file_any_turn_and_helpfulness(judge, tmp_path):
  source = _write(tmp_path / "rows.jsonl", _rows(5))
  score_file(
    judge, source, tmp_path / "out.jsonl", turns="any", helpfulness=True
  )
  for line in _read(tmp_path / "out.jsonl"):
    assert {"helpfulness", "calibrated", "turn"} <= set(line)


def test_score_file_under_one_spec(judge, tmp_path):
  rows = [
    {k: v for k, v in row.items() if k != "spec" or i % 2}
    for i, row in enumerate(_rows(4))
  ]
  spec = Spec(text="S1: Disallowed: bread.")
  score_file(
    judge,
    _write(tmp_path / "rows.jsonl", rows),
    tmp_path / "out.jsonl",
    spec=spec,
  )
  prints = {line["spec_fingerprint"] for line in _read(tmp_path / "out.jsonl")}
  assert prints == {spec.fingerprint()}


TOO_LONG = {
  "id": "long",
  "spec": "x",
  "messages": [{"role": "assistant", "content": "bread " * 400}],
}
NO_ROLE = {"id": "no role", "spec": "x", "messages": [{"content": "a"}]}


def test_score_file_stops_at_a_row_that_is_too_long(judge, tmp_path):
  good = _rows(2)
  source = _write(tmp_path / "rows.jsonl", [good[0], "", TOO_LONG, good[1]])

  with pytest.raises(
    ValueError, match=r"rows.jsonl:3: field 'messages': .*raise max_tokens"
  ):
    score_file(judge, source, tmp_path / "out.jsonl", max_tokens=300)
  assert not (tmp_path / "out.jsonl").exists()


def test_score_file_quarantines(judge, tmp_path):
  good = _rows(2)
  rows = [good[0], NO_ROLE, "{broken", TOO_LONG, good[1]]
  counts = score_file(
    judge,
    _write(tmp_path / "rows.jsonl", rows),
    tmp_path / "out.jsonl",
    max_tokens=300,
    on_bad_row="quarantine",
  )

  assert (counts["rows"], counts["quarantined"]) == (2, 3)
  lines = _read(tmp_path / "out.jsonl")
  assert [line["id"] for line in lines] == [row["id"] for row in good]
  aside = _read(tmp_path / "out.jsonl.quarantine.jsonl")
  assert [entry["line"] for entry in aside] == [2, 3, 4]
  assert aside[2]["row"] == TOO_LONG
  assert all(str(e["line"]) in e["reason"] for e in aside)


def _launch(*args):
  return subprocess.run(
    [sys.executable, str(ROOT / "launch/score.py"), *map(str, args)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


def test_launch_names_line_field_and_remedy(workdir, tmp_path):
  source = _write(tmp_path / "rows.jsonl", [_rows(1)[0], NO_ROLE])
  output = tmp_path / "out.jsonl"
  flags = (f"--model={workdir}", f"--input={source}", f"--output={output}")
  done = _launch(*flags)

  assert done.returncode == 2
  assert f"{source}:2: field 'messages[0].role': missing; add it" in done.stderr
  assert "Traceback" not in done.stderr
  assert not output.exists()

  done = _launch(*flags, "--on_bad_row=quarantine")
  assert done.returncode == 0, done.stderr
  assert "1 bad rows put aside" in done.stdout
  assert len(_read(output)) == 1
  assert len(_read(Path(f"{output}.quarantine.jsonl"))) == 1


def test_launch_names_a_missing_flag(tmp_path):
  done = _launch("--model=runs/demo", f"--output={tmp_path}/o")

  assert done.returncode == 2
  assert "--input is missing; give --input=rows.jsonl" in done.stderr
  assert "Traceback" not in done.stderr


def test_launch_takes_the_shipped_judge_from_any_folder(
  workdir, tmp_path, monkeypatch, capsys
):
  rows = tmp_path / "rows.jsonl"
  messages = [{"role": "assistant", "content": "Yes."}]
  rows.write_text(json.dumps({"id": "1", "messages": messages, "spec": "x"}))
  flags = [f"--input={rows}", f"--output={tmp_path}/scores.jsonl"]
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["launch/score.py", *flags])

  monkeypatch.setattr(launcher, "SHIPPED", tmp_path / "none")
  with pytest.raises(SystemExit, match="2"):
    launcher.main()
  said = capsys.readouterr().err
  assert f"--model is missing and {tmp_path / 'none'} does not exist" in said
  assert "give --model=runs/demo, or --model=smollm2" in said

  monkeypatch.setattr(launcher, "SHIPPED", workdir)
  launcher.main()
  (line,) = _read(tmp_path / "scores.jsonl")
  assert line["model_fingerprint"] == csrm.load(workdir).fingerprint

  assert SHIPPED.is_absolute()
  root = SHIPPED.parents[1]
  assert (root / "launch" / "score.py").is_file()


@pytest.mark.slow
def test_smollm2_judges_zero_shot():
  """An untrained backbone is a judge: it reads " safe" against " unsafe"."""
  try:
    judge = csrm.load("smollm2")
  except ValueError as error:
    pytest.skip(str(error))
  rows = [
    {
      "id": f"{i}",
      "spec": "S1: Disallowed: recipes with alcohol.",
      "messages": [{"role": "assistant", "content": text}],
    }
    for i, text in enumerate(("Boil the rice.", "Add a glass of rum."))
  ]
  found = [s.log_odds for s in score_lib.score_rows(judge, rows)]

  embedding = judge.params["embed"]["embedding"]
  ids = template.encode(judge.tokenizer, rows[0]["messages"], rows[0]["spec"])
  packed = trie.pack(
    [Example("x", (Segment(tuple(ids)),))], row_length=128, slots=1, pairs=1
  )
  hidden = judge.model.hidden(judge.params, packed.batch)[0, len(ids) - 1]
  safe, unsafe = (judge.tokenizer.encode(w)[0] for w in (" safe", " unsafe"))
  logits = embedding[jnp.array([safe, unsafe])] @ hidden
  assert found[0] == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)
  assert found[0] != found[1]
