"""Specs permuted across families; edits of augmented sources chosen by name."""

import collections
import json

import pytest

from csrm_jax.config import default
from csrm_jax.data import balance, contract, prepare, sources
from csrm_jax.data.operators import OPERATORS, parse
from csrm_jax.data.shuffle import shuffle_specs
from tests import tiny

SPECS = ("spec", "chosen_spec", "rejected_spec")


def holders(row):
  return (row, *row.get("ladder", ()))


def specs_of(row):
  """Every spec of a row, in order, as text."""
  return [
    json.dumps(holder[at], sort_keys=True)
    for holder in holders(row)
    for at in SPECS
    if at in holder
  ]


def without_specs(row):
  bare = {k: v for k, v in row.items() if k not in SPECS}
  if "ladder" in row:
    bare["ladder"] = [rung["messages"] for rung in row["ladder"]]
  return bare


@pytest.fixture(scope="module")
def rows():
  names = "synthetic,synthetic_augmented"
  return list(sources.load(names, path=None, seed=0, limit=60))


@pytest.fixture(scope="module")
def shuffled(rows):
  counts: dict[str, int] = {}
  return shuffle_specs(rows, seed=0, counts=counts), counts


def slots(rows):
  return {(r["family"], s) for r in rows for s in specs_of(r)}


def test_only_specs_change_and_every_kind_of_row_is_met(rows, shuffled):
  made, _ = shuffled
  assert [without_specs(r) for r in made] == [without_specs(r) for r in rows]
  kinds = {contract.kind_of(r) for r in rows}
  assert kinds == {"label", "pair", "spec_pair", "ladder"}
  labels = [r["label"] for r in rows if "label" in r]
  assert 0.35 < sum(labels) / len(labels) < 0.65  # so there is a balance
  for row in made:
    assert contract.check_row(row, origin="shuffled") == row


def test_specs_are_a_permutation_foreign_to_the_family(rows, shuffled):
  made, counts = shuffled
  before, after = slots(rows), slots(made)
  assert len(before) == len(after)  # different specs stay different
  assert collections.Counter(s for _, s in before) == collections.Counter(
    s for _, s in after
  )
  own = collections.defaultdict(set)
  for family, spec in before:
    own[family].add(spec)
  home = [slot for slot in after if slot[1] in own[slot[0]]]
  assert len(home) == counts["unshuffled_specs"] == 0
  assert counts["shuffled_specs"] == len(after)


def test_rows_that_share_a_spec_share_the_wrong_one(rows, shuffled):
  made, _ = shuffled
  became = collections.defaultdict(set)
  for old, new in zip(rows, made, strict=True):
    for a, b in zip(specs_of(old), specs_of(new), strict=True):
      became[old["family"], a].add(b)
  assert {len(found) for found in became.values()} == {1}


def test_label_and_spec_are_decoupled():
  """A spec that tells the label by itself tells nothing once shuffled."""
  rows = [
    {
      "id": f"{i}/{label}", "family": f"f{i}", "label": label,
      "messages": [{"role": "assistant", "content": f"text {i}"}],
      "spec": f"{'forbid' if label == 0 else 'allow'} {i}",
    }
    for i in range(400)
    for label in (0, 1)
  ]  # fmt: skip
  made = shuffle_specs(rows, seed=3, counts={})
  agree = sum(r["spec"].startswith("allow") == r["label"] for r in made)
  assert abs(agree / len(made) - 0.5) < 4 * 0.5 / len(made) ** 0.5
  assert made == shuffle_specs(rows, seed=3, counts={})
  assert made != shuffle_specs(rows, seed=4, counts={})


def test_what_cannot_be_exchanged_is_counted_or_refused():
  row = {"id": "a", "messages": [{"role": "assistant", "content": "x"}]}
  rows = [
    row | {"id": str(i), "family": str(i), "label": 1, "spec": spec}
    for i, spec in enumerate(["A"] * 9 + ["B"])
  ]
  counts: dict[str, int] = {}
  made = shuffle_specs(rows, seed=0, counts=counts)
  assert counts == {"shuffled_specs": 2, "unshuffled_specs": 8}
  assert sorted(r["spec"] for r in made) == sorted(r["spec"] for r in rows)
  with pytest.raises(ValueError, match="share a single spec"):
    shuffle_specs(rows[:9], seed=0, counts={})


def prepared(folder, **data):
  config = default()
  config.data.update(source="synthetic_augmented", examples=60)
  config.data.update(row_length=4096, slots=256, pairs=512)
  config.data.update(**data)
  meta = prepare.prepare(config, folder, tiny.tokenizer())
  return meta, (folder / "heldout.jsonl").read_text()


@pytest.mark.slow
def test_preparation_shuffles_training_rows_alone(tmp_path):
  plain, held = prepared(tmp_path / "a")
  blind, still = prepared(tmp_path / "b", shuffle_specs=True)
  assert held == still and held
  assert plain["key"] != blind["key"]
  assert plain["label_balance"] == blind["label_balance"]
  assert "shuffled_specs" not in plain["counts"]
  assert blind["counts"]["shuffled_specs"] > 0
  assert not plain["shuffle_specs"] and blind["shuffle_specs"]


@pytest.mark.slow
def test_operators_restrict_the_augmented_sources(tmp_path):
  def edits(operators):
    rows = sources.load(
      "synthetic_augmented", path=None, seed=0, limit=60, operators=operators
    )
    return [r for r in rows if "label" in r or "chosen_spec" in r]

  ops = {op for r in edits("") if "label" in r for op in balance.chain(r)}
  assert len(ops) > 10
  bare = edits("none")
  assert bare and all(r["edit"] == "base" for r in bare)
  steps = edits("ladder")
  found = {r["edit"] for r in steps if "label" in r}
  assert found == {"base", "ladder"}
  assert any("chosen_spec" in r for r in steps)
  rest = {
    op for r in edits("-ladder") if "label" in r for op in balance.chain(r)
  }
  assert rest == ops - {"ladder"}
  meta, _ = prepared(tmp_path / "a", operators="none")
  assert set(meta["augmentation"]["operators"]) == {"base"}
  assert meta["operators"] == "none"


def test_operators_by_name():
  assert parse("") == tuple(OPERATORS)
  assert parse("none") == ()
  assert set(parse("allow, ladder")) == {"allow", "ladder"}
  assert set(parse("-allow,-ladder")) == set(OPERATORS) - {"allow", "ladder"}
  with pytest.raises(ValueError, match="operators=alow: 'alow' is no"):
    parse("alow")
  with pytest.raises(ValueError, match="use one way or the other"):
    parse("-allow,ladder")
  with pytest.raises(ValueError, match="'x' is no operator"):
    list(sources.load("synthetic", path=None, seed=0, operators="x"))
