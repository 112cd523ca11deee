"""The Beam pipeline gives what preparation gives on this machine."""

import json

import pytest

from csrm_jax.config import default
from csrm_jax.data import families, prepare
from tests import tiny

pytest.importorskip(
  "apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'"
)

TWO = "--direct_num_workers=2 --direct_running_mode=multi_processing"
FILES = ("train.array_record", "heldout.jsonl", "quarantine.jsonl", "meta.json")


@pytest.fixture
def config(tmp_path):
  """Rows of a file with two bad ones, a synthetic and an augmented source."""
  lines = []
  for i in range(40):
    said = [("user", f"q{i // 2}"), ("assistant", f"answer {i}")]
    messages = [{"role": r, "content": c} for r, c in said]
    row = {"id": f"j{i}", "label": i % 2, "spec": f"Disallowed: thing {i % 3}."}
    lines.append(json.dumps(row | {"messages": messages}))
  long = {"id": "long", "label": 1, "spec": "S"}
  long["messages"] = [{"role": "assistant", "content": "word " * 4000}]
  lines[7:7] = [json.dumps(long), "no json"]
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(lines))
  c = default()
  c.data.update(
    source="jsonl,synthetic:14,synthetic_augmented:12",
    path=str(path),
    stages="jsonl:4;synthetic/presence,synthetic/swap:3",
    on_bad_row="quarantine",
    heldout=0.2,
    row_length=2048,
    slots=64,
    pairs=128,
    workers=1,
  )
  return c


def both(config, folder, options):
  """Manifests of the two ways; the files of one must be those of the other."""
  metas = []
  for runner in ("local", "beam"):
    config.data.update(runner=runner, beam_options=options)
    meta = prepare.prepare(config, folder / runner, tiny.tokenizer())
    metas.append(meta)
  for file in FILES:
    mine, theirs = (folder / name / file for name in ("local", "beam"))
    assert mine.exists() == theirs.exists(), file
    if mine.exists():
      assert mine.read_bytes() == theirs.read_bytes(), file
  assert not (folder / "beam" / "work").exists()
  return metas


def test_two_beam_processes_give_the_local_records(config, tmp_path):
  local, beam = both(config, tmp_path, TWO)
  assert local == beam
  assert beam["counts"]["quarantined"] == 2
  assert beam["stage_families"][:2] == [4, 3]
  assert beam["augmentation"]["families"]["train"] > 0


def test_many_buckets_shuffled(config, tmp_path, monkeypatch):
  monkeypatch.setattr(families, "BUCKET_TOKENS", 8000)
  monkeypatch.setattr(families, "BUCKET_ROWS", 150)
  config.data.update(source="synthetic:12", stages="", shuffle_specs=True)
  local, beam = both(config, tmp_path, "")  # in this process, as patched
  assert local == beam and beam["counts"]["shuffled_specs"] > 20


def test_the_first_bad_row_is_told(config, tmp_path):
  config.data.update(on_bad_row="stop", source="jsonl", stages="")
  told = []
  for runner in ("local", "beam"):
    config.data.runner = runner
    with pytest.raises(ValueError, match="row 'long'") as error:
      prepare.prepare(config, tmp_path / runner, tiny.tokenizer())
    told.append(str(error.value))
  assert told[0] == told[1]
