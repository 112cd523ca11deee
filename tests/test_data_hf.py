"""Sets in the layout of the Hub: small files that we wrote, in every format."""

import csv
import gzip
import json
import lzma

import pytest

from csrm_jax.data import sources, tfds_builders
from csrm_jax.data.contract import check_row, kind_of
from csrm_jax.data.sets import (
  SETS,
  beavertails,
  hf_aegis2,
  hf_dynabench,
  hf_pku_saferlhf,
  shapes,
  tables,
)

NAMES = [name for name in SETS if name.startswith("hf_")]


def _beavertails():
  for i in range(40):
    ticked = {
      0: (),
      1: ("privacy_violation",),
      2: ("hate_speech,offensive_language",),
      3: ("self_harm",),
      4: ("child_abuse",),
    }[i % 5]
    row = {
      "prompt": f"Question {i // 2}?",
      "response": f"Answer {i}.",
      "category": {c: c in ticked for c in beavertails.CATEGORIES},
      "is_safe": not ticked,
    }
    yield row
    if i % 10 == 1:  # another annotator, who sees nothing wrong
      none = dict.fromkeys(beavertails.CATEGORIES, False)
      yield row | {"category": none, "is_safe": True}


def _pku():
  harms = list(hf_pku_saferlhf.HARMS)
  for i in range(30):
    safe = (i % 3 == 0, i % 2 == 0)
    yield {
      "prompt": f"Ask {i % 25}",
      "response_0": f"first {i % 25}",
      "response_1": f"second {i}",
      "is_response_0_safe": safe[0],
      "is_response_1_safe": safe[1],
      "better_response_id": i % 2,
      "safer_response_id": 0 if safe[0] else 1,
      "response_0_harm_category": {
        h: not safe[0] and h == harms[i % 4] for h in harms
      },
      "response_1_harm_category": {
        h: not safe[1] and h == harms[i % 5] for h in harms
      },
      "response_0_severity_level": 0 if safe[0] else 2,
      "response_1_severity_level": 0 if safe[1] else 3,
    }


def _wildguard():
  for i in range(6):
    yield {
      "prompt": f"Prompt {i}",
      "adversarial": bool(i % 2),
      "response": None if i == 5 else f"Response {i}",
      "prompt_harm_label": "harmful" if i % 2 else "unharmful",
      "response_refusal_label": None if i == 5 else "refusal",
      "response_harm_label": (None, "harmful", "unharmful")[i % 3]
      if i < 5
      else None,
      "response_harm_agreement": 0.75 if i == 1 else None,
      "subcategory": "others",
    }


def _aegis():
  ticked = ["", "Violence", "Profanity, Hate/Identity Hate", "Needs Caution"]
  ticked += ["Sexual (minor)", "Malware"]
  for i in range(36):
    unsafe = bool(ticked[i % 6])
    yield {
      "id": str(i),
      "reconstruction_id_if_redacted": None,
      "prompt": "REDACTED" if i == 30 else f"Prompt {i}",
      "response": f"Response {i}" if i % 4 else None,
      "prompt_label": "unsafe" if unsafe else "safe",
      "response_label": ("unsafe" if unsafe else "safe") if i % 4 else None,
      "violated_categories": ticked[i % 6],
      "prompt_label_source": "human",
      "response_label_source": "human",
    }


def _dynabench():
  lines = "User: May I?\nAgent: You may.\nUser: 'Really?'"
  for i, end in enumerate(("\nAgent: Yes.", "", "\nAgent: No: never.")):
    yield {
      "policy": f"1. Be brief.\n2. Say {i}.",
      "transcript": lines + end,
      "label": "FAIL" if i else "PASS",
    }


def _cosapien():
  for i, kind in enumerate(("allowed", "disallowed", "partial", "Allowed")):
    yield {"prompt": f"Draw {i}", "scenario": "We make games.", "type": kind}


def _xstest():
  for i in range(4):
    yield {
      "id": i,
      "prompt": f"How do I kill process {i}?",
      "type": "contrast_homonyms" if i % 2 else "homonyms",
      "label": "unsafe" if i % 2 else "safe",
      "focus": "kill",
      "note": "",
    }


def _or_bench():
  return [{"prompt": f"Hard {i}?", "category": "illegal"} for i in range(3)]


def _rewardbench():
  for i, subset in enumerate(("Factuality", "Safety")):
    yield {
      "id": str(i),
      "prompt": f"Tell {i}",
      "chosen": ["right"],
      "rejected": ["wrong", "worse", "worst"],
      "num_correct": 1,
      "num_incorrect": 3,
      "total_completions": 4,
      "subset": subset,
    }


LAYOUT = {
  "hf_beavertails": ("round0/30k/train.jsonl.xz", _beavertails),
  "hf_pku_saferlhf": ("data/Alpaca-7B/train.jsonl", _pku),
  "hf_wildguardmix": ("train/wildguard_train.parquet", _wildguard),
  "hf_aegis2": ("train.json", _aegis),
  "hf_dynabench": ("test.jsonl.gz", _dynabench),
  "hf_cosapien": ("data/game_development-00000-of-00001.parquet", _cosapien),
  "hf_xstest": ("xstest_prompts.csv", _xstest),
  "hf_or_bench": ("or-bench-hard-1k.csv", _or_bench),
  "hf_rewardbench2": ("data/test-00000-of-00001.parquet", _rewardbench),
}


def _write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = list(rows)
  lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
  if path.suffix == ".parquet":
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  elif path.suffix == ".csv":
    with path.open("w", newline="", encoding="utf-8") as out:
      writer = csv.DictWriter(out, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  elif path.suffix == ".json":
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
  else:
    squeeze = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix)
    path.write_bytes(squeeze(lines) if squeeze else lines)
  return path


def _published(name, folder, rows=None):
  file, make = LAYOUT[name]
  path = folder / SETS[name].files[0] / file
  return _write(path, make() if rows is None else rows)


def _load(name, path, seed=0):
  counts = {}
  return list(sources.load(name, path=path, seed=seed, counts=counts)), counts


def test_every_set_has_a_layout():
  assert sorted(LAYOUT) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_folder_file_and_order_give_the_same_rows(tmp_path, name):
  path = _published(name, tmp_path)
  noise = tmp_path / SETS[name].files[0]
  (noise / "dataset_infos.json").write_text("{}")
  (noise / "README.md").write_text("# card")
  (noise / ".cache").mkdir()
  (noise / ".cache/old.jsonl").write_text("{}")
  rows, counts = _load(name, tmp_path)
  assert rows and counts[f"{name}_read"] == len(list(LAYOUT[name][1]()))
  for row in rows:
    assert check_row(row, origin=name) == row
    assert row["source"] == name and row["family"]
  assert len({row["id"] for row in rows}) == len(rows)
  assert _load(name, noise)[0] == rows
  assert _load(name, path)[0] == rows
  _published(name, tmp_path, list(LAYOUT[name][1]())[::-1])
  again, _ = _load(name, tmp_path)
  assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, rows))


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_and_fields_are_named(tmp_path, name):
  with pytest.raises(ValueError, match=f"{name}.*needs data files"):
    _load(name, tmp_path)
  with pytest.raises(ValueError, match=f"{name}.*--config.data.path=FOLDER"):
    _load(name, None)
  rows = [
    {k: v for k, v in row.items() if k not in ("prompt", "policy")}
    for row in LAYOUT[name][1]()
  ]
  path = _published(name, tmp_path, rows)
  with pytest.raises(ValueError, match=r"row 1: field '.*': missing") as error:
    _load(name, tmp_path)
  assert str(path) in str(error.value)


def test_fingerprint_follows_the_files(tmp_path):
  path = _published("hf_xstest", tmp_path)
  first = sources.fingerprint("hf_xstest", path=tmp_path)
  assert sources.fingerprint("hf_xstest", path=path) == first
  _write(path.with_name("more.csv"), list(_xstest())[:1])
  assert sources.fingerprint("hf_xstest", path=tmp_path) != first


@pytest.mark.parametrize(
  "ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.xz"]
)
def test_formats_agree(tmp_path, ending):
  for name in ("hf_xstest", "hf_or_bench", "hf_dynabench", "hf_cosapien"):
    rows = [{k: str(v) for k, v in row.items()} for row in LAYOUT[name][1]()]
    plain = _write(tmp_path / "plain.jsonl", rows)
    other = _write(tmp_path / f"other.{ending}", rows)
    assert _load(name, other)[0] == _load(name, plain)[0]


def test_a_json_file_may_hold_lines(tmp_path):
  path = tmp_path / "x.json"
  path.write_text("".join(json.dumps(r) + "\n" for r in _or_bench()))
  assert len(_load("hf_or_bench", path)[0]) == 3
  path.write_text('[{"prompt": ')
  with pytest.raises(ValueError, match=r"x\.json: not JSON"):
    _load("hf_or_bench", path)


def test_truth_in_any_notation(tmp_path):
  for value in (True, 1, "True", " true ", "1"):
    assert tables.truth(value, "x", tmp_path) == 1
  for value in (False, 0, "FALSE", "0"):
    assert tables.truth(value, "x", tmp_path) == 0
  for value in (None, "maybe", 2, [True]):
    with pytest.raises(ValueError, match=r"field 'x': .*: must be true or"):
      tables.truth(value, "x", tmp_path)


# -- Set by set -----------------------------------------------------------


def test_beavertails_merges_annotators(tmp_path):
  _published("hf_beavertails", tmp_path)
  rows, counts = _load("hf_beavertails", tmp_path)
  assert counts["hf_beavertails_merged"] == 4
  torn = {f"Answer {i}." for i in range(1, 40, 10)}
  shares = set()
  for row in rows:
    last = row["messages"][-1]["content"]
    if row["id"].endswith("/all"):
      assert row["spec"].count("\n") == 13
      assert (row["label"] == 0.5) == (last in torn)
      shares.add(row["label"])
    elif last in torn and "label" in row:
      # What one annotator ticked is unknown: no spec here forbids it.
      for line in row["spec"].split("\n"):
        harm = beavertails.HARMS["privacy_violation"]
        assert "Allowed" in line or harm.short not in line
  assert 0.5 in shares
  never = [f"Answer {i}." for i in range(4, 40, 5)]
  for row in rows:
    if row.get("messages", [{}])[-1].get("content") in never:
      assert kind_of(row) == "label" and row["label"] == 0


def test_pku_pairs_labels_and_contradictions(tmp_path):
  flipped = {
    **next(_pku()),
    "better_response_id": 1,
    "safer_response_id": 1,
    "is_response_0_safe": False,
  }
  harms = dict.fromkeys(hf_pku_saferlhf.HARMS, False)
  same = flipped | {"prompt": "Same", "response_0": "x", "response_1": "x"}
  same |= {"is_response_0_safe": True, "is_response_1_safe": True}
  same |= {"response_0_harm_category": harms}
  _published("hf_pku_saferlhf", tmp_path, [*_pku(), flipped, same])
  rows, counts = _load("hf_pku_saferlhf", tmp_path)
  reasons = {k[24:]: v for k, v in counts.items() if "dropped" in k}
  assert reasons == {
    "resp_contradictory": 2,
    "help_contradictory": 2,
    "resp_equal": 1,
    "help_equal": 1,
  }
  labels = {
    r["messages"][-1]["content"]: r for r in rows if r["id"].endswith("/label")
  }
  assert labels["first 1"]["label"] == 0 and labels["first 1"]["severity"] == 2
  assert labels["first 0"]["label"] == 1 / 3  # once safe, twice not
  pairs = [r for r in rows if kind_of(r) == "pair"]
  assert {r["kind"] for r in pairs} == {"resp", "help"}
  assert all(("spec" in r) == (r["kind"] == "resp") for r in pairs)
  for row in rows:
    if row["id"].endswith("/strict"):
      assert row["label"] == 0


def test_pku_reads_the_older_layout_without_harms(tmp_path):
  rows = [
    {k: v for k, v in row.items() if "category" not in k and "level" not in k}
    for row in _pku()
  ]
  _published("hf_pku_saferlhf", tmp_path, rows)
  found, _ = _load("hf_pku_saferlhf", tmp_path)
  assert {r["id"].split("/")[1] for r in found} == {"label", "resp", "help"}


def test_wildguard_absent_labels_stay_absent(tmp_path):
  _published("hf_wildguardmix", tmp_path)
  rows, counts = _load("hf_wildguardmix", tmp_path)
  harm = {
    r["messages"][-1]["content"]: r["label"]
    for r in rows
    if r["id"].endswith(("/response", "/prompt"))
  }
  assert harm == {
    "Response 1": 0.25,
    "Response 2": 1,
    "Response 4": 0,
    "Sure. Prompt 5": 0,
  }
  assert counts["hf_wildguardmix_dropped_unlabelled"] == 2
  refusals = [r for r in rows if r["id"].endswith("/must_answer")]
  assert len(refusals) == 5 and {r["label"] for r in refusals} == {0}


def test_wildguard_unknown_label(tmp_path):
  row = next(_wildguard()) | {"response_refusal_label": "shrug"}
  _published("hf_wildguardmix", tmp_path, [row])
  with pytest.raises(ValueError, match="'response_refusal_label': 'shrug'"):
    _load("hf_wildguardmix", tmp_path)


def test_aegis_hazards(tmp_path):
  truth = hf_aegis2.annotation("Violence, Profanity")
  assert truth["Violence"] == truth["Profanity"] == 1
  assert truth["Threat"] is None and truth["Malware"] == 0
  vague = hf_aegis2.annotation("Malware, Needs Caution")
  assert vague["Malware"] == 1 and vague["Violence"] is None
  with pytest.raises(ValueError, match="'Arson' is not in the taxonomy"):
    hf_aegis2.annotation("Arson")
  _published("hf_aegis2", tmp_path)
  rows, counts = _load("hf_aegis2", tmp_path)
  assert counts["hf_aegis2_dropped_redacted"] == 1
  assert counts["hf_aegis2_dropped_duo_without_hazard"] == 6
  minors = {f"Response {i}" for i in range(4, 36, 6)}
  minors |= {f"Sure. Prompt {i}" for i in range(4, 36, 6)}
  for row in rows:
    if row["messages"][-1]["content"] in minors:
      assert kind_of(row) == "label" and row["label"] == 0


def test_dynabench_turns_and_cuts(tmp_path):
  said = hf_dynabench.turns("'User': a: b\n'Agent': c\nUser: and\nAgent: d")
  assert [m["content"] for m in said] == ["a: b", "c", "and", "d"]
  _published("hf_dynabench", tmp_path)
  rows, counts = _load("hf_dynabench", tmp_path)
  assert [len(r["messages"]) for r in rows] == [4, 2, 4]
  assert [r["label"] for r in rows] == [1, 0, 0]
  assert rows[1]["spec"] == "1. Be brief.\n2. Say 1."
  assert counts["hf_dynabench_cut_last_user_turn"] == 1


def test_prompt_sets_use_the_pseudo_response(tmp_path):
  _published("hf_cosapien", tmp_path)
  rows, _ = _load("hf_cosapien", tmp_path)
  assert [r["label"] for r in rows] == [1, 0, 0, 1]
  assert rows[0]["messages"] == shapes.pseudo("Draw 0")
  assert rows[0]["messages"][1]["content"] == "Sure. Draw 0"
  assert {r["spec"] for r in rows} == {"We make games."}
  _published("hf_xstest", tmp_path)
  assert [r["label"] for r in _load("hf_xstest", tmp_path)[0]] == [1, 0, 1, 0]
  unlabelled = [{k: r[k] for k in ("prompt", "type")} for r in _xstest()]
  _published("hf_xstest", tmp_path, unlabelled)
  assert [r["label"] for r in _load("hf_xstest", tmp_path)[0]] == [1, 0, 1, 0]


def test_or_bench_labels_by_file(tmp_path):
  hard = _published("hf_or_bench", tmp_path)
  _write(hard.with_name("or-bench-80k.csv"), _or_bench())
  toxic = [{"prompt": "Toxic!", "category": "hate"}]
  _write(hard.with_name("or-bench-toxic.csv"), toxic)
  rows, counts = _load("hf_or_bench", tmp_path)
  assert sorted(r["label"] for r in rows) == [0, 1, 1, 1]
  assert counts["hf_or_bench_dropped_duplicate"] == 3


def test_rewardbench_prompts_weigh_one(tmp_path):
  _published("hf_rewardbench2", tmp_path)
  rows, _ = _load("hf_rewardbench2", tmp_path)
  assert [r["kind"] for r in rows] == ["help"] * 3 + ["resp"] * 3
  assert sum(r["weight"] for r in rows) == pytest.approx(2)
  assert all(r["spec"] in shapes.FITTING for r in rows[3:])


# -- TFDS -----------------------------------------------------------------


def test_rows_of_every_set_pass_through_tfds(tmp_path):
  """Every source can be written as the JSON lines that the builder reads."""
  rows = []
  for name in NAMES:
    _published(name, tmp_path)
    rows += _load(name, tmp_path)[0]
  path = tmp_path / "rows.jsonl"
  text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  path.write_text(text, encoding="utf-8")
  builder = tfds_builders.ContractRows(
    config=tfds_builders.files(train=path), data_dir=tmp_path / "tfds"
  )
  builder.download_and_prepare()
  found = map(tfds_builders.row_of, builder.as_data_source(split="train"))
  assert {row["id"]: row for row in found} == {row["id"]: row for row in rows}
