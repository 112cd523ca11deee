"""Suites: rows of every kind flattened, read by name, held apart by family."""

import json

import pytest

from csrm_jax.data import contract
from csrm_jax.data.prepare import is_heldout
from csrm_jax.eval import recipes, suites

PROMPT = [{"role": "user", "content": "May I?"}]


def answer(text: str) -> list[dict[str, str]]:
  return [*PROMPT, {"role": "assistant", "content": text}]


def label(name: str, value: float, **more) -> dict:
  row = {"id": name, "messages": answer("Yes."), "label": value, "spec": "A"}
  return row | more


ROWS = [
  label("base", 1.0, weight=2.0, family="f"),
  label("flip", 0.0, spec="B", base="base", edit="swap", family="f"),
  label("kept", 0.9, spec="C", base="base", edit="reword", family="f"),
  {
    "id": "pair",
    "prompt": PROMPT,
    "chosen": answer("No.")[1:],
    "rejected": answer("Yes!")[1:],
    "kind": "resp",
    "spec": "A",
    "weight": 0.5,
  },
  {
    "id": "helpful",
    "prompt": PROMPT,
    "chosen": answer("Of course.")[1:],
    "rejected": answer("Never.")[1:],
    "kind": "help",
  },
  {
    "id": "specs",
    "messages": answer("Maybe."),
    "chosen_spec": "D",
    "rejected_spec": "E",
  },
  {
    "id": "ladder",
    "ladder": [
      {"messages": answer(text), "spec": "A"} for text in ("Ugh.", "Hm.", "Ok.")
    ],
  },
]


def test_flatten_keeps_labels_pairs_and_bases():
  suite = suites.flatten("all", ROWS)

  ids = [row["id"] for row in suite.rows]
  assert ids[:3] == ["base", "flip", "kept"]
  by_ids = {
    (ids[p.win], ids[p.lose]): (p.kind, round(p.weight, 6)) for p in suite.pairs
  }
  assert by_ids == {
    ("pair#chosen", "pair#rejected"): ("resp", 0.5),
    ("helpful#chosen", "helpful#rejected"): ("help", 1.0),
    ("specs#chosen_spec", "specs#rejected_spec"): ("spec", 1.0),
    ("ladder#1", "ladder#0"): ("severity", 0.333333),
    ("ladder#2", "ladder#0"): ("severity", 0.333333),
    ("ladder#2", "ladder#1"): ("severity", 0.333333),
    ("base", "flip"): ("spec", 1.0),  # gold flips; "kept" does not
  }
  assert [r.get("base_row") for r in suite.rows[:3]] == [None, 0, 0]
  assert suite.rows[0]["weight"] == 2.0
  assert suite.rows[ids.index("pair#chosen")]["messages"] == answer("No.")
  assert "spec" not in suite.rows[ids.index("helpful#chosen")]
  assert len({r["family"] for r in suite.rows if r["id"][:4] == "pair"}) == 1


@pytest.mark.parametrize("base", ["nowhere", "flip", "pair"])
def test_a_wrong_base_is_named(base):
  rows = [label("flip", 0.0, base=base), ROWS[3]]
  with pytest.raises(ValueError, match=rf"'flip'.*'base'.*'{base}'"):
    suites.flatten("file.jsonl", rows)


def test_an_empty_suite_is_refused():
  with pytest.raises(ValueError, match=r"none\.jsonl: no rows"):
    suites.flatten("none.jsonl", [])


def write(path, rows) -> str:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_a_file_is_a_suite(tmp_path):
  name = write(tmp_path / "rows.jsonl", ROWS)
  suite = suites.read(name)
  assert (suite.name, suite.note) == (name, "")
  assert suite == suites.flatten(name, ROWS)


def test_a_bad_row_names_file_line_and_field(tmp_path):
  name = write(tmp_path / "rows.jsonl", [ROWS[0], label("b", 2.0)])
  with pytest.raises(ValueError, match=r"rows\.jsonl:2: field 'label'"):
    suites.read(name)


LONG = label("long", 0.0)
BAD = [
  (LONG, "field 'messages': too long"),
  (label("orphan", 1.0, base="long"), "field 'base': 'long' names no other"),
  (label("child", 1.0, base="orphan"), "field 'base': 'orphan' names no"),
  ("{broken", "not JSON"),
  (label("self", 0.0, base="self"), "field 'base': 'self' names no other"),
]


def fits(row):
  if row["id"] == "long":
    raise ValueError("too long")


@pytest.mark.parametrize(("bad", "problem"), BAD)
def test_the_first_bad_row_stops(bad, problem, tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [ROWS[0], bad, ROWS[1]]
  text = (r if isinstance(r, str) else json.dumps(r) for r in rows)
  path.write_text("\n\n".join(text))
  with pytest.raises(ValueError, match=rf"rows\.jsonl:3: {problem}"):
    suites.read(str(path), fits=fits)


def test_bad_rows_are_put_aside_and_those_that_rest_on_them(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows = [*reversed(BAD), *((row, "") for row in ROWS)]
  text = (r if isinstance(r, str) else json.dumps(r) for r, _ in rows)
  path.write_text("\n".join(text))
  aside = []

  suite = suites.read(str(path), fits=fits, aside=aside)

  assert suite == suites.flatten(str(path), ROWS)
  assert [entry["line"] for entry in aside] == [1, 2, 3, 4, 5]
  for entry, (row, problem) in zip(aside, rows, strict=False):
    assert entry["row"] == row
    assert entry["reason"].startswith(f"{path}:{entry['line']}: {problem}")


def test_a_file_of_bad_rows_alone_is_no_suite(tmp_path):
  name = write(tmp_path / "rows.jsonl", [LONG, label("b", 2.0)])
  with pytest.raises(ValueError, match=r"all 2 rows are bad; .*jsonl:1: .*too"):
    suites.read(name, fits=fits, aside=[])


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("synthetic_old", "neither a file nor a suite.*synthetic_unseen"),
    ("heldout", "no heldout.jsonl.*--data=DIR"),
    ("beavertails", "--data is missing"),
  ],
)
def test_what_cannot_be_read_says_why(name, message):
  with pytest.raises(ValueError, match=message):
    suites.read(name)


@pytest.mark.parametrize("name", suites.SYNTHETIC)
def test_synthetic_suites_have_flips_and_kept_edits(name):
  suite = suites.read(name, rows=60)
  assert 50 <= len(suite.rows) <= 60
  edited = [row for row in suite.rows if "base_row" in row]
  flips = [
    r for r in edited if r["label"] != suite.rows[r["base_row"]]["label"]
  ]
  assert 0 < len(flips) < len(edited)
  assert len(suite.pairs) == len(flips)
  for row in edited:
    assert row["messages"] == suite.rows[row["base_row"]]["messages"]
  assert suite != suites.read(name, rows=60, seed=1)


def test_rows_are_cut_by_whole_families():
  rows = [{"family": f"{n // 3 % 50}", "n": n} for n in range(300)]
  assert suites.some_families(rows, 0) == rows
  kept = suites.some_families(rows, 60)
  assert len(kept) == 60  # families of six
  names = {row["family"] for row in kept}
  assert kept == [row for row in rows if row["family"] in names]
  # Not the first ones: a file may hold one set after the other.
  assert max(int(name) for name in names) > 20
  assert suites.some_families(kept + rows[:1], 1000) == kept + rows[:1]


def workdir(folder, **data):
  """A folder that claims to be trained with this data section."""
  folder.mkdir(exist_ok=True)
  (folder / "model.json").write_text("{}")
  config = {"seed": 3, "data": data, "gone": {"key": 1}}
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def test_heldout_is_found_from_workdir_checkpoint_and_folder(tmp_path):
  folder = workdir(tmp_path / "run")
  (folder / "data").mkdir()
  write(folder / "data" / "heldout.jsonl", ROWS[:3])
  expected = suites.flatten("heldout", ROWS[:3])
  assert suites.read("heldout", model=folder) == expected
  checkpoint = folder / "checkpoints" / "60"
  assert suites.read("heldout", model=checkpoint) == expected
  assert suites.read("heldout", data=folder / "data") == expected
  # A folder of real sets holds none: then the workdir's own rows count.
  assert suites.read("heldout", data=tmp_path, model=folder) == expected


def test_training_rows_are_the_recipe_s_without_the_held_out(tmp_path):
  path = write(
    tmp_path / "rows.jsonl",
    [label(f"r{i}", float(i % 2), family=f"family {i}") for i in range(40)],
  )
  folder = workdir(
    tmp_path / "run", source="jsonl", path=path, heldout=0.5, prepared=None
  )
  kept = {row["id"] for row in recipes.training_rows(folder)}
  out = {
    row["id"]
    for row in contract.read_rows(path)
    if is_heldout(row["family"], seed=3, share=0.5)
  }
  assert kept and out
  assert kept | out == {f"r{i}" for i in range(40)} and not kept & out


def test_training_rows_of_a_foreign_model_are_synthetic(tmp_path):
  row = next(recipes.training_rows(tmp_path))
  assert row["source"].startswith("synthetic")


def test_spec_text_renders_objects():
  spec = {"rules": [{"id": "r", "guideline": "spoilers", "polarity": "forbid"}]}
  assert "Disallowed: spoilers" in suites.spec_text({"id": "a", "spec": spec})
  assert suites.spec_text({"id": "a", "spec": "as is"}) == "as is"
  assert suites.spec_text({"id": "a"}) is None
