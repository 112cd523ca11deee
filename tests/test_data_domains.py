"""The files of the synthetic world are valid, and unseen means unseen."""

import collections
import random
import re
from pathlib import Path

import pytest
import yaml

from csrm_jax.data import domains
from csrm_jax.data.domains import AKIN, world

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


def of_split(*splits: str) -> list[domains.Domain]:
  return [d for d in world().values() if d.split in splits]


TRAINED = ("train", "wide")


def all_texts(domain: domains.Domain) -> list[str]:
  fillers = [f for v in domain.slots.values() for f in v]
  templates = [t for v in domain.templates().values() for t in v]
  return [*domain.rule_texts(), *templates, *fillers]


def test_world_is_large_enough():
  assert len(of_split("train")) >= 10
  assert len(of_split("unseen")) >= 10
  assert len(of_split(*TRAINED)) == 48
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
  text = (domains.WORLD / "alcohol.yaml").read_text(encoding="utf-8")
  domain = yaml.safe_load(text)
  for grade in domain["grades"]:
    grade["responses"] = grade["responses"][:8]
  path = tmp_path / "alcohol.yaml"
  path.write_text(yaml.safe_dump(domain), encoding="utf-8")
  assert domains.load(path).id == "alcohol"

  BREAKAGES[key](domain)
  path.write_text(yaml.safe_dump(domain), encoding="utf-8")
  with pytest.raises(ValueError, match=rf"alcohol\.yaml: {key}"):
    domains.load(path)


def test_not_yaml_is_named(tmp_path: Path):
  path = tmp_path / "alcohol.yaml"
  path.write_text("id: [alcohol", encoding="utf-8")
  with pytest.raises(ValueError, match=r"alcohol\.yaml: not YAML"):
    domains.load(path)


@pytest.mark.parametrize("split", TRAINED)
def test_akin_names_exist(split: str):
  assert set().union(*AKIN) <= set(world())
  source = domains.pool(split)
  for seed in range(200):
    chosen = {d.id for d in source.choose(random.Random(seed))}
    assert len(chosen) == 6
    assert all(len(chosen & akin) <= 1 for akin in AKIN)


def test_vocabulary_is_the_domains_own():
  owners = collections.Counter(
    w.lower() for d in world().values() for w in d.vocabulary
  )
  assert [w for w, n in owners.items() if n > 1] == []
  for domain in world().values():
    own = set(words(" ".join(all_texts(domain))))
    dead = [v for v in domain.vocabulary if not set(words(v)) <= own]
    assert dead == [], domain.id


def test_unseen_rule_texts_are_new():
  train = {t.lower() for d in of_split(*TRAINED) for t in d.rule_texts()}
  new = {t.lower() for d in of_split("unseen") for t in d.rule_texts()}
  assert not train & new
  titles = [
    {w for d in of_split(*s) for t in d.titles for w in words(t)} - COMMON
    for s in (TRAINED, ("unseen",))
  ]
  assert titles[0] & titles[1] == set()


def test_unseen_vocabulary_never_occurs_in_training():
  train = {
    w for d in of_split(*TRAINED) for t in all_texts(d) for w in words(t)
  }
  for domain in of_split("unseen"):
    shared = [v for v in domain.vocabulary if set(words(v)) & train]
    assert shared == [], domain.id


def test_unseen_fillers_are_new():
  train, new = (
    {f.lower() for d in of_split(*s) for v in d.slots.values() for f in v}
    for s in (TRAINED, ("unseen",))
  )
  assert not train & new


def test_unseen_templates_share_no_phrase():
  """Four words in a row, unless all four are words of any conversation."""

  def phrases(*splits: str) -> dict[tuple[str, ...], str]:
    out = {}
    for domain in of_split(*splits):
      for key, texts in domain.templates().items():
        for text in texts:
          tokens = words(text)
          for i in range(len(tokens) - 3):
            gram = tuple(tokens[i : i + 4])
            if not COMMON.issuperset(gram) and "{" not in "".join(gram):
              out[gram] = f"{domain.id}.{key}"
    return out

  train, new = phrases(*TRAINED), phrases("unseen")
  shared = {" ".join(g): (train[g], new[g]) for g in set(train) & set(new)}
  assert shared == {}
