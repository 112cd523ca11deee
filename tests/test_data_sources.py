"""Named sources: what they load, what they need, what their hash covers."""

import collections

import pytest

from csrm_jax.data import sources
from csrm_jax.data.contract import check_row, find, hash_family, objects
from csrm_jax.data.sources import load
from tests.test_data_contract import (
  ANSWER,
  ASK,
  LABEL,
  OTHER,
  ROWS,
  without,
  write,
)


def test_jsonl_rows_get_family_and_source(tmp_path):
  again = LABEL | {"id": "m", "messages": [ASK, OTHER], "source": "mine"}
  shout = LABEL | {
    "id": "n",
    "messages": [{"role": "user", "content": "HOW do I win"}, OTHER],
  }
  path = write(tmp_path / "rows.jsonl", [*ROWS, again, shout])
  rows = list(load("jsonl", path=path, seed=0))
  assert len({r["family"] for r in rows}) == 1  # one prompt
  assert {r["source"] for r in rows} == {"jsonl", "mine"}
  alone = [
    {"id": str(i), "messages": [m], "label": 0, "spec": "x"}
    for i, m in enumerate([ANSWER, OTHER])
  ]
  rows = list(load("jsonl", path=write(path, alone), seed=0))
  assert len({r["family"] for r in rows}) == 2


def test_limit_counts_families(tmp_path):
  rows = [
    LABEL | {"id": f"{f}{i}", "family": str(f)} for i in "ab" for f in range(5)
  ]
  counts = {}
  path = write(tmp_path / "rows.jsonl", rows)
  kept = list(load("jsonl", path=path, seed=0, limit=2, counts=counts))
  families = [r["family"] for r in kept]
  assert len(set(families)) == 2 and families[:2] == families[2:]
  assert [r["id"][1] for r in kept] == ["a", "a", "b", "b"]
  assert counts["jsonl_beyond_limit"] == 6
  assert counts["jsonl_made"] == 4

  turned = write(tmp_path / "turned.jsonl", rows[::-1])
  again = load("jsonl", path=turned, seed=0, limit=2)
  assert {r["family"] for r in again} == set(families)


def test_sources_may_have_limits_of_their_own():
  assert sources.split("synthetic:7, mixture:3,polyguard:9") == {
    "synthetic": 7,
    "beavertails": 3,
    "pku_pairs": 3,
    "polyguard": 3,
  }
  names = "synthetic:3,synthetic_augmented"
  found = collections.defaultdict(set)
  for row in load(names, path=None, seed=0, limit=5):
    found[row["source"].split("/")[0]].add(row["family"])
  assert len(found["synthetic"]) == 3 and len(found["synthetic_augmented"]) == 5


@pytest.mark.parametrize("text", ["synthetic:", "synthetic:0", "synthetic:x"])
def test_limits_are_numbers(text):
  with pytest.raises(ValueError, match="synthetic:N with a number N"):
    sources.split(text)


def test_load_hands_bad_rows_over(tmp_path):
  path = write(tmp_path / "rows.jsonl", [LABEL, "oops"])
  aside = []
  rows = load(
    "jsonl",
    path=path,
    seed=0,
    on_bad_row="quarantine",
    bad=lambda row, reason: aside.append((row, reason)),
  )
  assert len(list(rows)) == 1
  assert len(aside) == 1 and f"{path}:2: not JSON" in aside[0][1]


def test_synthetic_and_lists():
  rows = list(load("synthetic", path=None, seed=0, limit=3))
  assert len({r["family"] for r in rows}) == 3
  for row in rows:
    assert check_row(row, origin="synthetic") == row
  assert sources.split_names("mixture, synthetic") == [
    *sources.MIXTURE,
    "synthetic",
  ]
  assert sources.split_names("polyguard,mixture") == [
    "polyguard",
    "beavertails",
    "pku_pairs",
  ]


def test_the_wide_world_is_a_source():
  rows = list(load("synthetic_wide", path=None, seed=0, limit=3))
  assert len({r["family"] for r in rows}) == 3
  for row in rows:
    assert row["family"].startswith("synthetic-wide-0-")
    assert check_row(row, origin="synthetic_wide") == row
  parts = sources.parts("synthetic_wide", 5, groups=2)
  assert [(p.first, p.groups) for p in parts] == [(0, 2), (2, 2), (4, 1)]
  assert sources.licence("synthetic_wide") == sources.licence("synthetic")
  assert sources.fingerprint("synthetic_wide", path=None) != (
    sources.fingerprint("synthetic", path=None)
  )


def test_permissive_sets_permit_commercial_use():
  names = sources.split_names("synthetic,permissive")
  assert names == ["synthetic", *sources.PERMISSIVE]
  assert len(sources.PERMISSIVE) > 5
  for name in names:
    text, commercial = sources.licence(name)
    assert commercial is True and "NC" not in text, name
  evaluated = {
    "teen_safety_policies",
    "xstest_completions",
    "rm_bench",
    "openai_moderation",
    "cosa",
  }
  assert not evaluated & {*names}
  assert sources.licence("beavertails_augmented") == ("CC BY-NC 4.0", False)
  assert sources.licence("jsonl") == ("your own", None)


def test_permissive_reads_no_file_that_others_are_evaluated_on(staged):
  """Neither the official test part of rbr_gold, nor a prompt of XSTest."""
  made = []
  for name in ("harmbench_responses", "answering"):
    made += load(name, path=staged, seed=0)
  file = find(staged, "xstest", "xstest_completions/completions.jsonl.gz")
  xstest = {hash_family(raw["prompt"]) for raw in objects(file, ("prompt",))}
  assert made and xstest and not xstest & {row["family"] for row in made}
  files = sources.inputs("rbr_gold_train", staged)
  assert [f.name for f in files] == ["train.jsonl", "proposition_prompts.yaml"]


@pytest.mark.parametrize(
  ("source", "path", "message"),
  [
    ("beaver", None, "no set is called 'beaver'; choose from beavertails"),
    ("", None, "is empty; choose from"),
    ("polyguard", None, "--config.data.path=FOLDER, where FOLDER holds poly"),
    ("beavertails", "/nowhere", r"--config.data.path=/nowhere: .*beavertails/"),
    ("jsonl", None, "--config.data.path=None: source 'jsonl' needs the path"),
    ("jsonl", "/", "--config.data.path=/: source 'jsonl' needs the path"),
  ],
)
def test_missing_inputs_name_the_flag(source, path, message):
  with pytest.raises(ValueError, match=message):
    list(load(source, path=path, seed=0))
  with pytest.raises(ValueError, match=message):
    sources.fingerprint(source, path=path)


def test_fingerprint_follows_the_content(tmp_path):
  (tmp_path / "s.txt").write_text("Be kind.")
  row = without(LABEL, "spec") | {"spec_file": "s.txt"}
  path = write(tmp_path / "rows.jsonl", [row])
  first = sources.fingerprint("jsonl", path=path)
  assert sources.fingerprint("jsonl", path=str(path)) == first
  (tmp_path / "s.txt").write_text("Be rude.")
  second = sources.fingerprint("jsonl", path=path)
  write(path, [row | {"label": 0}])
  assert len({first, second, sources.fingerprint("jsonl", path=path)}) == 3
  assert sources.fingerprint("synthetic", path=None).startswith("sha256:")
