"""Preparation in buckets and processes: nothing of it shows in the records."""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import grain
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from csrm_jax.config import default
from csrm_jax.data import (
  families,
  local,
  pieces,
  prepare,
  sources,
  spill,
  stages,
)
from csrm_jax.data.stages import Candidate, Stage
from tests import tiny

SHAPE = {"row_length": 1024, "slots": 64, "pairs": 128}
FILES = ("train.array_record", "heldout.jsonl", "meta.json")


def config_of(**data):
  config = default()
  config.data.update(SHAPE)
  config.data.update(source="synthetic", examples=8, workers=1)
  config.data.update(**data)
  return config


def records(folder, meta):
  source = grain.sources.ArrayRecordDataSource(
    str(folder / "train.array_record")
  )
  raw = b"".join(source[i] for i in range(len(source)))
  return np.frombuffer(raw, families.row_dtype(**meta["shape"]))


@pytest.fixture
def small(monkeypatch):
  """Sizes at which eight families are many buckets, runs and chunks."""
  monkeypatch.setattr(families, "BUCKET_TOKENS", 30_000)
  monkeypatch.setattr(families, "BUCKET_ROWS", 90)
  monkeypatch.setattr(local, "CHUNK", 32)
  monkeypatch.setattr(local, "FEW", 64)


@pytest.fixture
def runs_on_disk(monkeypatch):
  """Sorters that hold next to nothing in memory."""
  whole = spill.Sorter.__init__

  def tight(self, folder, memory=0):
    whole(self, folder, 50_000)

  monkeypatch.setattr(spill.Sorter, "__init__", tight)


SOURCES = {
  "staged": {"stages": "synthetic/presence:2;synthetic/swap,synthetic/level:1"},
  "augmented": {"source": "synthetic_augmented,synthetic:3", "examples": 8,
                "row_length": 2048, "slots": 64, "pairs": 128},
  "shuffled": {"shuffle_specs": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_workers_and_memory_change_nothing(name, tmp_path, small, request):
  tokenizer = tiny.tokenizer()
  config = config_of(**SOURCES[name])
  one = prepare.prepare(config, tmp_path / "one", tokenizer)
  request.getfixturevalue("runs_on_disk")
  config.data.workers = 2
  two = prepare.prepare(config, tmp_path / "two", tokenizer)
  assert one == two
  for file in FILES:
    mine, theirs = (tmp_path / n / file for n in ("one", "two"))
    assert mine.read_bytes() == theirs.read_bytes(), file
  assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(FILES)


def test_many_buckets_hold_what_one_does(tmp_path, monkeypatch):
  tokenizer = tiny.tokenizer()
  config = config_of(stages=SOURCES["staged"]["stages"])
  one = prepare.prepare(config, tmp_path / "one", tokenizer)
  monkeypatch.setattr(families, "BUCKET_TOKENS", 30_000)
  many = prepare.prepare(config, tmp_path / "many", tokenizer)
  assert one["fingerprint"] != many["fingerprint"]
  same = {k: v for k, v in one["counts"].items() if k not in (
    "padding", "tokens_in_tries", "repeated_prefix_tokens")}  # fmt: skip
  assert {k: many["counts"][k] for k in same} == same
  assert one["stage_families"] == many["stage_families"]
  assert one["label_balance"] == many["label_balance"]
  for name in ("label_weight", "pair_weight"):
    sums = [
      np.sort(records(tmp_path / f, m)[name], axis=None)
      for f, m in (("one", one), ("many", many))
    ]
    used = [s[s > 0] for s in sums]
    assert used[0].size and np.array_equal(*used)
  # A bucket ends with a few rows that are not full.
  assert many["rows"] < 1.2 * one["rows"]


@functools.cache
def synthetic_pieces():
  recipe = pieces.Recipe(tiny.tokenizer(), 0, 0.1, 512, SHAPE, False)
  reading = sources.Reading(None, 0)
  (part,) = sources.parts("synthetic:3", 0)
  rows = list(sources.read(part, reading, bad=None, counts={}))
  return recipe, pieces.encode(recipe, rows).pieces


@settings(max_examples=4)
@given(st.randoms(use_true_random=False))
def test_a_bucket_depends_on_its_members_alone(rng: random.Random):
  recipe, found = synthetic_pieces()
  found = list(found)
  made = []
  for shuffled in (False, True):
    members: dict[str, list] = {}
    if shuffled:
      rng.shuffle(found)
    for piece in found:
      rows = members.setdefault(piece.family, [])
      rows.append((piece.key, piece.encoded))
    written: list[bytes] = []
    sums = families.pack_bucket(recipe, members.items(), written.append)
    assert sums.rows == len(written) and sums.families == 3
    made.append((sums, written))
  assert made[0] == made[1]


KINDS = st.sampled_from("abcd")


@given(
  st.lists(KINDS, max_size=40),
  st.lists(
    st.tuples(st.frozensets(KINDS, min_size=1), st.integers(1, 6)), max_size=3
  ),
  st.integers(0, 40),
)
def test_stages_take_families_as_they_come(found, wanted, cut):
  candidates = [
    Candidate((0, "", i), f"f{i}", source, 10 + i)
    for i, source in enumerate(found)
  ]
  parts = [Stage(*stage) for stage in wanted]
  left = [stage.room for stage in parts]
  expected = {}
  for one in candidates:  # as a reader of the rows would place them
    for i, stage in enumerate(parts):
      if left[i] and one.source in stage.sources:
        left[i] -= 1
        expected[one.family] = (i, one.tokens)
        break
  assert stages.staged(candidates[::-1], parts) == expected
  reduced = [
    *stages.earliest(candidates[cut:], parts),
    *stages.earliest(candidates[:cut], parts),
  ]
  assert stages.staged(reduced, parts) == expected


def test_parts_of_a_synthetic_source_are_the_whole():
  reading = sources.Reading(None, 3)

  def read(groups):
    parts = sources.parts("synthetic:9,synthetic_augmented:7", 0, groups=groups)
    for part in parts:
      if part.name == "synthetic":
        yield from sources.read(part, reading, bad=None, counts={})
      else:
        yield from sources.conversations(part, reading)

  whole, pieced = list(read(0)), list(read(4))
  rows = [
    [item[1] if isinstance(item[0], tuple) else item for item in found]
    for found in (whole, pieced)
  ]
  assert rows[0] == rows[1] and len(whole) > 100
  for found in (whole, pieced):
    keys = [item[0] for item in found if isinstance(item[0], tuple)]
    assert keys == sorted(set(keys))


MEASURED = """
import json, resource, sys, time
from csrm_jax.data import prepare
from tests import test_data_local as own, tiny
if __name__ == "__main__":
  config = own.config_of(
    source="jsonl", path=sys.argv[1], examples=0, workers=2, row_length=512,
    shuffle_specs=sys.argv[3] == "shuffled")
  start = time.monotonic()
  meta = prepare.prepare(config, sys.argv[2], tiny.tokenizer())
  peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in
           (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  print(json.dumps({"peaks": peaks, "counts": meta["counts"],
                    "seconds": time.monotonic() - start}))
"""


def write_rows(path: Path, number: int) -> None:
  """Label rows, four to a family, under a spec of their family."""
  words = [
    "bread",
    "home",
    "sources",
    "jokes",
    "spoilers",
    "policy",
    "answer",
    "safe",
  ]
  with path.open("w", encoding="utf-8") as out:
    for i in range(number):
      rng = random.Random(i)
      said = " ".join(rng.choices(words, k=12))
      row = {
        "id": str(i), "family": f"f{i // 4}", "label": i % 2,
        "messages": [{"role": "assistant", "content": f"{said} {i}"}],
        "spec": f"Disallowed: {words[i // 4 % 7]} {i // 4 % 500}.",
      }  # fmt: skip
      out.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "shuffled"])
def test_memory_does_not_grow_with_the_data(tmp_path, how):
  peaks = []
  for number in (20_000, 200_000):
    rows = tmp_path / f"{number}.jsonl"
    write_rows(rows, number)
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    done = subprocess.run(
      [sys.executable, script, rows, tmp_path / "out", how],
      capture_output=True, text=True, check=False,
      env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    counts = found["counts"]
    held = sum(1 for _ in (tmp_path / "out" / "heldout.jsonl").open())
    assert counts["rows_label"] + held == number
    print(number, found["peaks"], found["seconds"], counts["tokens_alone"])
    peaks.append(found["peaks"])
  # MiB: sorters and buckets fill up to their sizes, and no further.
  for small, large in zip(*peaks, strict=True):
    assert large < small + 150
