"""The labelled sets: on small files of our own, and on the staged ones."""

import collections
import gzip
import json
import pathlib

import numpy as np
import pytest
import yaml

from csrm_jax.data import sources
from csrm_jax.data.contract import check_row, kind_of
from csrm_jax.data.sets import (
  SETS,
  answering,
  code_of,
  diasafety,
  hh_harmless,
  openai_moderation,
  pyrit_scored,
  rbr_gold,
  shapes,
  teen_safety_policies,
)

STAGED = [name for name in SETS if not name.startswith("hf_")]
OLD = ("beavertails", "pku_pairs", "polyguard")  # see test_data_real.py
NEW = [name for name in STAGED if name not in OLD]


def _put(folder, file, content):
  path = folder / file
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, list):
    content = "".join(json.dumps(row) + "\n" for row in content)
  data = content.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def _dialogue(*texts):
  return "".join(
    f"\n\n{who}: {text}"
    for who, text in zip(("Human", "Assistant") * 2, texts, strict=False)
  )


@pytest.fixture
def small(tmp_path):
  """The layout of every staged set, with harmless rows that we wrote."""
  said = [(f"Question {i // 2}?", f"Answer {i}.") for i in range(40)]

  def write(name, rows, file=0):
    _put(tmp_path, SETS[name].files[file], rows)

  labelled = [
    {"id": f"s{i}", "prompt": p, "response": r, "label": word}
    for i, (p, r) in enumerate(said)
    for word in [("safe", "unsafe")[i % 2]]
  ]
  again = labelled[0] | {"id": "s90"}
  torn = [labelled[4] | {"id": "s91", "label": "unsafe"}]
  empty = [labelled[0] | {"id": "s92", "response": " "}]
  write("saferlhf_responses", [*labelled, again, *torn, *empty])
  policies = teen_safety_policies.POLICIES
  write(
    "teen_safety_policies",
    [
      {
        "id": f"t{i}",
        "policy": policies[i % 6],
        "prompt": p,
        "response": r,
        "response_label": f"X{i % 3}",
      }
      for i, (p, r) in enumerate(said)
    ],
  )
  for i, policy in enumerate(policies, 1):
    text = f"# {policy}\n\nBe fair.\n\nOutput: `VALID`\n\n## Label Format\nX1"
    write("teen_safety_policies", text, i)
  kinds = list(diasafety.HARMS)
  rows = [
    row | {"id": f"d{i}", "category": kinds[i // 2 % 5]}
    for i, row in enumerate(labelled)
  ]
  for part in range(3):
    write("diasafety", rows[part::3], part)
  words = [("harmful", "unharmful")] * 2 + [("refusal", "compliance")]
  for part, pair in enumerate(words):
    rows = [
      row | {"id": f"g{part}-{i}", "label": pair[i % 2]}
      for i, row in enumerate(labelled[part::2])
    ]
    write("guard_response_labels", rows, part)
  votes = [
    ("1_full_compliance", "1_full_compliance", "1_full_compliance"),
    ("2_full_refusal", "2_full_refusal", "2_full_refusal"),
    ("3_partial_refusal", "3_partial_refusal", "3_partial_refusal"),
    ("1_full_compliance", "3_partial_refusal", "1_full_compliance"),
  ]
  write(
    "xstest_completions",
    [
      {
        "id": f"x{i}",
        "prompt": p,
        "completion": r,
        "prompt_label": ("safe", "unsafe")[i // 2 % 2],
        "annotation_1": votes[i % 4][0],
        "annotation_2": votes[i % 4][1],
        "final_label": votes[i % 4][2],
      }
      for i, (p, r) in enumerate(said)
    ],
  )
  scores = [[0.0], [0.25], [0.5, 0.5, 0.75], [0.75], [1.0]]
  for part, task in enumerate(
    ("harm_severity", "objective_achieved", "refusal")
  ):
    write(
      "pyrit_scored",
      [
        {
          "id": f"{task}{i}",
          "task": task,
          "harm_definition": None if part else "violence",
          "objective": p,
          "response": r,
          "human_scores": [float(i % 2)] if part else scores[i % 5],
        }
        for i, (p, r) in enumerate(said)
      ],
      part,
    )
  for i, file in enumerate(SETS["pyrit_scored"].files[3:], 3):
    steps = [
      {"score_value": str(k), "description": f"Grade {k} noise."}
      for k in range(1, 6)
    ]
    name = pathlib.Path(file).stem
    text = yaml.safe_dump({"category": name, "scale_descriptions": steps})
    write("pyrit_scored", text, i)
  forms = list(rbr_gold.HARMS)
  rows = [
    {
      "id": f"r{i}",
      "prompt": [{"role": "user", "content": p}],
      "completion": [{"role": "assistant", "content": r}],
      "propositions": {
        c: (i * 7 + k * k) % 5 == 0 for k, c in enumerate(forms)
      },
    }
    for i, (p, r) in enumerate(said)
  ]
  write("rbr_gold", rows[::2], 0)
  write("rbr_gold", rows[1::2], 1)
  book = {
    "derived_propositions": {"sorry": {"apology": True, "judgement": False}},
    "completion_classes": {
      "ideal": {b: {"sorry": True} for b in rbr_gold.BEHAVIOURS},
      "minimum_acceptable_style": {
        b: {"sorry": False, "disclaimer": True} for b in rbr_gold.BEHAVIOURS
      },
    },
  }
  write("rbr_gold", yaml.safe_dump(book), 2)
  pairs = [("Hi?", "Yes.", "No."), ("Hi?", "Yes.", "No.")]
  pairs += [("Ho?", "A.", "B."), ("Ho?", "B.", "A."), ("He?", "Ok.", "")]
  rows = [
    {"id": f"h{i}", "chosen": _dialogue(p, c), "rejected": _dialogue(p, r)}
    for i, (p, c, r) in enumerate(pairs)
  ]
  other = {"chosen": _dialogue("a", "b"), "rejected": _dialogue("c", "d")}
  write("hh_harmless", [*rows, {"id": "h9"} | other])
  votes = [(1, 1, 1), (2, 1, 2), (0, 0, 0), (1, 2, 0), (2, 0, 0)]
  write(
    "preference_general",
    [
      {
        "id": f"p{i}",
        "instruction": f"Do {i}",
        "input": "",
        "response1": "one",
        "response2": "two" if i < 5 else True,
        **{f"annotator{k}": v for k, v in enumerate(votes[i % 5], 1)},
      }
      for i in range(6)
    ],
  )
  rows = [
    {"id": f"l{i}", "input": f"In {i}", "output_1": f"it goes in by {i} ways"}
    | {"output_2": f"a way in leads to {i}", "label": 1 + i}
    for i in range(2)
  ]
  write("preference_general", rows, 1)
  rows = [
    {"id": f"a{i}", "aspect": a, "prompt": a, "chosen": "c", "rejected": "r"}
    for i, a in enumerate(("harmless", "honest"))
  ]
  write("preference_general", rows, 2)
  rows = [
    {
      "id": "f",
      "conversations": [
        {"from": "system", "value": "Be."},
        {"from": "human", "value": "Go"},
      ],
      "chosen": {"from": "gpt", "value": "yes"},
      "rejected": {"from": "gpt", "value": "no"},
    }
  ]
  write("preference_general", rows, 3)
  for part in range(3):
    rows = [
      {
        "id": f"b{part}",
        "prompt": f"Ask {part}",
        "chosen": ["a", "aa", "aaa"],
        "rejected": ["b", "bb", "aaa"],
      }
    ]
    write("rm_bench", rows, part)
  harms = ("Noise", "Mud", "Rain", "Wind")
  rows = [
    {
      "id": f"c{i}",
      "allowed_categories": list(harms[: 1 + i % 3]),
      "prompt_categories": list({harms[i % 4], harms[i % 3]}) if i % 5 else [],
      "prompt": f"Storm {i}",
    }
    for i in range(40)
  ]
  for row in rows:
    within = {*row["prompt_categories"]} <= {*row["allowed_categories"]}
    row["label"] = "allowed" if within else "partial"
  rows[0]["label"] = "disallowed"  # no category at all: a contradiction
  write("cosa", rows)
  few = {"id": "few", "config": "x", "prompt": "p", "response": "r"}
  write("cosa", [few | {"label": "compliant"}], 1)
  write("cosa", json.dumps({"configs": {"x": "Firm x allows rain."}}), 2)
  forms = {"system_templates": ["Allowed:\n{list_of_harms}\nNo more."]}
  write("cosa", json.dumps(forms), 3)
  rows = [
    {"id": f"o{i}", "prompt": f"Text {i}"}
    | {key: int(i % 6 == k) for k, key in enumerate(("S", "H", "V", "HR"))}
    | ({"SH": int(i % 6 == 4)} if i % 2 else {})
    | {"S3": 0}
    for i in range(60)
  ]
  write("openai_moderation", rows)
  return tmp_path


def _load(name, path, seed=0):
  counts = {}
  return list(sources.load(name, path=path, seed=seed, counts=counts)), counts


@pytest.mark.parametrize("name", NEW)
def test_rows_follow_the_contract_in_any_order(small, name):
  rows, counts = _load(name, small)
  assert rows and counts[f"{name}_read"]
  for row in rows:
    assert check_row(row, origin=name) == row
    assert row["source"] == name and row["family"]
  assert len({row["id"] for row in rows}) == len(rows)
  for file in SETS[name].files:
    path = small / file
    if not file.endswith((".jsonl", ".jsonl.gz")):
      continue
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if file.endswith("gz") else raw).splitlines()
    _put(small, file, "\n".join(x.decode() for x in reversed(lines)))
  again, _ = _load(name, small)
  assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, rows))


@pytest.mark.parametrize("name", NEW)
def test_missing_file_names_the_flag(small, name):
  for file in SETS[name].files:
    text = (small / file).read_bytes()
    (small / file).unlink()
    with pytest.raises(ValueError, match=f"--config.data.path={small}.*{name}"):
      list(sources.load(name, path=small, seed=0))
    with pytest.raises(ValueError, match=f"--config.data.path={small}.*{name}"):
      sources.fingerprint(name, path=small)
    (small / file).write_bytes(text)


def test_fingerprint_covers_code_and_files(small, monkeypatch):
  first = {name: sources.fingerprint(name, path=small) for name in NEW}
  assert len({*first.values()}) == len(NEW)
  for name in NEW:
    names = {path.name for path in code_of(name)}
    assert {"duos.py", "shapes.py", "tables.py"} < names
    own = SETS[name].make.__module__.rsplit(".", 1)[1] + ".py"
    assert own in names and len(names) == 4 + bool(SETS[name].base)
  file = small / SETS["pyrit_scored"].files[-1]
  file.write_text(file.read_text().replace("noise", "dust"))
  changed = {name: sources.fingerprint(name, path=small) for name in NEW}
  assert [n for n in NEW if changed[n] != first[n]] == ["pyrit_scored"]
  code = small / "own.py"
  code.write_text("# edited")
  monkeypatch.setattr(sources, "code_of", lambda name: [code])
  assert sources.fingerprint("cosa", path=small) != first["cosa"]


def test_no_set_imports_another():
  """Or the fingerprint would miss code: `code_of` knows shared files only."""
  own = {s.make.__module__.rsplit(".", 1)[1] for s in SETS.values()}
  for stem in own:
    path = pathlib.Path(shapes.__file__).with_name(f"{stem}.py")
    for other in own - {stem}:
      assert f"sets.{other} " not in path.read_text(), (stem, other)


def test_saferlhf_drops_and_counts(small):
  rows, counts = _load("saferlhf_responses", small)
  assert counts["saferlhf_responses_read"] == 43
  assert counts["saferlhf_responses_dropped_duplicate"] == 1
  assert counts["saferlhf_responses_dropped_contradictory"] == 2
  assert counts["saferlhf_responses_dropped_empty"] == 1
  kinds = collections.Counter(map(kind_of, rows))
  assert kinds == {"label": 39, "pair": 19}
  specs = {r["family"]: r["spec"] for r in rows}
  assert all(specs[r["family"]] == r["spec"] for r in rows)


def test_teen_policies_are_read_and_cut(small):
  rows, _ = _load("teen_safety_policies", small)
  by_id = {r["id"]: r for r in rows}
  assert by_id["t0/own"]["label"] == 1 and by_id["t1/own"]["label"] == 0
  assert by_id["t1/own"]["spec"] == "# dangerous-content\n\nBe fair."
  parts = collections.Counter(r["id"].split("/")[1] for r in rows)
  # Odd-numbered policies overlap with others; half the apart ones violate.
  assert parts["own"] == 40 and parts["other"] == parts["duo"] > 5
  for row in rows:
    if row["id"].endswith("/duo"):
      heads = {row[k].split("\n")[0][2:] for k in ("chosen_spec",)}
      assert heads < teen_safety_policies.APART
      stem = row["id"].split("/")[0]
      assert row["rejected_spec"] == by_id[f"{stem}/own"]["spec"]


def test_diasafety_knows_what_it_does_not_know():
  unsafe = diasafety.annotation("Unauthorized Expertise", True)
  assert unsafe["Unauthorized Expertise"] == 1
  assert unsafe["Risk Ignorance"] is None and unsafe["Biased Opinion"] == 0
  safe = diasafety.annotation("Biased Opinion", False)
  assert [c for c, value in safe.items() if value == 0] == ["Biased Opinion"]


def test_refusals_flip_with_the_spec(small):
  rows, _ = _load("guard_response_labels", small)
  by_id = {r["id"]: r for r in rows}
  assert by_id["g2-0/must_answer"]["label"] == 0  # a refusal
  assert by_id["g2-0/must_decline"]["label"] == 1
  assert by_id["g2-1/must_answer"]["label"] == 1
  assert by_id["g2-1/duo"]["chosen_spec"] in shapes.ANSWER
  assert by_id["g0-0"]["label"] == 0 and by_id["g0-1"]["label"] == 1


def test_xstest_labels_are_shares_of_votes(small):
  rows, _ = _load("xstest_completions", small)
  label = {r["id"]: r["label"] for r in rows if "label" in r}
  assert [label[f"x{i}/must_answer"] for i in range(4)] == [
    1,
    0,
    0,
    pytest.approx(2 / 3),
  ]
  assert [label[f"x{i}/must_decline"] for i in range(4)] == [0, 1, 0, 0]
  assert label["x0/must_fit"] == 1  # a safe prompt, answered
  assert label["x2/must_fit"] == 0  # unsafe, refused in part
  assert label["x5/must_fit"] == 0  # safe, refused
  assert label["x7/must_fit"] == 0  # unsafe, mostly answered
  pairs = {r["id"] for r in rows if kind_of(r) == "spec_pair"}
  assert {"x0/duo", "x1/duo"} <= pairs and "x2/duo" not in pairs


def test_pyrit_thresholds(small):
  rows, _ = _load("pyrit_scored", small)
  graded = [r for r in rows if r["id"].startswith("harm")]
  by_level = collections.defaultdict(list)
  for row in graded:
    if "label" in row:
      number = int(row["id"].split("/")[0][13:])
      threshold = int(row["id"].rsplit("/")[-1])
      by_level[number % 5].append((threshold, row["label"]))
      strict = row["spec"].split("Allowed:")[0]
      assert all(
        (f"Grade {k} " in strict) == (k >= threshold) for k in range(1, 6)
      )
  assert {*by_level[0]} == {(2, 1.0)} and {*by_level[4]} == {(5, 0.0)}
  assert {*by_level[1]} == {(2, 0.0), (3, 1.0)}
  # 3, 3 and 4: all three above 2, two below 4.
  assert {*by_level[2]} == {(3, 0.0), (4, 2 / 3)}
  assert {r["weight"] for r in graded if "weight" in r} == {1.0, 2 / 3}
  with pytest.raises(ValueError, match=r"levels \[1, 2\]; there must"):
    steps = [{"score_value": k, "description": "x"} for k in (1, 2)]
    pyrit_scored.scale({"category": "x", "scale_descriptions": steps}, "f")


def test_rbr_behaviours_follow_the_file(small):
  rows, _ = _load("rbr_gold", small)
  raws = {
    raw["id"]: raw["propositions"]
    for file in SETS["rbr_gold"].files[:2]
    for raw in map(json.loads, (small / file).read_text().splitlines())
  }
  for behaviour in rbr_gold.BEHAVIOURS:
    found = [r for r in rows if r["id"].endswith(f"/{behaviour}")]
    labels = [r["label"] for r in found]
    assert labels and np.mean(labels) == 0.5
    for row in found:
      marks = raws[row["id"].split("/")[0]]
      sorry = marks["apology"] and not marks["judgement"]
      assert row["label"] == int(sorry or marks["disclaimer"])


def test_hh_dialogues():
  text = (
    "\n\nHuman: a\n\nb Human: c\n\nAssistant: d\n\nHuman: e\n\nAssistant: f"
  )
  assert [m["content"] for m in hh_harmless.turns(text)] == [
    "a\n\nb Human: c",
    "d",
    "e",
    "f",
  ]


def test_hh_drops_and_counts(small):
  rows, counts = _load("hh_harmless", small)
  assert [r["id"] for r in rows] == ["h0"]
  assert rows[0]["chosen"] == [{"role": "assistant", "content": "Yes."}]
  reasons = {k[20:]: v for k, v in counts.items() if "dropped" in k}
  assert reasons == {
    "duplicate": 1,
    "contradictory": 2,
    "empty": 1,
    "other_history": 1,
  }


def test_preferences_weigh_the_lead(small):
  rows, counts = _load("preference_general", small)
  by_id = {r["id"]: r for r in rows}
  assert sorted(by_id) == ["a0", "a1", "f", "l0", "l1", "p0", "p1", "p4"]
  assert by_id["p0"]["weight"] == 1
  assert by_id["p1"]["weight"] == pytest.approx(1 / 3)
  assert by_id["p1"]["chosen"][0]["content"] == "two"
  assert by_id["l1"]["chosen"][0]["content"] == "a way in leads to 1"
  assert by_id["a0"]["kind"] == "resp" and by_id["a1"]["kind"] == "help"
  assert by_id["f"]["prompt"][0]["role"] == "system"
  assert counts["preference_general_dropped_tie"] == 2
  assert counts["preference_general_dropped_not_text"] == 1
  assert counts["preference_general_read"] == 11


def test_answers_and_refusals_under_rules_that_demand_either(small):
  rows, counts = _load("answering", small)
  said = collections.defaultdict(dict)
  for row in rows:
    if "label" not in row:
      continue
    stem, given, rule = row["id"].split("/")
    wanted = rule.removeprefix("must_")
    assert row["label"] == (given == wanted)
    assert row["spec"] in getattr(answering, wanted.upper())
    said[stem][given] = row["messages"][-1]["content"]
  assert len(rows) == 8 * len(said) > 0
  assert all(texts["answer"] != texts["decline"] for texts in said.values())
  assert said["p0"]["answer"].endswith("one")  # as all three annotators said
  pairs = [r for r in rows if "chosen" in r]
  assert {r["chosen"] == r["rejected"] for r in pairs} == {False}
  assert all(
    (r["chosen"][0]["content"] == said[r["id"].split("/")[0]]["answer"])
    == (r["spec"] in answering.ANSWER)
    for r in pairs
  )
  assert not {*answering.ANSWER, *answering.DECLINE} & {
    *shapes.ANSWER,
    *shapes.DECLINE,
  }
  assert counts["answering_read"] == len(said) + sum(
    n for key, n in counts.items() if "dropped" in key
  )


def test_answers_that_may_refuse_are_left_out(small):
  file = SETS["answering"].files[1]
  rows = [
    {"id": "l0", "input": "In", "output_1": "I'm sorry, no.", "output_2": "b"}
    | {"label": 1},
    {"id": "l1", "input": "On", "output_1": "Yes.", "output_2": "b"}
    | {"label": 1},
  ]
  _put(small, file, rows)
  found, counts = _load("answering", small)
  stems = {r["id"].split("/")[0] for r in found}
  assert "l1" in stems and "l0" not in stems
  assert counts["answering_dropped_perhaps_refusal"] == 1


def test_answers_stand_against_what_is_plainly_none(small):
  prompts = ("Where do the tides come from?", "Name a prime above ten, please.")
  answers = (
    "The moon pulls the water.\nSo it rises twice a day.",
    "Eleven is a prime number, as nothing divides it.",
  )
  rows = [
    {"id": f"l{i}", "input": prompts[i], "output_1": answers[i]}
    | {"output_2": "b", "label": 1}
    for i in range(2)
  ]
  _put(small, SETS["contrasts"].files[1], rows)

  found, counts = _load("contrasts", small)

  by_id = {row["id"]: row for row in found}
  assert len(by_id) == 8 and {row["kind"] for row in found} == {"help"}
  for i in range(2):
    sides = {
      kind: (
        by_id[f"l{i}-{kind}"]["chosen"][0]["content"],
        by_id[f"l{i}-{kind}"]["rejected"][0]["content"],
      )
      for kind in ("other", "refusal", "disordered", "repeated")
    }
    for chosen, rejected in sides.values():
      assert answers[i].startswith(chosen) and chosen != rejected
      assert len(chosen.split()) >= 8
    assert answers[1 - i].startswith(sides["other"][1])
    assert sorted(sides["disordered"][1].split()) == sorted(answers[i].split())
    assert not set(sides["repeated"][1].split()) - set(answers[i].split())
  # Answers of one word, and three sets' prompts with them, are left out.
  assert counts["contrasts_read"] == 2 + counts["contrasts_dropped_short"]
  assert _load("contrasts", small)[0] == found


def test_rm_bench_prompts_weigh_one(small):
  rows, counts = _load("rm_bench", small)
  assert len(rows) == 24 and counts["rm_bench_dropped_equal_or_empty"] == 3
  assert {r["weight"] for r in rows} == {1 / 9}
  assert {r["kind"] for r in rows if r["id"].startswith("b2")} == {"help"}
  assert all(r["spec"] in shapes.FITTING for r in rows if r["kind"] == "resp")


def test_cosa_labels_follow_from_the_lists(small):
  rows, counts = _load("cosa", small)
  assert counts["cosa_dropped_contradictory"] == 1
  raws = {
    r["id"]: {*r["prompt_categories"]}
    for r in map(
      json.loads,
      gzip.decompress(
        (small / SETS["cosa"].files[0]).read_bytes()
      ).splitlines(),
    )
  }

  def within(spec, stem):
    allowed = {line[2:] for line in spec.split("\n") if line.startswith("- ")}
    return raws[stem] <= allowed

  parts = collections.Counter()
  for row in rows:
    stem, *part = row["id"].split("/")
    if stem == "few":
      assert row["spec"] == "Firm x allows rain."
      continue
    parts[part[0]] += 1
    if part[0] == "duo":
      assert within(row["chosen_spec"], stem)
      assert not within(row["rejected_spec"], stem)
    else:
      assert within(row["spec"], stem) == row["label"]
      assert row["spec"].endswith("children is ever allowed.")
      last = row["messages"][-1]["content"]
      assert last == "Sure. " + row["messages"][0]["content"]
  assert parts["given"] == 39 and parts["lenient"] == parts["strict"] > 10


def test_moderation_keeps_unlabelled_apart_from_absent():
  truth = openai_moderation.annotation({"S": 0, "H2": 1, "V": 0, "V2": 1})
  assert truth == {
    "S": 0,
    "H": 1,
    "V": 1,
    "HR": None,
    "SH": None,
    "S3": None,
  }


def test_moderation_makes_nothing_of_the_unknown(small):
  rows, _ = _load("openai_moderation", small)
  words = {c: (h.short, h.long) for c, h in openai_moderation.HARMS.items()}
  for row in rows:
    number = int(row["id"].split("/")[0][1:])
    if "label" in row and row["label"] and number % 2 == 0:
      lines = [x for x in row["spec"].split("\n") if "Disallowed" in x]
      assert not any(word in x for x in lines for word in words["SH"])


# -- The staged files -----------------------------------------------------


LEAST = {
  "harmbench_responses": 250,
  "rbr_gold_train": 1200,
  "saferlhf_responses": 2200,
  "teen_safety_policies": 120,
  "diasafety": 16_000,
  "guard_response_labels": 1200,
  "xstest_completions": 4300,
  "pyrit_scored": 1800,
  "rbr_gold": 1700,
  "hh_harmless": 2000,
  "preference_general": 1200,
  "answering": 4500,
  "contrasts": 1500,
  "rm_bench": 2500,
  "cosa": 5500,
  "openai_moderation": 1100,
}
# Fitted on four fifths of the families, the spec alone stays near 0.5.
TAXONOMIES = {
  "diasafety": 0.6,
  "pyrit_scored": 0.6,
  "rbr_gold": 0.62,
  "cosa": 0.62,
}


@pytest.mark.parametrize("name", NEW)
def test_staged_rows(staged, name):
  rows, _ = _load(name, staged)
  assert len(rows) > LEAST[name]
  for row in rows[:: max(1, len(rows) // 500)]:
    assert check_row(row, origin=name) == row
  assert len({r["id"] for r in rows}) == len(rows)
  labels = [r["label"] for r in rows if "label" in r]
  if labels:
    assert 0.39 < np.mean(labels) < 0.72


@pytest.mark.parametrize("name", TAXONOMIES)
def test_staged_specs_do_not_tell_the_label(staged, name):
  from sklearn.metrics import roc_auc_score

  rows = [r for r in _load(name, staged)[0] if "label" in r]
  held = np.array([int(r["family"], 16) % 5 == 0 for r in rows])
  means = collections.defaultdict(lambda: [0.5, 1.0])
  for row, out in zip(rows, held, strict=True):
    if not out:
      means[row["spec"]][0] += row["label"]
      means[row["spec"]][1] += 1
  scores = np.array([means[r["spec"]][0] / means[r["spec"]][1] for r in rows])
  labels = np.array([r["label"] > 0.5 for r in rows])
  assert roc_auc_score(labels[held], scores[held]) < TAXONOMIES[name]
