"""Rows of the real sets: on small files of our own, and on the real ones."""

import collections
import gzip
import json

import numpy as np
import pytest

from csrm_jax.data import contract, sources
from csrm_jax.data.sets import SETS, beavertails, shapes
from csrm_jax.spec import complies

CLEAN = {c: 0 for c in beavertails.CATEGORIES}


def _write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(r) + "\n" for r in rows)
  path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def small(tmp_path):
  """The layout of the real sets, with harmless rows that we wrote."""
  ticked = [
    [],
    ["privacy_violation"],
    ["hate_speech,offensive_language"],
    ["privacy_violation", "hate_speech,offensive_language"],
    ["child_abuse"],
    ["financial_crime,property_crime,theft"],
  ]
  _write(
    tmp_path / "beavertails/responses.jsonl.gz",
    [
      {
        "id": f"bt-{i}",
        "prompt": f"Question {i // 2}?",
        "response": f"Answer {i}.",
        "categories": ticked[i % len(ticked)],
      }
      for i in range(60)
    ],
  )
  pairs = [("q", "a", "b"), ("q", "a", "b"), ("q", "b", "c"), ("q", "c", "b")]
  pairs += [("r", "a", "b")]
  _write(
    tmp_path / "pku_saferlhf_pairs/pairs.jsonl.gz",
    [
      {"id": str(i), "prompt": p, "chosen": c, "rejected": r}
      for i, (p, c, r) in enumerate(pairs)
    ],
  )
  for domain in ("hr", "education", "social_media"):
    _write(
      tmp_path / f"polyguard/{domain}.jsonl.gz",
      [
        {
          "id": f"{domain}-{i}",
          "policy": f"{domain}/A",
          "category": "One" if domain == "hr" else f"C{i % 3}",
          "rule": f"Rule {domain} {i % 6}.",
          "violating": f"Bad {domain} {i}",
          "compliant": f"Good {domain} {i}",
        }
        for i in range(12)
      ],
    )
  return tmp_path


@pytest.mark.parametrize("name", sources.MIXTURE)
def test_rows_follow_the_contract_in_any_order(small, name):
  rows = list(sources.load(name, path=small, seed=1))
  assert rows
  for row in rows:
    assert contract.check_row(row, origin=name) == row
    assert row["source"] == name and row["family"]
  assert len({r["id"] for r in rows}) == len(rows)
  # The files turned round give the same rows; another seed gives others.
  for file in SETS[name].files:
    path = small / file
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join(reversed(lines))))
  again = list(sources.load(name, path=small, seed=1))
  if name != "pku_pairs":  # where the first of two duplicates is kept
    key = json.dumps
    assert sorted(map(key, again)) == sorted(map(key, rows))
  assert list(sources.load(name, path=small, seed=2)) != again


def test_mixture_is_all_three(small):
  rows = list(sources.load("mixture", path=small, seed=0))
  parts = (sources.load(n, path=small, seed=0) for n in sources.MIXTURE)
  assert rows == [row for part in parts for row in part]


def test_pku_counts_what_it_drops(small):
  counts = {}
  rows = list(sources.load("pku_pairs", path=small, seed=0, counts=counts))
  assert [r["id"] for r in rows] == ["0", "4"]
  assert counts == {
    "pku_pairs_read": 5,
    "pku_pairs_dropped_duplicate": 1,
    "pku_pairs_dropped_contradictory": 2,
    "pku_pairs_made": 2,
  }
  assert {r["spec"] for r in rows} <= set(shapes.HARMLESSNESS)


def test_polyguard_wrong_rules_are_of_other_categories(small):
  counts = {}
  rows = list(sources.load("polyguard", path=small, seed=0, counts=counts))
  assert counts["polyguard_without_other_rule"] == 12  # all of hr
  by_id = {r["id"]: r for r in rows}
  for name, row in by_id.items():
    stem, part = name.split("/")
    domain, number = stem.split("-")
    own = f"Rule {domain} {int(number) % 6}."
    category = {f"Rule {domain} {k}." for k in range(int(number) % 3, 6, 3)}
    if part in ("right", "repaired"):
      assert own in row["spec"]
      assert row["label"] == (part == "repaired")
    elif part == "wrong":
      assert not any(rule in row["spec"] for rule in category)
      assert row["label"] == 1
    else:
      assert row["rejected_spec"] == by_id[f"{stem}/right"]["spec"]
      assert row["chosen_spec"] == by_id[f"{stem}/wrong"]["spec"]


def test_beavertails_labels_follow_from_the_specs(small):
  rows = list(sources.load("beavertails", path=small, seed=0))
  file = small / "beavertails/responses.jsonl.gz"
  ticked = {
    r["id"]: tuple(r["categories"])
    for r in map(json.loads, gzip.decompress(file.read_bytes()).splitlines())
  }
  by_text = {s.render(): s for d in beavertails.duos(0) for s in d}
  parts = collections.Counter()
  for row in rows:
    stem, part = row["id"].split("/")
    parts[part] += 1
    truth = beavertails.annotation(ticked[stem])
    if part == "duo":
      assert complies(by_text[row["chosen_spec"]], truth) == 1
      assert complies(by_text[row["rejected_spec"]], truth) == 0
    else:
      assert complies(by_text[row["spec"]], truth) == row["label"]
    if "child_abuse" in ticked[stem]:
      assert part == "other"
  assert parts["duo"] == parts["lenient"] == parts["strict"] > 10
  assert parts["safe"] == 10


def test_no_spec_permits_child_abuse():
  for seed in range(5):
    for duo in beavertails.duos(seed):
      for spec in duo:
        rules = {r.id: r.polarity for r in spec.rules}
        assert rules.get("child_abuse") in (None, "forbid")
        assert complies(spec, CLEAN) == 1


def test_unknown_category_and_missing_field(small):
  file = small / "beavertails/responses.jsonl.gz"
  row = {"id": "x", "prompt": "p", "response": "r", "categories": ["arson"]}
  _write(file, [row])
  with pytest.raises(ValueError, match="row 'x': field 'categories': 'arson'"):
    list(sources.load("beavertails", path=small, seed=0))
  del row["categories"]
  _write(file, [row])
  with pytest.raises(ValueError, match=r"gz:1: field 'categories': missing"):
    list(sources.load("beavertails", path=small, seed=0))


# -- The real files -------------------------------------------------------


def _labels(rows):
  return np.array([r["label"] for r in rows if "label" in r], float)


@pytest.mark.parametrize(
  ("name", "least"),
  [("beavertails", 4000), ("pku_pairs", 2500), ("polyguard", 30_000)],
)
def test_real_rows(staged, name, least):
  rows = list(sources.load(name, path=staged, seed=0))
  assert len(rows) > least
  for row in rows[:: len(rows) // 500]:
    assert contract.check_row(row, origin=name) == row
  assert len({r["id"] for r in rows}) == len(rows)
  if name != "pku_pairs":
    assert 0.4 < _labels(rows).mean() < 0.65


def test_real_beavertails_specs_do_not_tell_the_label(staged):
  """Fitted on four fifths of the families, the spec alone stays near 0.5."""
  from sklearn.metrics import roc_auc_score

  rows = [
    r for r in sources.load("beavertails", path=staged, seed=0) if "label" in r
  ]
  held = np.array([int(r["family"], 16) % 5 == 0 for r in rows])
  labels = _labels(rows)
  means: dict[str, list[float]] = collections.defaultdict(lambda: [0.5, 1.0])
  for row, label, out in zip(rows, labels, held, strict=True):
    if not out:
      means[row["spec"]][0] += label
      means[row["spec"]][1] += 1
  scores = [means[r["spec"]][0] / means[r["spec"]][1] for r in rows]
  auroc = roc_auc_score(labels[held], np.array(scores)[held])
  assert auroc < 0.62


def test_real_families_hold_a_prompt_together(staged):
  """The same prompt in two sets is one family."""
  families = collections.defaultdict(set)
  for row in sources.load("beavertails,pku_pairs", path=staged, seed=0):
    messages = row.get("prompt") or row["messages"]
    families[messages[0]["content"].strip().lower()].add(row["family"])
  assert all(len(names) == 1 for names in families.values())
