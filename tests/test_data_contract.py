"""The data contract: rows that pass, every sort of bad row."""

import copy
import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csrm_jax.data.contract import KINDS, check_row, kind_of, read_rows

ASK = {"role": "user", "content": "How do I win?"}
ANSWER = {"role": "assistant", "content": "Practise."}
OTHER = {"role": "assistant", "content": "Cheat."}
RULES = {"rules": [{"id": "a", "polarity": "forbid", "guideline": "cheating"}]}

LABEL = {
  "id": "l",
  "messages": [ASK, ANSWER],
  "label": 1,
  "spec": "No cheating.",
}
PAIR = {
  "id": "p",
  "prompt": [ASK],
  "chosen": [ANSWER],
  "rejected": [OTHER],
  "kind": "resp",
  "spec": RULES,
}
SPEC_PAIR = {
  "id": "s",
  "messages": [ASK, OTHER],
  "chosen_spec": "Cheating is allowed.",
  "rejected_spec": RULES,
}
LADDER = {
  "id": "r",
  "ladder": [
    {"messages": [ASK, OTHER], "spec": "No cheating."},
    {"messages": [ASK, ANSWER], "spec": "No cheating."},
  ],
}
ROWS = [LABEL, PAIR, SPEC_PAIR, LADDER]


def write(path, rows):
  text = "".join(
    (r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows
  )
  if path.suffix == ".gz":
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text, encoding="utf-8")
  return path


# -- Good rows ------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_all_kinds_come_back_unchanged(tmp_path, name):
  path = write(tmp_path / name, ROWS)
  counts = {}
  assert list(read_rows(path, counts=counts)) == ROWS
  assert counts == {"quarantined": 0, "rows_read": 4}
  assert tuple(map(kind_of, ROWS)) == KINDS


@pytest.mark.parametrize(
  "extra",
  [
    {"label": 0.25},
    {"weight": 0},
    {"severity": 3, "source": "x", "family": "f", "base": "b", "edit": "e"},
    {"messages": [{"role": "system", "content": "s"}, ASK, ANSWER]},
    {"messages": [ASK, {"role": "tool", "content": "t"}, ANSWER]},
    {"messages": [ANSWER]},
  ],
)
def test_optional_parts(extra):
  row = LABEL | extra
  assert check_row(row, origin="here") == row


def test_help_pairs_need_no_spec():
  row = {k: v for k, v in PAIR.items() if k != "spec"} | {"kind": "help"}
  assert check_row(row, origin="here") == row


def test_rows_to_score_need_neither_label_nor_spec():
  row = {"id": "a", "messages": [ASK, ANSWER]}
  checked = check_row(row, origin="here", need_label=False, need_spec=False)
  assert checked == row


def test_spec_file_is_relative_to_the_rows(tmp_path):
  (tmp_path / "specs").mkdir()
  (tmp_path / "specs" / "a.yaml").write_text(json.dumps(RULES))
  (tmp_path / "specs" / "b.txt").write_text("Be kind.\n")
  label = {k: v for k, v in LABEL.items() if k != "spec"}
  ladder = copy.deepcopy(LADDER)
  del ladder["ladder"][1]["spec"]
  ladder["ladder"][1]["spec_file"] = "specs/b.txt"
  path = write(
    tmp_path / "rows.jsonl", [label | {"spec_file": "specs/a.yaml"}, ladder]
  )
  one, two = read_rows(path)
  assert one == label | {"spec": "S1: Disallowed: cheating."}
  assert two["ladder"][1] == {
    "messages": [ASK, ANSWER],
    "spec": "Be kind.",
  }


def test_a_string_is_never_a_path(tmp_path):
  (tmp_path / "a.yaml").write_text(json.dumps(RULES))
  path = write(tmp_path / "rows.jsonl", [LABEL | {"spec": "a.yaml"}])
  assert next(read_rows(path))["spec"] == "a.yaml"


def test_blank_lines_and_byte_order_mark(tmp_path):
  path = tmp_path / "rows.jsonl"
  line = json.dumps(LABEL).encode()
  path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n   \n")
  assert list(read_rows(path)) == [LABEL]


# -- Bad rows -------------------------------------------------------------


def without(row, key):
  return {k: v for k, v in row.items() if k != key}


BAD = {
  "not_json": ("{", r"not JSON: .* at column 2; write one object a line"),
  "no_object": ("[1]", r"\[1\] is no row; write an object"),
  "twice": ('{"id": "a", "id": "b"}', "field 'id': given twice; keep one"),
  "deep": ("[" * 100_000, "nested too deeply|not JSON"),
  "no_id": (without(LABEL, "id"), "field 'id': missing; add it"),
  "number_id": (LABEL | {"id": 3}, "field 'id': 3: must be text: put it in"),
  "typo": (LABEL | {"lable": 1}, "field 'lable': unknown key; did you mean"),
  "unknown": (LABEL | {"xyz": 1}, "field 'xyz': unknown key; remove it"),
  "wrong_kind_key": (PAIR | {"label": 1}, "field 'label': unknown key"),
  "no_label": (without(LABEL, "label"), "field 'label': missing; add it"),
  "label_high": (LABEL | {"label": 1.5}, "field 'label': 1.5: must be a numb"),
  "label_low": (LABEL | {"label": -0.1}, "field 'label': -0.1: must be"),
  "label_text": (LABEL | {"label": "1"}, "field 'label': '1': must be"),
  "label_bool": (LABEL | {"label": True}, "field 'label': True: must be"),
  "label_nan": (
    json.dumps(LABEL | {"label": float("nan")}),
    "field 'label': nan: must be a number from 0",
  ),
  "weight": (LABEL | {"weight": -1}, "field 'weight': -1: must be a finite"),
  "margin": (
    PAIR | {"margin": "big"},
    "field 'margin': 'big': must be a finite number",
  ),
  "infinite": (
    json.dumps(PAIR | {"margin": float("inf")}),
    "field 'margin': inf: must be a finite number",
  ),
  "family": (LABEL | {"family": ""}, "field 'family': empty; write some"),
  "no_messages": (without(LABEL, "messages"), "field 'messages': missing"),
  "empty_messages": (LABEL | {"messages": []}, r"field 'messages': \[\]: must"),
  "text_message": (
    LABEL | {"messages": ["hi"]},
    r"field 'messages\[0\]': 'hi': must be an object",
  ),
  "role": (
    LABEL | {"messages": [{"role": "agent", "content": "x"}]},
    r"field 'messages\[0\].role': 'agent': must be one of system, user",
  ),
  "no_role": (
    LABEL | {"messages": [{"content": "x"}]},
    r"field 'messages\[0\].role': missing; add it",
  ),
  "message_key": (
    LABEL | {"messages": [ASK | {"name": "Jo"}, ANSWER]},
    r"field 'messages\[0\].name': unknown key; remove it",
  ),
  "content": (
    LABEL | {"messages": [ASK, ANSWER | {"content": None}]},
    r"field 'messages\[1\].content': None: must be text",
  ),
  "empty_content": (
    LABEL | {"messages": [ASK, ANSWER | {"content": " "}]},
    r"field 'messages\[1\].content': empty; write some text",
  ),
  "surrogate": (
    LABEL | {"messages": [ASK, ANSWER | {"content": "\ud800"}]},
    r"field 'messages\[1\].content': holds half of a surrogate pair",
  ),
  "last_role": (
    LABEL | {"messages": [ASK]},
    r"field 'messages\[0\].role': 'user': the last message is the one judged",
  ),
  "no_spec": (without(LABEL, "spec"), "field 'spec': missing; add 'spec'"),
  "two_specs": (
    LABEL | {"spec_file": "a.yaml"},
    "field 'spec_file': beside 'spec'; keep one of the two",
  ),
  "empty_spec": (LABEL | {"spec": ""}, "field 'spec': empty; write some text"),
  "list_spec": (
    LABEL | {"spec": []},
    r"field 'spec': \[\]: must be text or an",
  ),
  "bad_spec": (
    LABEL | {"spec": {"rules": [{"id": "a", "polarity": "no", "title": "t"}]}},
    r"field 'spec': rule 1 \('a'\): field 'polarity': 'no': must be",
  ),
  "no_spec_file": (
    without(LABEL, "spec") | {"spec_file": "none.yaml"},
    r"field 'spec_file': .*none\.yaml: No such file",
  ),
  "kind": (PAIR | {"kind": "best"}, "field 'kind': 'best': must be 'resp' or"),
  "no_kind": (without(PAIR, "kind"), "field 'kind': missing; add it"),
  "resp_without_spec": (without(PAIR, "spec"), "field 'spec': missing"),
  "same_sides": (
    PAIR | {"rejected": [ANSWER]},
    "field 'rejected': equal to chosen; give two responses",
  ),
  "chosen_text": (PAIR | {"chosen": "yes"}, "field 'chosen': 'yes': must be"),
  "chosen_user": (
    PAIR | {"chosen": [ASK]},
    r"field 'chosen\[0\].role': 'user': the last message",
  ),
  "no_rejected": (without(PAIR, "rejected"), "field 'rejected': missing"),
  "no_rejected_spec": (
    without(SPEC_PAIR, "rejected_spec"),
    "field 'rejected_spec': missing; add it",
  ),
  "same_specs": (
    SPEC_PAIR | {"chosen_spec": RULES},
    "field 'rejected_spec': equal to chosen_spec; give two specs",
  ),
  "one_rung": (
    LADDER | {"ladder": LADDER["ladder"][:1]},
    "field 'ladder': .*: must be a list of at least two rungs",
  ),
  "rung_spec": (
    LADDER | {"ladder": [LADDER["ladder"][0], {"messages": [ASK, ANSWER]}]},
    r"field 'ladder\[1\].spec': missing; add 'spec'",
  ),
  "rung_key": (
    LADDER | {"ladder": [r | {"label": 1} for r in LADDER["ladder"]]},
    r"field 'ladder\[0\].label': unknown key",
  ),
  "rung_messages": (
    LADDER | {"ladder": [{"spec": "x"}, {"spec": "y"}]},
    r"field 'ladder\[0\].messages': missing; add it",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_stops_with_file_line_field_remedy(tmp_path, name):
  row, message = BAD[name]
  good = LABEL | {"id": "before"}
  path = write(tmp_path / "rows.jsonl", [good, "", row])
  rows = read_rows(path)
  assert next(rows) == good
  with pytest.raises(ValueError, match=message) as caught:
    next(rows)
  assert str(caught.value).startswith(f"{path}:3: ")
  assert "\n" not in str(caught.value)


def test_quarantine_keeps_the_rest(tmp_path):
  bad = [row for row, _ in BAD.values()]
  path = write(tmp_path / "rows.jsonl", [LABEL, *bad, PAIR])
  aside, counts = [], {}
  rows = read_rows(
    path, on_bad_row="quarantine", quarantine=aside, counts=counts
  )
  assert list(rows) == [LABEL, PAIR]
  assert counts == {"quarantined": len(bad), "rows_read": len(bad) + 2}
  assert [a["line"] for a in aside] == list(range(2, len(bad) + 2))
  for entry, (_, message) in zip(aside, BAD.values(), strict=True):
    assert re.search(message, entry["reason"])


def test_quarantine_to_a_file(tmp_path):
  path = write(tmp_path / "rows.jsonl", ["oops", LABEL, LABEL])
  aside = tmp_path / "aside.jsonl"
  aside.write_text("an earlier run\n")
  rows = list(read_rows(path, on_bad_row="quarantine", quarantine=aside))
  assert rows == [LABEL]
  entries = [json.loads(line) for line in aside.read_text().splitlines()]
  assert [e["line"] for e in entries] == [1, 3]
  assert entries[0]["row"].strip() == "oops"
  assert entries[1]["row"] == LABEL


def test_quarantine_needs_a_place(tmp_path):
  path = write(tmp_path / "rows.jsonl", [LABEL])
  with pytest.raises(ValueError, match="without a place for the rows"):
    list(read_rows(path, on_bad_row="quarantine"))
  with pytest.raises(ValueError, match="must be 'stop' or 'quarantine'"):
    list(read_rows(path, on_bad_row="skip"))


def test_duplicate_ids_name_both_lines(tmp_path):
  path = write(tmp_path / "rows.jsonl", [LABEL, PAIR, LABEL])
  with pytest.raises(ValueError, match="'l' stands in line 1 already") as e:
    list(read_rows(path))
  assert f"{path}:3: field 'id'" in str(e.value)


def test_unwelcome_kinds(tmp_path):
  path = write(tmp_path / "rows.jsonl", [PAIR])
  with pytest.raises(ValueError, match="a pair row where only label rows"):
    list(read_rows(path, kinds=("label",)))


def test_broken_files(tmp_path):
  with pytest.raises(ValueError, match=r"missing\.jsonl: No such file"):
    list(read_rows(tmp_path / "missing.jsonl"))
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(b"no gzip")
  with pytest.raises(ValueError, match="broken gzip file"):
    list(read_rows(path))
  path.write_bytes(gzip.compress(json.dumps(LABEL).encode() * 99)[:-20])
  with pytest.raises(ValueError, match="broken gzip file"):
    list(read_rows(path))
  path = tmp_path / "latin.jsonl"
  path.write_bytes(b'{"id": "caf\xe9"}')
  with pytest.raises(ValueError, match="1: byte 11 is not UTF-8; save the"):
    list(read_rows(path))


json_values = st.recursive(
  st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


@given(st.sampled_from(ROWS), st.data())
def test_any_change_passes_or_is_named(row, data):
  """A field of any other value is accepted, or refused by ValueError alone."""
  key = data.draw(st.sampled_from(sorted(row)))
  changed = row | {key: data.draw(json_values)}
  try:
    checked = check_row(changed, origin="file:1")
  except ValueError as error:
    assert str(error).startswith("file:1: ")
  else:
    assert set(checked) == set(changed)
