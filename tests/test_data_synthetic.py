"""The synthetic world: valid files, true labels, no short cuts, unseen is new.

Labels are checked against a second reading that starts from the texts alone:
which template made this response, what does this rule's wording name.
"""

import collections
import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from csrm_jax.data import synthetic
from csrm_jax.data.synthetic import SLOT, rows, suite, world

# Words of any conversation: phrases made of these alone belong to no domain.
_COMMON = """
a an the and or but nor so if then than as of in on at to for from by with
without about into over up down out off under i you he she it we they me him
her us them my your his its our their mine yours this that these those who
whom whose which what when where why how is am are was were be been being do
does did done have has had having will would shall should can could may might
must not no yes there here very too also just only even still yet again once
more most much many few some any all both each every other another one two
first last next thing things something anything nothing everything else rather
able before after until while because since though now ever never always
sorry afraid please let know want need like help get got go take make give
tell say ask talk think look leave stay call pass glad happy right person
people question questions matter lot long way top better away outside beyond
i'm i'd i'll i've you're you'd you'll you've it's that's don't can't won't
isn't there's let's cannot
"""
COMMON = frozenset(_COMMON.split())


def words(text: str) -> list[str]:
  return re.findall(r"\{\w+\}|[\w*]+(?:'[a-z]+)?", text.lower())


def of_split(split: str) -> list[synthetic.Domain]:
  return [d for d in world().values() if d.split == split]


def all_texts(domain: synthetic.Domain) -> list[str]:
  fillers = [f for v in domain.slots.values() for f in v]
  templates = [t for v in domain.templates().values() for t in v]
  return [*domain.rule_texts(), *templates, *fillers]


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


# --- The files ---


def test_world_is_large_enough():
  assert len(of_split("train")) >= 10
  assert len(of_split("unseen")) >= 10
  for domain in world().values():
    assert len(domain.grades) >= 4


BREAKAGES = {
  "grades.1.responses": lambda d: d["grades"][1]["responses"].pop(),
  "grades.0.describe": lambda d: d["grades"][0].update(describe=["one"]),
  "prompts": lambda d: d.update(prompts=d["prompts"][:3]),
  "history.0": lambda d: d["history"].__setitem__(0, ["question only"]),
  "vocabulary": lambda d: d.update(vocabulary=["wine"]),
  "split": lambda d: d.update(split="test"),
  "id": lambda d: d.update(id="beer"),
  "colour": lambda d: d.update(colour="red"),
  "grades: severities": lambda d: d["grades"].reverse(),
  "refusals: unknown slot": lambda d: d["refusals"].append("No {glass} here."),
  "slots.drink": lambda d: d["slots"].update(drink=["ale"]),
  "refusals: .* stands under neutral": lambda d: d["neutral"].append(
    d["refusals"][0]
  ),
  "grades.describe: slot": lambda d: d["titles"].append("{drink}"),
}


@pytest.mark.parametrize("key", BREAKAGES)
def test_broken_file_is_named(key: str, tmp_path: Path):
  text = (synthetic.WORLD / "alcohol.yaml").read_text(encoding="utf-8")
  domain = yaml.safe_load(text)
  for grade in domain["grades"]:
    grade["responses"] = grade["responses"][:8]
  path = tmp_path / "alcohol.yaml"
  path.write_text(yaml.safe_dump(domain), encoding="utf-8")
  assert synthetic.load(path).id == "alcohol"

  BREAKAGES[key](domain)
  path.write_text(yaml.safe_dump(domain), encoding="utf-8")
  with pytest.raises(ValueError, match=rf"alcohol\.yaml: {key}"):
    synthetic.load(path)


def test_not_yaml_is_named(tmp_path: Path):
  path = tmp_path / "alcohol.yaml"
  path.write_text("id: [alcohol", encoding="utf-8")
  with pytest.raises(ValueError, match=r"alcohol\.yaml: not YAML"):
    synthetic.load(path)


def test_akin_names_exist_and_never_meet():
  names = set().union(*synthetic.AKIN)
  assert names <= set(world())
  groups = collections.defaultdict(set)
  titles = {t.lower(): d.id for d in world().values() for t in d.titles}
  pattern = re.compile(rf"\b({'|'.join(map(re.escape, titles))})\b")
  for row in labelled(train_rows()):
    found = pattern.findall(row["spec"].lower())
    groups[row["family"]] |= {titles[t] for t in found}
    response = read_response(row["messages"][-1]["content"])
    groups[row["family"]] |= {name for name, *_ in response}
  assert groups
  for members in groups.values():
    for akin in synthetic.AKIN:
      assert len(members & akin) <= 1, members


def test_vocabulary_is_the_domains_own():
  owners = collections.Counter(
    w.lower() for d in world().values() for w in d.vocabulary
  )
  assert [w for w, n in owners.items() if n > 1] == []
  for domain in world().values():
    own = set(words(" ".join(all_texts(domain))))
    dead = [v for v in domain.vocabulary if not set(words(v)) <= own]
    assert dead == [], domain.id


# --- Rows ---


def test_arguments_are_checked():
  with pytest.raises(ValueError, match="split='test'"):
    next(rows(split="test", families=1, seed=0))
  with pytest.raises(ValueError, match="max_rules=1"):
    next(rows(split="train", families=1, seed=0, max_rules=1))
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
  assert len(by_kind) == len(synthetic.KINDS)
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


# --- Held back, unseen ---


def _assistant_texts(some) -> set[str]:
  return {r["messages"][-1]["content"] for r in labelled(some)}


def _held_back(domain: synthetic.Domain) -> set[str]:
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


def test_unseen_rule_texts_are_new():
  train = {t.lower() for d in of_split("train") for t in d.rule_texts()}
  new = {t.lower() for d in of_split("unseen") for t in d.rule_texts()}
  assert not train & new
  titles = [
    {w for d in of_split(s) for t in d.titles for w in words(t)} - COMMON
    for s in ("train", "unseen")
  ]
  assert titles[0] & titles[1] == set()


def test_unseen_vocabulary_never_occurs_in_training():
  train = {w for d in of_split("train") for t in all_texts(d) for w in words(t)}
  for domain in of_split("unseen"):
    shared = [v for v in domain.vocabulary if set(words(v)) & train]
    assert shared == [], domain.id


def test_unseen_fillers_are_new():
  train, new = (
    {f.lower() for d in of_split(s) for v in d.slots.values() for f in v}
    for s in ("train", "unseen")
  )
  assert not train & new


def test_unseen_templates_share_no_phrase():
  """Four words in a row, unless all four are words of any conversation."""

  def phrases(split: str) -> dict[tuple[str, ...], str]:
    out = {}
    for domain in of_split(split):
      for key, texts in domain.templates().items():
        for text in texts:
          tokens = words(text)
          for i in range(len(tokens) - 3):
            gram = tuple(tokens[i : i + 4])
            if not COMMON.issuperset(gram) and "{" not in "".join(gram):
              out[gram] = f"{domain.id}.{key}"
    return out

  train, new = phrases("train"), phrases("unseen")
  shared = {" ".join(g): (train[g], new[g]) for g in set(train) & set(new)}
  assert shared == {}


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
    if row["edit"] in synthetic.KINDS:
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
  assert edits == kept | set(synthetic.KINDS)


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
  vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
  model = LogisticRegression(C=10.0, max_iter=300)
  model.fit(
    vectors.fit_transform(map(VIEWS[view], train)), [r["label"] for r in train]
  )
  scores = model.decision_function(vectors.transform(map(VIEWS[view], test)))
  auroc = roc_auc_score([r["label"] for r in test], scores)
  assert auroc < 0.65
