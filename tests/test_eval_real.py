"""Suites of real sets: what they hold, how they are balanced, what is apart."""

import collections
import gzip
import json

import numpy as np
import pytest

from csrm_jax import metrics
from csrm_jax.data import augment_sources, contract, sources
from csrm_jax.data.sets import beavertails, polyguard
from csrm_jax.eval import real, real_rules, real_specs, recipes, suites
from csrm_jax.eval.recipes import Split

NOTHING = Split(0, 0.1, frozenset(), frozenset())


def lines(policy: str, categories: str, rules: int = 2) -> list[dict]:
  """A text per letter, which names its category."""
  return [
    {
      "id": f"{policy}-{i}",
      "policy": policy,
      "category": f"Category {c}",
      "rule": f"Never do {c}{i % rules} of {policy}.",
      "violating": f"Bad {policy} {i} {c}",
      "compliant": f"Good {policy} {i} {c}",
    }
    for i, c in enumerate(categories)
  ]


def made(raws, kind, size=400):
  counts: dict[str, int] = {}
  policies = real_rules.policies_of(raws)
  rows = real_rules.rows(
    raws, kind, policies=policies, size=size, counts=counts
  )
  return rows, counts


def by_mean(rows, key) -> float:
  """AUROC of the label by its own mean over rows that share `key`."""
  labels = np.array([float(r["label"]) for r in rows])
  groups = collections.defaultdict(list)
  for row, label in zip(rows, labels, strict=True):
    groups[key(row)].append(label)
  scores = np.array([np.mean(groups[key(row)]) for row in rows])
  return float(metrics.auroc(scores, labels))


def text(row) -> str:
  return row["messages"][-1]["content"]


@pytest.mark.parametrize("kind", ["rules", "policy"])
@pytest.mark.parametrize("categories", ["abc", "aabbbcc", "abcd" * 6, "ab" * 5])
def test_neither_spec_nor_text_tells_the_label(kind, categories):
  raws = lines("hr/A", categories) + lines("education/B", "xyz" * 4)
  rows, counts = made(raws, kind)
  assert counts["text_without_other_category"] == 0
  assert by_mean(rows, lambda r: r["spec"]) == 0.5
  assert by_mean(rows, text) == 0.5
  for row in rows:
    assert contract.check_row(
      {k: v for k, v in row.items() if k != "gold"}, origin="x"
    )


def test_wrong_rules_are_of_other_categories_of_the_policy():
  raws = lines("hr/A", "aabbcdd") + lines("hr/B", "efgefg")
  rows, _ = made(raws, "rules")
  own = {raw["id"]: raw for raw in raws}
  for row in rows:
    stem, part = row["id"].split("/", 2)[0:2], row["id"].rsplit("/", 1)[1]
    raw = own["/".join(stem)]
    same = [r["rule"] for r in raws if r["category"] == raw["category"]]
    assert raw["policy"] in row["spec"]
    if row["label"]:
      assert part.startswith("wrong")
      assert not any(rule in row["spec"] for rule in same)
    else:
      (at,) = row["gold"]
      assert raw["rule"] in row["spec"].split("\n")[at]
  suite = suites.flatten("rules", [*rows])
  kinds = collections.Counter(r.get("edit") for r in rows)
  assert len(suite.pairs) == kinds["other_rule"] == len(raws)
  assert kinds["add_inert"] and kinds["retitle"]
  assert kinds["add_inert"] + kinds["retitle"] == 2 * len(raws)


def test_a_large_category_is_thinned_and_counted():
  rows, counts = made(lines("hr/A", "aaaaabc") + lines("hr/B", "zzz"), "all")
  assert counts["text_without_other_category"] == 3 + 3
  assert len(rows) == 3 * 4
  assert by_mean(rows, lambda r: r["spec"]) == 0.5


def test_texts_under_several_rules_are_left_out():
  raws = lines("hr/A", "abcabc")
  twice = {**raws[1], "id": "again", "violating": raws[0]["violating"]}
  same = {**raws[2], "id": "same"}
  _, counts = made([*raws, twice, same], "rules")
  assert counts["text_under_several_rules"] == 2
  assert counts["duplicate"] == 1


def test_kinds_share_their_texts_and_domains_share_the_rows():
  raws = lines("hr/A", "abc" * 40) + lines("education/B", "def" * 40)
  found = {kind: made(raws, kind, size=80)[0] for kind in real_rules.KINDS}
  families = {kind: {r["family"] for r in rows} for kind, rows in found.items()}
  assert len(families["rules"]) <= 20 == 80 // 4
  assert len({frozenset(f) for f in families.values()}) == 1
  sides = collections.Counter(r["id"][:2] for r in found["rules"])
  assert 0.6 < sides["hr"] / sides["ed"] < 1.7
  assert {r["label"] for r in found["texts"] if "Good" in text(r)} == {1}


def write(folder, raws):
  for name in polyguard.FILES:
    domain = name.split("/")[1].split(".")[0]
    mine = [r for r in raws if r["policy"].startswith(domain)]
    body = "".join(json.dumps(r) + "\n" for r in mine)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(body.encode()))


@pytest.fixture
def small(tmp_path):
  raws = [r for p in polyguard.UNSEEN_POLICIES for r in lines(p, "abc" * 6)]
  raws += lines("hr/Other", "xyz" * 60)
  write(tmp_path, raws)
  return tmp_path


def test_unseen_policies_are_no_source(small):
  counts: dict[str, int] = {}
  rows = list(sources.load("polyguard", path=small, seed=0, counts=counts))
  assert counts["polyguard_unseen_policy"] == 3 * 18
  assert counts["polyguard_read"] == 3 * 18 + 180
  assert rows and all("hr/Other" in r["id"] for r in rows)


def test_families_of_training_and_their_texts_are_left_out(small):
  counts: dict[str, int] = {}
  told = {
    "polyguard_unseen_all": 3 * 3 * 18,
    "polyguard_seen_all": 0,
  }
  trained = NOTHING._replace(trained=frozenset({"polyguard"}))
  seen = real.build(
    "polyguard_seen_all", path=small, split=trained, counts=counts
  )
  assert 0 < len({r["family"] for r in seen}) < 40
  assert counts["of_training_families"] > 140
  for split in (trained, NOTHING):
    rows = real.build(
      "polyguard_unseen_all", path=small, split=split, counts={}
    )
    assert len(rows) == told["polyguard_unseen_all"]
  texts = recipes.texts_of(
    [{"messages": [{"role": "assistant", "content": "GOOD hr/Adobe, 4 b"}]}]
  )
  counts = {}
  rows = real.build(
    "polyguard_unseen_all",
    path=small,
    split=trained._replace(texts=texts),
    counts=counts,
  )
  assert counts["with_texts_of_training"] == 1
  assert "hr/Adobe-4/right" not in {r["id"] for r in rows}


def test_spec_pairs_become_flips_of_their_label_rows():
  rows = [
    {"id": "a/1", "messages": ["m"], "spec": "S", "label": 0.2, "family": "f"},
    {"id": "a/2", "messages": ["m"], "spec": "T", "label": 0.9, "family": "f"},
    {"id": "a/3", "messages": ["m"], "spec": "U", "label": 0.8, "family": "f"},
    {
      "id": "a/duo",
      "messages": ["m"],
      "chosen_spec": "T",
      "rejected_spec": "S",
    },
    {
      "id": "a/soft",
      "messages": ["m"],
      "chosen_spec": "T",
      "rejected_spec": "U",
    },
    {
      "id": "b/duo",
      "messages": ["n"],
      "chosen_spec": "T",
      "rejected_spec": "S",
    },
  ]
  found = {r["id"]: r for r in real._flips(rows)}
  assert set(found) == {"a/1", "a/2", "a/3", "a/soft", "b/duo"}
  assert (found["a/1"]["base"], found["a/1"]["edit"]) == ("a/2", "other_spec")
  assert "base" not in found["a/3"]


def test_real_is_all_suites_and_names_are_kept_once():
  assert suites.names("real, polyguard_seen_all,x") == [*real.REAL, "x"]
  assert not any(name.endswith("_policy") for name in real.REAL)
  with pytest.raises(ValueError, match="--suite is empty"):
    suites.names(" , ")
  with pytest.raises(ValueError, match="no real suite"):
    real.build("nothing", path=None, split=NOTHING, counts={})
  with pytest.raises(ValueError, match="--suite=pku_pairs: --data is missing"):
    suites.read("pku_pairs")


# -- The real files -------------------------------------------------------


def test_resampled_labels_follow_from_the_specs(staged):
  found = [
    x
    for x in augment_sources.beavertails_annotated(staged)
    if any(x.violated.values()) and x.violated["child_abuse"] != 1
  ][:40]
  counts: dict[str, int] = {}
  rows = real_specs.rows(found, seed=0, counts=counts)
  assert len(rows) > 4 * len(found)
  assert by_mean(rows, text) == 0.5
  # Pool of training: other duos.
  old = {s.render() for duo in beavertails.duos(0) for s in duo}
  duos = [r for r in rows if r.get("edit") in (None, "other_spec")]
  assert sum(r["spec"] in old for r in duos) < len(duos) / 20
  place = {r["id"]: r for r in rows}
  for row in rows:
    assert ("gold" in row) == (row["label"] == 0)
    assert row.get("gold", [0])
    if "base" in row:
      same = place[row["base"]]["label"] == row["label"]
      assert same == (row["edit"] != "other_spec")


@pytest.fixture(scope="module")
def workdir(staged, tmp_path_factory):
  """Claims the recipe of configs/csrm_smollm2.py, and more sets beside."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "model.json").write_text("{}")
  data = {
    "source": "mixture,cosa,teen_safety_policies",
    "path": staged,
    "examples": 2500,
    "heldout": 0.1,
  }
  (folder / "config.json").write_text(json.dumps({"seed": 0, "data": data}))
  return folder


def test_no_text_of_a_real_suite_is_trained_on(staged, workdir, monkeypatch):
  def plain(text: str) -> str:
    return " ".join(text.lower().split())

  def said(row) -> set[str]:
    messages = row.get("messages") or [
      *row["prompt"],
      *row["chosen"],
      *row["rejected"],
    ]
    return {plain(m["content"]) for m in messages}

  rows = list(recipes.training_rows(workdir))
  monkeypatch.setattr(recipes, "training_rows", lambda *_, **__: iter(rows))
  trained = set().union(*map(said, rows))
  assert len(trained) > 10_000
  sizes = {}
  for name in real.NAMES:
    if name.endswith(("_seen_texts", "_unseen_texts", "_seen_policy")):
      continue  # their texts are those of the other kinds
    suite = suites.read(name, data=staged, model=workdir)
    texts = set().union(*map(said, suite.rows))
    assert not texts & trained, name
    sizes[name] = len(suite.rows)
    if name.startswith("polyguard") and "texts" not in name:
      assert by_mean(suite.rows, lambda r: r["spec"]) == 0.5, name
      bound = 0.75 if name.endswith("all") else 0.5
      assert by_mean(suite.rows, text) == bound, name
  small = {"teen_safety_policies", "cosa"}  # this recipe trains on them
  assert all(280 <= n <= 650 for k, n in sizes.items() if k not in small), sizes
  assert all(sizes[k] < 280 or k == "cosa" for k in small), sizes
