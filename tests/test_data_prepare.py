import json
import pathlib
import pickle

import grain
import numpy as np
import pytest

from csrm_jax.config import default
from csrm_jax.data import balance, families, loader, pieces, prepare
from csrm_jax.data.operators import ONE_SIDED, OPERATORS
from csrm_jax.types import PAIR_KINDS
from tests import tiny

USER = {"role": "user", "content": "How do I bake bread?"}


def said(text):
  return [USER, {"role": "assistant", "content": text}]


def contract_rows():
  """A row of each kind, eight families of them."""
  for i in range(8):
    family = {"family": f"f{i}"}
    yield {
      "id": f"a{i}", "messages": said(f"No {i}."), "label": i % 2,
      "spec": "Disallowed: swearing.", "weight": 1.0 + i, **family,
    }  # fmt: skip
    yield {
      "id": f"b{i}", "prompt": [USER], "kind": "resp",
      "chosen": said(f"Yes {i}.")[1:], "rejected": said(f"No {i}.")[1:],
      "spec": "Disallowed: swearing.", "margin": 0.5, **family,
    }  # fmt: skip
    yield {
      "id": f"c{i}", "prompt": [USER], "kind": "help",
      "chosen": said("Flour, water, salt, time.")[1:],
      "rejected": said("Bread.")[1:], **family,
    }  # fmt: skip
    yield {
      "id": f"d{i}", "messages": said(f"Yes {i}."),
      "chosen_spec": "Allowed: mild jokes.",
      "rejected_spec": "Disallowed: swearing.", **family,
    }  # fmt: skip
    yield {
      "id": f"e{i}",
      "ladder": [
        {"messages": said(t), "spec": "Disallowed: swearing."}
        for t in ("Damn!", "Hm.", "Yes.")
      ],
      **family,
    }


@pytest.fixture
def config(tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(json.dumps(r) + "\n" for r in contract_rows()))
  c = default()
  c.data.update(
    source="jsonl", path=str(rows), row_length=512, slots=32, pairs=32
  )
  c.data.heldout = 0.3
  return c


def test_examples_merge_equal_sequences():
  rows = [r for r in contract_rows() if r["family"] == "f1"]
  recipe = pieces.Recipe(tiny.tokenizer(), 0, 0.0, 256, {}, False)
  made = pieces.encode(recipe, [((0, "", i), r) for i, r in enumerate(rows)])
  encoded = [pieces.Encoded(*pickle.loads(p.encoded)) for p in made.pieces]
  example = families.family_of("f1", encoded)
  # No 1. | Yes 1. | two spec-free | Yes 1. lenient | Damn! Hm. Yes.
  assert len(example.segments) == 8
  labelled = [s for s in example.segments if not np.isnan(s.label)]
  assert [(s.label, s.weight) for s in labelled] == [(1.0, 2.0)]
  kinds = [p.kind for p in example.pairs]
  assert kinds == ["resp", "help", "spec", "severity", "severity", "severity"]
  assert example.pairs[0].margin == 0.5
  assert sum(p.weight for p in example.pairs[3:]) == pytest.approx(1.0)
  for pair in example.pairs[3:]:  # the milder rung wins
    assert pair.win > pair.lose
  assert made.counts == {
    "rows_label": 1, "rows_pair": 2, "rows_spec_pair": 1, "rows_ladder": 1,
    "cut_messages": 0, "cut_shortened": 0, "cut_rules": 0,
  }  # fmt: skip


def test_prepared_folder_and_its_manifest(config, tmp_path):
  tokenizer = tiny.tokenizer()
  folder = prepare.ensure(config, tmp_path / "run", tokenizer)
  meta = prepare.read_meta(folder)
  counts = meta["counts"]
  assert counts["families_train"] + counts["families_heldout"] == 8
  assert 0 < counts["families_heldout"] < 8
  held = [json.loads(t) for t in (folder / "heldout.jsonl").open()]
  assert len({r["family"] for r in held}) == counts["families_heldout"]
  assert len(held) == 5 * counts["families_heldout"]
  rows = loader.open_rows(folder, seed=0)
  batch = loader.batch_at(rows, 0, batch_rows=meta["rows"])
  train = counts["families_train"]
  found = {
    kind: int((batch.pair_weight[batch.pair_kind == i] > 0).sum())
    for i, kind in enumerate(PAIR_KINDS)
  }
  assert found == {
    "resp": train, "help": train, "spec": train, "severity": 3 * train,
  }  # fmt: skip


@pytest.mark.slow
def test_augmented_rows_are_described_in_the_manifest(config, tmp_path):
  config.data.update(source="synthetic_augmented", path=None, examples=60)
  config.data.update(row_length=4096, slots=256, pairs=512)
  meta = prepare.prepare(config, tmp_path / "run", tiny.tokenizer())
  found = meta["augmentation"]
  counts = meta["counts"]
  assert found["families"] == {
    "train": counts["families_train"], "heldout": counts["families_heldout"]
  }  # fmt: skip
  held = [json.loads(t) for t in (tmp_path / "run" / "heldout.jsonl").open()]
  assert len(held) + counts["rows_label"] + counts["rows_pair"] + counts[
    "rows_spec_pair"
  ] == sum(found["rows"].values())
  low, high = balance.BAND
  for name, (rows, share) in (
    (op, (v["rows"], v["violating"])) for op, v in found["operators"].items()
  ):
    both = name in OPERATORS and name not in ONE_SIDED
    if both and rows >= balance.LEAST:
      assert low <= share <= high, name


def test_heldout_is_a_matter_of_the_family_alone():
  shares = [
    np.mean(
      [prepare.is_heldout(str(i), seed=s, share=0.2) for i in range(2000)]
    )
    for s in range(3)
  ]
  assert all(0.16 < share < 0.24 for share in shares)
  assert not prepare.is_heldout("x", seed=0, share=0.0)


def test_same_inputs_same_bytes(config, tmp_path):
  tokenizer = tiny.tokenizer()
  metas = [prepare.prepare(config, tmp_path / name, tokenizer) for name in "ab"]
  assert metas[0] == metas[1]
  config.seed = 1
  other = prepare.prepare(config, tmp_path / "c", tokenizer)
  assert other["key"] != metas[0]["key"]


def test_stale_rows_are_rewritten_only_in_the_workdir(config, tmp_path):
  tokenizer = tiny.tokenizer()
  folder = prepare.ensure(config, tmp_path / "run", tokenizer)
  before = prepare.read_meta(folder)["key"]
  named = tmp_path / "named"
  prepare.prepare(config, named, tokenizer)
  config.data.row_length = 640
  prepare.ensure(config, tmp_path / "run", tokenizer)
  assert prepare.read_meta(folder)["key"] != before
  config.data.prepared = str(named)
  with pytest.raises(ValueError, match=rf"stale: made from {before}"):
    prepare.ensure(config, tmp_path / "run", tokenizer)
  assert prepare.read_meta(named)["key"] == before


def test_response_too_long_is_an_error_or_put_aside(config, tmp_path):
  with open(config.data.path, "a") as out:
    row = {
      "id": "long", "messages": said("word " * 2000), "label": 1,
      "spec": "Disallowed: swearing.", "family": "f1",
    }  # fmt: skip
    out.write(json.dumps(row) + "\n")
  config.data.heldout = 0.0
  with pytest.raises(ValueError, match="row 'long'"):
    prepare.prepare(config, tmp_path / "a", tiny.tokenizer())
  config.data.on_bad_row = "quarantine"
  meta = prepare.prepare(config, tmp_path / "b", tiny.tokenizer())
  assert meta["counts"]["quarantined"] == 1
  (line,) = (tmp_path / "b" / "quarantine.jsonl").read_text().splitlines()
  assert json.loads(line)["row"]["id"] == "long"


def test_bad_rows_are_put_aside_in_order_and_counted_once(config, tmp_path):
  path = pathlib.Path(config.data.path)
  lines = path.read_text().splitlines()
  long = {
    "id": "long", "messages": said("word " * 2000), "label": 1,
    "spec": "Disallowed: swearing.", "family": "f1",
  }  # fmt: skip
  half = {"id": "half", "messages": said("\ud83d"), "label": 1, "spec": "S"}
  lines[3:3] = [json.dumps(long), "no json", json.dumps(half)]
  path.write_text("\n".join(lines))
  config.data.heldout = 0.0
  with pytest.raises(ValueError, match="row 'long'"):  # the first of the three
    prepare.prepare(config, tmp_path / "a", tiny.tokenizer())
  config.data.on_bad_row = "quarantine"
  meta = prepare.prepare(config, tmp_path / "b", tiny.tokenizer())
  assert meta["counts"]["quarantined"] == 3
  found = (tmp_path / "b" / "quarantine.jsonl").read_text().splitlines()
  rows = [json.loads(line)["row"] for line in found]
  assert rows == [long | {"source": "jsonl"}, "no json", half]


def test_unknown_or_missing_runner_is_refused(config, tmp_path, monkeypatch):
  config.data.runner = "spark"
  with pytest.raises(ValueError, match=r"runner=spark: must be local or beam"):
    prepare.prepare(config, tmp_path / "a", tiny.tokenizer())
  config.data.runner = "beam"
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[beam\]'"):
    prepare.prepare(config, tmp_path / "a", tiny.tokenizer())


def test_who_prepares_is_no_part_of_the_key(config):
  tokenizer = tiny.tokenizer()
  key = prepare.preparation_key(config, tokenizer)
  config.data.update(workers=7, runner="beam", beam_options="--runner=Spark")
  assert prepare.preparation_key(config, tokenizer) == key
  config.data.heldout = 0.2
  assert prepare.preparation_key(config, tokenizer) != key


def _stored(folder, meta):
  """Token bytes of each record, in the order of the file."""
  dtype = prepare.row_dtype(**meta["shape"])
  source = grain.sources.ArrayRecordDataSource(
    str(folder / "train.array_record")
  )
  return [np.frombuffer(r, dtype)[0]["tokens"].tobytes() for r in source]


@pytest.mark.parametrize("text", ["jsonl", ":3", "jsonl:0", "jsonl:x", "a:1;b"])
def test_a_stage_without_sources_or_number_is_refused(config, tmp_path, text):
  config.data.stages = text
  with pytest.raises(ValueError, match="is no stage"):
    prepare.prepare(config, tmp_path / "a", tiny.tokenizer())


def test_stages_that_take_every_family_leave_the_last_to_repeat(
  config, tmp_path
):
  config.data.heldout = 0.0
  config.data.stages = "jsonl:3;jsonl:1000"
  folder = prepare.ensure(config, tmp_path / "run", tiny.tokenizer())
  meta = prepare.read_meta(folder)
  assert meta["stage_families"][2] == 0 and len(meta["stage_rows"]) == 1
  rows = loader.open_rows(folder, seed=0)
  assert rows(3 * meta["rows"]).tokens.size


def test_loader_plays_the_stages_first_then_epochs(config, tmp_path):
  tokenizer = tiny.tokenizer()
  config.data.heldout = 0.0
  config.data.row_length = 384
  config.data.stages = "jsonl:3; jsonl,other:2"
  folder = prepare.ensure(config, tmp_path / "run", tokenizer)
  meta = prepare.read_meta(folder)
  assert meta["stage_families"][:2] == [3, 2] and meta["stage_families"][2]
  first, number = sum(meta["stage_rows"]), meta["rows"]
  assert 0 < meta["stage_rows"][0] < first < number
  rows = loader.open_rows(folder, seed=3)

  def keys(start, stop):
    return [rows(i).tokens.tobytes() for i in range(start, stop)]

  one, two = meta["stage_rows"]
  stored = _stored(folder, meta)
  assert sorted(keys(0, one)) == sorted(stored[:one])
  assert sorted(keys(one, one + two)) == sorted(stored[one:first])
  rest = number - first
  epochs = [keys(first + e * rest, first + (e + 1) * rest) for e in range(3)]
  assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
  again = loader.open_rows(folder, seed=3)
  assert keys(0, 9) == [again(i).tokens.tobytes() for i in range(9)]


def test_row_of_a_run_and_its_record(config, tmp_path):
  config.data.update(heldout=0.0, row_length=384, stages="jsonl:3")
  folder = prepare.ensure(config, tmp_path / "run", tiny.tokenizer())
  meta = prepare.read_meta(folder)
  stored = _stored(folder, meta)
  rows = loader.open_rows(folder, seed=3)
  numbers = loader.record_numbers(folder, seed=3)
  found = [numbers(i) for i in range(3 * meta["rows"])]
  assert sorted(found[: meta["rows"]]) == list(range(meta["rows"]))
  assert found != 3 * list(range(meta["rows"]))  # three passes, shuffled
  for i, record in enumerate(found):
    assert rows(i).tokens.tobytes() == stored[record]


def test_cut_record_file_is_refused(config, tmp_path):
  folder = prepare.ensure(config, tmp_path / "run", tiny.tokenizer())
  meta = prepare.read_meta(folder)
  meta["rows"] += 1
  (folder / "meta.json").write_text(json.dumps(meta))
  with pytest.raises(ValueError, match=r"meta\.json says"):
    loader.open_rows(folder, seed=0)
