"""The TFDS builders, read back without TensorFlow."""

import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from csrm_jax.data import contract, synthetic, tfds_builders


@pytest.fixture
def rows_file(tmp_path):
  rows = list(synthetic.rows(split="train", families=4, seed=0, max_rules=2))
  rows.append(
    {
      "id": "objects",
      "messages": [{"role": "assistant", "content": "Größe — 大"}],
      "label": 0.25,
      "spec": {
        "rules": [{"id": "a", "polarity": "forbid", "guideline": "size"}]
      },
    }
  )
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
  return path, rows


def test_contract_rows_come_back_whole(rows_file, tmp_path):
  path, rows = rows_file
  builder = tfds_builders.ContractRows(
    config=tfds_builders.files(train=path), data_dir=tmp_path / "tfds"
  )
  builder.download_and_prepare()
  source = builder.as_data_source(split="train")

  assert len(source) == len(rows)
  by_id = {r["id"]: r for r in rows}
  for i in range(len(source)):
    example = source[i]
    row = tfds_builders.row_of(example)
    assert row == by_id.pop(row["id"])
    assert example["kind"].decode() == contract.kind_of(row)
    assert json.loads(example["messages"]) == row.get("messages", [])
    assert np.isnan(example["label"]) == ("label" not in row)
    if row["id"] == "objects":
      assert example["spec"].decode() == "S1: Disallowed: size."
      assert example["label"] == np.float32(0.25)
  assert not by_id
  assert "tensorflow" not in sys.modules


def test_data_source_by_name(rows_file, tmp_path):
  path, rows = rows_file
  source = tfds.data_source(
    "contract_rows",
    split="train",
    data_dir=tmp_path / "tfds",
    builder_kwargs={"config": tfds_builders.files(train=path)},
  )
  assert len(source) == len(rows)


def test_changed_files_get_another_name(rows_file):
  path, _ = rows_file
  before = tfds_builders.files(train=path).name
  assert tfds_builders.files(train=path).name == before
  with path.open("a", encoding="utf-8") as out:
    out.write("\n")
  assert tfds_builders.files(train=path).name != before


def test_bad_row_stops_the_build(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"id": "a", "messages": [], "label": 1, "spec": "x"}')
  builder = tfds_builders.ContractRows(
    config=tfds_builders.files(train=path), data_dir=tmp_path / "tfds"
  )
  with pytest.raises(Exception, match=r"rows\.jsonl:1: field 'messages'"):
    builder.download_and_prepare()


def test_files_are_needed(tmp_path):
  with pytest.raises(ValueError, match="no split given"):
    tfds_builders.files()
  with pytest.raises(ValueError, match="no such file"):
    tfds_builders.files(train=tmp_path / "missing.jsonl")
  builder = tfds_builders.ContractRows(data_dir=tmp_path)
  with pytest.raises(ValueError, match="no files; pass config="):
    builder.download_and_prepare()


def test_synthetic_world(tmp_path):
  source = tfds.data_source(
    "synthetic_world/tiny", data_dir=tmp_path, download=True
  )
  expected = list(
    synthetic.rows(split="train", families=8, seed=0, max_rules=3)
  )
  assert set(source) == {"train", "synthetic_seen", "synthetic_unseen"}
  train = [tfds_builders.row_of(e) for e in source["train"]]
  assert sorted(r["id"] for r in train) == sorted(r["id"] for r in expected)
  for name in ("synthetic_seen", "synthetic_unseen"):
    labels = [float(e["label"]) for e in source[name]]
    assert {0.0, 1.0} == set(labels)
