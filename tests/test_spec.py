"""Spec: reading, errors, text, meaning; and the spec files we ship."""

import copy
import hashlib
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csrm_jax.spec import EMPTY_TEXT, Rule, Spec, Subcategory, complies

# Those of `specs/align` are as short as a first alignment run wants them.
SPECS = sorted(
  path
  for path in (pathlib.Path(__file__).parent.parent / "specs").iterdir()
  if path.is_file()
)

ALCOHOL = {
  "id": "alcohol",
  "title": "Alcohol",
  "polarity": "forbid",
  "level": 3,
  "subcategories": [
    {"id": "minors", "title": "helping minors get alcohol", "severity": 4},
    {"id": "heavy", "title": "encouraging heavy drinking", "severity": 3},
    {"id": "cooking", "title": "cooking with wine", "severity": 1},
  ],
}
DOSE = {"id": "dose", "polarity": "allow", "guideline": "naming a dose"}
LAW = {
  "id": "law",
  "title": "Answering",
  "polarity": "require",
  "guideline": "answer questions about published law",
  "response_type": "comply",
}

# -- Text -----------------------------------------------------------------


def test_rendered_text():
  spec = Spec.parse({"rules": [ALCOHOL, DOSE, LAW]})
  assert spec.render() == (
    "S1: Alcohol. Disallowed: helping minors get alcohol; encouraging heavy "
    "drinking. Allowed: cooking with wine.\n"
    "S2: Allowed: naming a dose.\n"
    "S3: Answering. Required: answer questions about published law."
  )
  digest = hashlib.sha256(spec.render().encode()).hexdigest()
  assert spec.fingerprint() == "sha256:" + digest


@pytest.mark.parametrize(
  ("rule", "text"),
  [
    ({"polarity": "forbid", "guideline": "insults."}, "Disallowed: insults."),
    ({"polarity": "forbid", "title": "Insults"}, "Disallowed: Insults."),
    (
      {"polarity": "forbid", "title": "Tone", "guideline": "in\nsults"},
      "Tone. Disallowed: in sults.",
    ),
    (
      {"polarity": "forbid", "guideline": "slurs", "response_type": "hard"},
      "Disallowed: slurs. Response: refuse briefly.",
    ),
    (
      {"polarity": "allow", "subcategories": [{"id": "a", "title": "wine"}]},
      "Allowed: wine.",
    ),
    (
      {**ALCOHOL, "level": 9},
      "Alcohol. Allowed: helping minors get alcohol; encouraging heavy "
      "drinking; cooking with wine.",
    ),
    (
      {**ALCOHOL, "level": None, "guideline": "Sober"},
      "Alcohol. Sober. Disallowed: helping minors get alcohol; encouraging "
      "heavy drinking; cooking with wine.",
    ),
  ],
)
def test_rendered_rule(rule, text):
  assert Spec.parse({"rules": [{"id": "x", **rule}]}).render() == f"S1: {text}"


def test_plain_text_renders_verbatim():
  for text in (" Be kind.\n\n- No gambling\n", "rules:\n- id: a", "{}", "x"):
    spec = Spec.parse(text)
    assert spec.render() == text
    assert spec.rules == ()


def test_empty_spec_says_that_all_is_allowed():
  assert Spec().render() == EMPTY_TEXT
  assert complies(Spec(), {"anything": 1}) == 1


def test_keep_numbers_anew():
  spec = Spec.parse({"rules": [ALCOHOL, DOSE, LAW]})
  kept = spec.keep([2, 1])
  assert [r.id for r in kept.rules] == ["dose", "law"]
  assert kept.render().startswith("S1: Allowed: naming a dose.\nS2: ")
  # A text of rendered rules is cut in the same way; other text keeps its lines.
  assert Spec.parse(spec.render()).keep([1, 2]).render() == kept.render()
  assert Spec.parse("a\nb\nc").keep([0, 2]).render() == "a\nc"


def test_frozen_and_hashable():
  spec = Spec.parse({"rules": [ALCOHOL]})
  with pytest.raises(ValueError, match="frozen"):
    spec.rules = ()  # type: ignore[misc]
  assert hash(spec) == hash(Spec.parse({"rules": [ALCOHOL]}))


# -- Properties -----------------------------------------------------------

words = st.text(
  st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")),
  min_size=1,
  max_size=12,
).filter(lambda s: s.strip())
KEYS = ("a", "b", "c", "d")


@st.composite
def rules(draw, polarities=("forbid", "allow", "require"), levels=True):
  polarity = draw(st.sampled_from(polarities))
  ids = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
  subcategories = tuple(
    Subcategory(id=i, title=draw(words), severity=draw(st.integers(1, 5)))
    for i in ids
  )
  level = None
  if levels and polarity == "forbid" and subcategories:
    level = draw(st.none() | st.integers(1, 6))
  return {
    "title": draw(words),
    "guideline": draw(st.just("") | words),
    "polarity": polarity,
    "level": level,
    "subcategories": subcategories,
    "response_type": draw(st.sampled_from((None, "comply", "hard", "soft"))),
    "domain": draw(st.sampled_from(("", "w"))),
  }


@st.composite
def specs(draw, **options):
  made = draw(st.lists(rules(**options), max_size=4))
  return Spec(
    rules=tuple(Rule(id=f"r{i}", **rule) for i, rule in enumerate(made)),
    domain=draw(st.just("") | words),
    version=draw(st.just("") | words),
  )


truths = st.dictionaries(
  st.sampled_from((*KEYS, "w.a", "r0.b", "w", "r1")),
  st.sampled_from((0, 1, None)),
)


@given(specs())
def test_round_trip(spec):
  assert Spec.parse(spec.model_dump()) == spec
  assert Spec.parse(json.loads(spec.model_dump_json())) == spec
  assert Spec.parse(spec) is spec


@given(words)
def test_text_round_trip(text):
  spec = Spec.parse(text)
  assert spec.render() == text
  assert Spec.parse(spec.model_dump()) == spec


@given(specs())
def test_one_line_a_rule(spec):
  lines = spec.render().splitlines() if not spec.rules else spec.lines()
  if spec.rules:
    assert spec.render().count("\n") == len(spec.rules) - 1
    assert [line.split(":")[0] for line in lines] == [
      f"S{i}" for i in range(1, len(spec.rules) + 1)
    ]


ORDER = {0: 0, -1: 1, 1: 2}


@given(
  specs(levels=False),
  rules(polarities=("forbid", "require"), levels=False),
  truths,
  st.sampled_from((0, 1, None)),
)
def test_a_stricter_spec_never_raises_the_label(spec, rule, violated, refusal):
  """Adding a rule without exceptions can only lower 1 > unknown > 0."""
  stricter = Spec(rules=(*spec.rules, Rule(id="new", **rule)))
  before = complies(spec, violated, refusal=refusal)
  after = complies(stricter, violated, refusal=refusal)
  assert ORDER[after] <= ORDER[before]


@given(
  rules(polarities=("forbid",)).filter(lambda r: r["level"]),
  truths,
  st.integers(1, 6),
)
def test_a_lower_level_never_raises_the_label(rule, violated, step):
  """The ladder: forbidding milder grades too is stricter."""
  stricter = {**rule, "level": max(1, rule["level"] - step)}
  before, after = (
    complies(Spec(rules=(Rule(id="r0", **r),)), violated, missing=0)
    for r in (rule, stricter)
  )
  assert ORDER[after] <= ORDER[before]


@given(specs(), truths, st.sampled_from((0, 1, None)))
def test_knowing_more_never_contradicts(spec, violated, refusal):
  """Filling in an unknown keeps a known verdict."""
  before = complies(spec, violated, refusal=refusal)
  for key, value in violated.items():
    if value is None and before != -1:
      for new in (0, 1):
        known = {**violated, key: new}
        assert complies(spec, known, refusal=refusal) == before


@given(specs(), truths)
@settings(max_examples=50)
def test_order_of_rules_does_not_matter(spec, violated):
  turned = Spec(rules=spec.rules[::-1])
  assert complies(spec, violated) == complies(turned, violated)


@given(specs(polarities=("forbid",), levels=False))
def test_a_clean_response_complies(spec):
  assert complies(spec, {}, missing=0) == 1


# -- Meaning --------------------------------------------------------------


def _spec(*rules):
  return Spec.parse(list(rules))


@pytest.mark.parametrize(
  ("violated", "label"),
  [
    ({"minors": 1, "heavy": 0}, 0),
    ({"alcohol.minors": 1, "heavy": None}, 0),
    ({"minors": 0, "heavy": None}, -1),
    ({"minors": 0}, -1),  # nobody looked for heavy drinking
    ({"minors": 0, "heavy": 0, "cooking": 1}, 1),
    ({"minors": 0, "heavy": 0, "other.thing": 1}, 1),
    ({"minors": 0, "heavy": 0, "alcohol": 1}, -1),  # which of the three?
  ],
)
def test_levels(violated, label):
  assert complies(_spec(ALCOHOL), violated) == label


def test_missing_keys():
  assert complies(_spec(ALCOHOL), {}) == -1
  assert complies(_spec(ALCOHOL), {}, missing=0) == 1
  assert complies(_spec(ALCOHOL), {}, missing=1) == 0


def test_breadth_decides_between_forbid_and_allow():
  broad = {"id": "all", "polarity": "forbid", "guideline": "alcohol"}
  broad["domain"] = "alcohol"
  narrow = {
    "id": "some",
    "domain": "alcohol",
    "polarity": "allow",
    "subcategories": [{"id": "cooking", "title": "cooking with wine"}],
  }
  cooking = {"alcohol.cooking": 1, "alcohol.heavy": 0}
  heavy = {"alcohol.cooking": 0, "alcohol.heavy": 1}
  assert complies(_spec(broad), cooking) == 0
  assert complies(_spec(broad, narrow), cooking) == 1
  assert complies(_spec(broad, narrow), heavy) == 0
  # A narrow prohibition wins over a broad permission.
  allow_all = {**broad, "polarity": "allow"}
  assert complies(_spec(allow_all), heavy) == 1
  assert complies(_spec(allow_all, ALCOHOL), {**heavy, "minors": 0}) == 0


def test_contradiction_is_unknown():
  forbid = {"id": "f", "domain": "x", "polarity": "forbid", "guideline": "g"}
  allow = {**forbid, "id": "a", "polarity": "allow"}
  assert complies(_spec(forbid, allow), {"x": 1}) == -1
  assert complies(_spec(forbid, allow), {"x": 0}) == 1
  # A certain violation decides, whatever is contradictory beside it.
  other = {"id": "o", "polarity": "forbid", "guideline": "other"}
  assert complies(_spec(forbid, allow, other), {"x": 1, "o": 1}) == 0


@pytest.mark.parametrize(
  ("response_type", "violated", "refusal", "label"),
  [
    ("comply", {}, 1, 0),
    ("comply", {}, 0, 1),
    ("comply", {}, None, -1),
    ("comply", {"law": 0}, 1, 1),  # did not apply: the annotation wins
    ("comply", {"law": 1}, 0, 0),
    ("hard", {}, 0, 0),
    ("soft", {}, 1, 1),
    (None, {}, 0, -1),
    (None, {"law": 1}, None, 0),
  ],
)
def test_requirements(response_type, violated, refusal, label):
  spec = _spec({**LAW, "response_type": response_type})
  assert complies(spec, violated, refusal=refusal) == label


def test_nothing_is_known_of_a_plain_text():
  assert complies(Spec.parse("Be kind."), {"a": 1}) == -1


# -- Errors ---------------------------------------------------------------


def _broken(**changes):
  rule = copy.deepcopy(ALCOHOL) | changes
  return {"rules": [DOSE, {k: v for k, v in rule.items() if v != "DROP"}]}


@pytest.mark.parametrize(
  ("source", "message"),
  [
    (
      _broken(polarity="forbidden"),
      r"rule 2 \('alcohol'\): field 'polarity': 'forbidden': must be 'forbid'",
    ),
    (_broken(polarity="DROP"), "field 'polarity': missing: add it"),
    (_broken(id="dose"), r"field 'rules': id 'dose' occurs 2 times; make ids"),
    (_broken(id=7), r"rule 2 \(7\): field 'id': 7: must be text: put it in"),
    (_broken(id=""), "field 'id': '': must not be empty"),
    (_broken(levle=2), "field 'levle': 2: unknown key: remove it or correct"),
    (_broken(level=0), "field 'level': 0: must be at least 1"),
    (_broken(level="3"), "field 'level': '3': must be a whole number"),
    (
      _broken(subcategories=[]),
      r"\('alcohol'\): field 'level': 3 without subcategories; list them",
    ),
    (
      _broken(polarity="allow"),
      "field 'level': 3 with polarity 'allow'; only a forbid rule has a level",
    ),
    (
      _broken(subcategories=[{"id": "m", "title": "t", "severity": 0}]),
      r"subcategory 1 \('m'\): field 'severity': 0: must be at least 1",
    ),
    (
      _broken(subcategories=[{"id": "m", "title": "t", "severity": True}]),
      "field 'severity': True: must be a whole number",
    ),
    (
      _broken(subcategories=[{"id": "m", "title": "t"}] * 2),
      "field 'subcategories': id 'm' occurs 2 times",
    ),
    (_broken(subcategories="none"), "field 'subcategories': 'none': must be a"),
    (_broken(response_type="kind"), "field 'response_type': 'kind': must be"),
    (
      {"rules": [{"id": "a", "polarity": "forbid"}]},
      r"rule 1 \('a'\): field 'guideline': '' says nothing; give a title",
    ),
    ({"rules": ["no gambling"]}, "rule 1: 'no gambling': must be an object"),
    ({"rules": 3}, "field 'rules': 3: must be a list"),
    ({"rule": []}, r"field 'rules' is missing \(keys found: rule\)"),
    (
      {"rules": [DOSE], "text": "x"},
      "field 'text': 'x' beside rules; keep one",
    ),
    ({"rules": [DOSE], "owner": "me"}, "field 'owner': 'me': unknown key"),
    (" \n", "empty spec; write at least one rule"),
    (5, "5 is no spec; give text, a list of rules or an object"),
  ],
)
def test_errors_name_rule_field_value_remedy(source, message):
  with pytest.raises(ValueError, match=message) as caught:
    Spec.parse(source, origin="my.yaml")
  assert str(caught.value).startswith("my.yaml:")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("s.yaml", b"", "empty spec file; write at least one rule"),
    ("s.md", b" \n\n", "empty spec file"),
    ("s.yaml", b"rules: []", "field 'rules': empty; write at least one rule"),
    ("s.txt", b"caf\xe9", "byte 3 is not UTF-8; save the file as UTF-8"),
    ("s.yaml", b"rules:\n- id: [", "line 2: not YAML: "),
    (
      "s.yaml",
      b"rules:\n- id: a\n  id: b",
      "line 3: not YAML: key 'id' occurs",
    ),
    ("s.yaml", b"rules:\n- id: no\n", r"rule 1: field 'id': False: must be"),
    ("s.json", b'{"rules": [', "not YAML"),
    ("s.yaml", b"- [a, b]", "rule 1: "),
    (
      "s.md",
      b"## A\nDisallowed:\n- x (severity 1)\nAllowed:\n- y (severity 2)\n",
      "rule 'A': field 'severity': 2 is allowed but 1 is disallowed",
    ),
  ],
)
def test_errors_of_files(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    Spec.read(path)
  assert str(caught.value).startswith(str(path))


def test_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"missing\.yaml: No such file"):
    Spec.read(tmp_path / "missing.yaml")
  with pytest.raises(ValueError, match="Is a directory"):
    Spec.read(tmp_path)


# -- Files ----------------------------------------------------------------


def test_yaml_json_and_crlf_agree(tmp_path):
  (tmp_path / "s.json").write_text(json.dumps({"rules": [DOSE]}))
  (tmp_path / "s.yaml").write_bytes(
    b"\xef\xbb\xbf- id: dose\r\n  polarity: allow\r\n"
    b"  guideline: naming a dose\r\n"
  )
  one, two = Spec.read(tmp_path / "s.json"), Spec.read(tmp_path / "s.yaml")
  assert one == two
  assert one.spec_id == "s"


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_our_spec_files(path):
  spec = Spec.read(path)
  text = spec.render()
  assert spec.spec_id == path.stem
  assert 200 < len(text) < 900  # characters: at most about 200 tokens
  if path.suffix == ".txt":
    assert text == path.read_text().strip()
    return
  assert len(spec.rules) >= 3
  assert sum(bool(r.subcategories) for r in spec.rules) >= 2
  assert len({r.polarity for r in spec.rules}) >= 2
  if path.suffix == ".yaml":
    assert any(r.level for r in spec.rules)
  everything = {
    f"{r.domain or r.id}.{s.id}": 1 for r in spec.rules for s in r.subcategories
  }
  assert complies(spec, everything, refusal=0, missing=0) == 0
  assert complies(spec, {}, refusal=0, missing=0) == 1


def test_enough_spec_files():
  assert sum(p.suffix == ".yaml" for p in SPECS) >= 12
  assert {".md", ".txt"} <= {p.suffix for p in SPECS}
  assert len({Spec.read(p).fingerprint() for p in SPECS}) == len(SPECS)
