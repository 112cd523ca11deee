"""Rows of the synthetic world: true labels, balance, no short cuts.

Labels are checked against a second reading that starts from the texts alone:
which template made this response, what does this rule's wording name.
"""

import collections
import functools
import itertools
import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from csrm_jax.data import domains, groups
from csrm_jax.data.domains import SLOT, world
from csrm_jax.data.synthetic import rows, suite


def words(text: str) -> list[str]:
  return re.findall(r"\{\w+\}|[\w*]+(?:'[a-z]+)?", text.lower())


def of_split(split: str) -> list[domains.Domain]:
  return [d for d in world().values() if d.split == split]


@functools.cache
def train_rows() -> tuple[dict, ...]:
  return tuple(rows(split="train", families=600, seed=0))


@functools.cache
def unseen_rows() -> tuple[dict, ...]:
  return tuple(rows(split="unseen", families=150, seed=1))


def labelled(some) -> list[dict]:
  return [r for r in some if "label" in r]


def conversation_of(row: dict) -> str:
  return row["id"].rsplit("/", 1)[0]


def dependent(some) -> list[dict]:
  """Label rows of conversations that comply with one spec, not with another."""
  seen = collections.defaultdict(set)
  for row in labelled(some):
    seen[conversation_of(row)].add(row["label"])
  return [r for r in labelled(some) if len(seen[conversation_of(r)]) == 2]


# --- Rows ---


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="split='test'"):
    next(rows(split="test", families=1, seed=0))
  with pytest.raises(ValueError, match="max_rules=1"):
    next(rows(split="train", families=1, seed=0, max_rules=1))
  with pytest.raises(ValueError, match=r"refusals=1\.5"):
    next(rows(split="train", families=1, seed=0, refusals=1.5))
  with pytest.raises(ValueError, match="synthetic_new"):
    suite("synthetic_new")


def test_same_seed_same_rows():
  once = list(rows(split="train", families=5, seed=3))
  assert once == list(rows(split="train", families=5, seed=3))
  assert once != list(rows(split="train", families=5, seed=4))
  # A longer run starts with the shorter one.
  assert once == list(rows(split="train", families=9, seed=3))[: len(once)]
  assert suite("synthetic_seen", size=40) == suite("synthetic_seen", size=40)


def test_rows_follow_the_contract():
  ids = [r["id"] for r in train_rows()]
  assert len(ids) == len(set(ids))
  kinds = collections.Counter()
  for row in train_rows():
    if "ladder" in row:
      kinds["ladder"] += 1
      assert len(row["ladder"]) >= 3
    elif "chosen" in row:
      kinds["pair"] += 1
      assert row["chosen"] != row["rejected"] and row["kind"] == "resp"
      assert row["prompt"][-1]["role"] == "user"
    else:
      kinds["spec pair" if "chosen_spec" in row else "label"] += 1
      roles = [m["role"] for m in row["messages"]]
      assert roles == ["user", "assistant"] * (len(roles) // 2)
  assert min(kinds.values()) > 0 and len(kinds) == 4
  multi = [len(r["messages"]) > 2 for r in labelled(train_rows())]
  assert 0.15 < np.mean(multi) < 0.35


def test_max_rules_and_lengths():
  for row in labelled(rows(split="train", families=100, seed=2, max_rules=2)):
    assert row["spec"].count("\n") <= 1
  lengths = [
    len(line.split())
    for r in labelled(train_rows())
    for line in r["spec"].split("\n")
  ]
  assert np.mean(lengths) < 15 and max(lengths) < 45


@functools.cache
def _templates() -> list[tuple[re.Pattern[str], str, int, bool]]:
  """(pattern of a response, domain, severity or 0, whether it refuses)."""
  out = []
  for domain in world().values():
    kinds = [(g.responses, g.severity, False) for g in domain.grades]
    kinds += [(domain.neutral, 0, False), (domain.refusals, 0, True)]
    for texts, severity, refuses in kinds:
      for text in texts:
        parts = [re.escape(p) for p in SLOT.split(text)[::2]]
        pattern = re.compile("(.+)".join(parts), re.IGNORECASE)
        out.append((pattern, domain.id, severity, refuses))
  return out


@functools.cache
def read_response(text: str) -> set[tuple[str, int, bool]]:
  return {
    (name, severity, refuses)
    for pattern, name, severity, refuses in _templates()
    if pattern.fullmatch(text)
  }


@functools.cache
def _wordings() -> dict[str, tuple[str, int]]:
  """Wording -> (domain, severity; 0 for a title)."""
  out = {}
  for d in world().values():
    out |= {t.lower(): (d.id, 0) for t in d.titles}
    out |= {t.lower(): (d.id, g.severity) for g in d.grades for t in g.describe}
  return out


def read_label(spec: str, domain: str, severity: int, refuses: bool) -> int:
  """The label by the letter of the rules, without `complies`."""
  for line in spec.split("\n"):
    for label, listing in re.findall(
      r"(Disallowed|Required): (.*?)\.(?= [A-Z][a-z]+:|$)", line
    ):
      if label == "Required":
        verb, title = re.fullmatch(
          r"(.* questions about|refuse to talk about) (.*)", listing
        ).groups()
        must_refuse = verb.startswith(("decline", "refuse"))
        name, _ = _wordings()[title]
        if name == domain and refuses != must_refuse:
          return 0
        continue
      whole = listing.split(", for example ")[0].lower()
      items = [whole] if whole in _wordings() else listing.lower().split("; ")
      for item in items:
        name, level = _wordings()[item]
        if name == domain and severity > 0 and level in (0, severity):
          return 0
  return 1


@pytest.mark.parametrize("split", ["train", "seen", "unseen"])
def test_labels_follow_from_the_texts_alone(split: str):
  checked = 0
  for row in labelled(rows(split=split, families=150, seed=5)):
    found = read_response(row["messages"][-1]["content"])
    assert len(found) == 1, row
    domain, severity, refuses = next(iter(found))
    assert severity == row["severity"]
    assert row["label"] == read_label(row["spec"], domain, severity, refuses)
    checked += 1
  assert checked > 2000


def test_pairs_and_ladders_follow_from_the_labels():
  label = {
    (str(r["messages"]), r["spec"]): r["label"] for r in labelled(train_rows())
  }
  severity = {str(r["messages"]): r["severity"] for r in labelled(train_rows())}
  flips = 0
  for row in train_rows():
    if "chosen_spec" in row:
      key = str(row["messages"])
      assert label[key, row["chosen_spec"]] == 1
      assert label[key, row["rejected_spec"]] == 0
      flips += 1
    elif "chosen" in row:
      for side, want in (("chosen", 1), ("rejected", 0)):
        key = str(row["prompt"] + row[side])
        assert label[key, row["spec"]] == want
    elif "ladder" in row:
      steps = [severity[str(r["messages"])] for r in row["ladder"]]
      assert steps == sorted(set(steps), reverse=True)
      for rung in row["ladder"]:
        assert label[str(rung["messages"]), rung["spec"]] == 0
  assert flips >= len(dependent(train_rows())) / 4


# --- Balance ---


def test_half_of_everything_complies():
  by_spec = collections.defaultdict(list)
  by_text = collections.defaultdict(list)
  by_kind = collections.defaultdict(list)
  by_domain = collections.defaultdict(list)
  for row in labelled(train_rows()):
    by_spec[row["family"], row["spec"]].append(row["label"])
    by_kind[row["source"]].append(row["label"])
    name = next(iter(read_response(row["messages"][-1]["content"])))[0]
    by_domain[name].append(row["label"])
  for row in dependent(train_rows()):
    by_text[conversation_of(row)].append(row["label"])
  assert {np.mean(v) for v in by_spec.values()} == {0.5}
  for labels in by_text.values():
    assert 0.3 < np.mean(labels) < 0.7
  assert len(by_kind) == len(groups.KINDS)
  for labels in itertools.chain(by_kind.values(), by_domain.values()):
    assert 0.4 < np.mean(labels) < 0.6
  shares = len(dependent(train_rows())) / len(labelled(train_rows()))
  assert shares > 0.75


def test_form_predicts_nothing():
  """Rules, words and polarity words of a spec, the conversation's length."""
  features = {
    "rules": lambda r: r["spec"].count("\n"),
    "words": lambda r: len(r["spec"].split()),
    "disallowed": lambda r: r["spec"].count("Disallowed"),
    "allowed": lambda r: r["spec"].count("Allowed"),
    "required": lambda r: r["spec"].count("Required"),
    "items": lambda r: r["spec"].count(";"),
    "first": lambda r: r["spec"].find("Disallowed"),
    "response": lambda r: len(r["messages"][-1]["content"]),
    "turns": lambda r: len(r["messages"]),
    "severity": lambda r: r["severity"],
  }
  some = dependent(train_rows())
  labels = [r["label"] for r in some]
  for name, feature in features.items():
    auroc = roc_auc_score(labels, [feature(r) for r in some])
    assert 0.45 < auroc < 0.55, (name, auroc)


# --- Held back ---


def _assistant_texts(some) -> set[str]:
  return {r["messages"][-1]["content"] for r in labelled(some)}


def _held_back(domain: domains.Domain) -> set[str]:
  out = set()
  for key, texts in domain.templates().items():
    if key != "history":
      out |= {t for i, t in enumerate(texts) if (i + 1) % 4 == 0}
  return out


def test_seen_suite_uses_texts_held_back_from_training():
  held_back = set().union(*(_held_back(d) for d in of_split("train")))
  patterns = [
    re.compile("(.+)".join(re.escape(p) for p in SLOT.split(t)[::2]), re.I)
    for t in held_back
  ]

  def is_held_back(text: str) -> bool:
    return any(p.fullmatch(text) for p in patterns)

  for text in _assistant_texts(suite("synthetic_seen")):
    assert is_held_back(text), text
  for text in sorted(_assistant_texts(train_rows()))[:1000]:
    assert not is_held_back(text), text


def test_the_wide_world_has_every_trained_domain():
  found = {
    split: {
      name
      for text in _assistant_texts(rows(split=split, families=120, seed=0))
      for name, _, _ in read_response(text)
    }
    for split in ("train", "wide")
  }
  assert found["train"] == {d.id for d in of_split("train")}
  assert found["wide"] == found["train"] | {d.id for d in of_split("wide")}


# --- Suites ---


@pytest.mark.parametrize("name", ["synthetic_seen", "synthetic_unseen"])
def test_suite(name: str):
  out = suite(name, size=400)
  assert 385 <= len(out) <= 400
  assert 0.45 < np.mean([r["label"] for r in out]) < 0.55
  by_id = {r["id"]: r for r in out}
  flips, kept = 0, 0
  for row in out:
    if "base" not in row:
      assert row["edit"] == "base"
      continue
    base = by_id[row["base"]]
    assert base["messages"] == row["messages"] and base["spec"] != row["spec"]
    if row["edit"] in groups.KINDS:
      flips += row["label"] != base["label"]
    else:
      assert row["label"] == base["label"]
      kept += 1
  bases = sum("base" not in r for r in out)
  assert flips > 0.7 * bases and kept >= bases
  assert len({r["spec"] for r in out}) < len(out) / 6
  unseen = {d.id for d in of_split("unseen")}
  for text in _assistant_texts(out):
    domain = next(iter(read_response(text)))[0]
    assert (domain in unseen) == (name == "synthetic_unseen")


def test_suites_hold_every_edit():
  edits = {r["edit"] for r in suite("synthetic_unseen", size=1500)}
  kept = {"base", "reword", "permute", "add_inert", "borrow", "drop_inert"}
  assert edits == kept | set(groups.KINDS)


# --- Words do not solve it ---


def _joined(row: dict) -> str:
  turns = " ".join(m["content"] for m in row["messages"])
  return row["spec"] + " " + turns


def _marked(row: dict) -> str:
  """Words of the spec apart from those of the conversation."""
  spec = " ".join("spec_" + w for w in words(row["spec"]))
  turns = " ".join(m["content"] for m in row["messages"])
  return spec + " " + turns


VIEWS = {
  "together": _joined,
  "apart": _marked,
  "text": lambda r: " ".join(m["content"] for m in r["messages"]),
  "spec": lambda r: r["spec"],
}


@pytest.mark.parametrize("view", VIEWS)
def test_tfidf_does_not_solve_it(view: str):
  train = labelled(train_rows())
  test = dependent(unseen_rows()) + dependent(
    suite("synthetic_unseen", size=1000)
  )
  assert len(train) > 5000 and len(test) > 2000
  vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
  model = LogisticRegression(C=10.0, max_iter=300)
  model.fit(
    vectors.fit_transform(map(VIEWS[view], train)), [r["label"] for r in train]
  )
  scores = model.decision_function(vectors.transform(map(VIEWS[view], test)))
  auroc = roc_auc_score([r["label"] for r in test], scores)
  assert auroc < 0.65
