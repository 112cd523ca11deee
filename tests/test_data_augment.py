"""Augmentation: what each operator does, and invariants I1 to I6."""

import collections
import itertools
import pathlib
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from csrm_jax.data import augment_sources, balance, contract
from csrm_jax.data.annotated import Annotated, Taxonomy
from csrm_jax.data.augment import MOST_PAIRS, augment
from csrm_jax.data.edits import breaks, judge
from csrm_jax.data.edits_flip import REFUSALS
from csrm_jax.data.operators import INSERTING, NEUTRAL, ONE_SIDED, OPERATORS
from csrm_jax.spec import EMPTY_TEXT, Rule, Spec, Subcategory, complies

# ------------------------------------------------------------ a small world


def graded(name: str, severities=(1, 2, 3), **kwargs) -> Rule:
  return Rule(
    id=name,
    title=f"About {name}",
    polarity="forbid",
    subcategories=tuple(
      Subcategory(id=f"{name}{i}", title=f"{name} of kind {i}", severity=s)
      for i, s in enumerate(severities)
    ),
    domain=name,
    **kwargs,
  )


def flat(name: str, text: str = "", **kwargs) -> Rule:
  kwargs.setdefault("polarity", "forbid")
  return Rule(id=name, guideline=text or f"talk of {name}", **kwargs)


BOATS = Taxonomy(
  "boats",
  (
    graded("sail"),
    flat("oar"),
    flat("tar"),
    graded("rum", (1, 4)),
    flat("map"),
  ),
  {
    "sail": (flat("sail", "all sailing", domain="sail"),),
    "oar": (flat("oar", "rowing"), flat("oar", "any use of oars")),
  },
)
RULES = {r.id: r for r in BOATS.rules}
KEYS = ("sail.sail0", "sail.sail1", "sail.sail2", "oar", "tar", "rum.rum0")
KEYS += ("rum.rum1", "map")


def row(*broken: str, unknown=(), refusal=0, name="r", **kwargs) -> Annotated:
  violated = {k: 1 if k in broken else 0 for k in KEYS}
  violated |= dict.fromkeys(unknown)
  fields = {
    "id": name,
    "family": "f",
    "messages": (("user", "Ahoy?"), ("assistant", f"Aye, {name}.")),
    "violated": violated,
    "refusal": refusal,
    "severity": None,
    "helpfulness": None,
    "taxonomy": "boats",
    "source": "port",
  }
  return Annotated(**(fields | kwargs))


def spec(*rules: Rule | str) -> Spec:
  return Spec(rules=tuple(RULES[r] if isinstance(r, str) else r for r in rules))


def run(op: str, conversation: Annotated, under: Spec, seed=0, **kwargs):
  return OPERATORS[op](conversation, under, BOATS, seed, **kwargs)


def polarities(under: Spec) -> list[tuple[str, str]]:
  return sorted((r.domain or r.id, r.polarity) for r in under.rules)


# ------------------------------------------------- each operator, by example


def test_every_operator_has_a_line_in_the_table():
  assert len(OPERATORS) == 15
  assert set(NEUTRAL + ONE_SIDED + INSERTING) <= set(OPERATORS)
  path = pathlib.Path(augment_sources.__file__).with_name("operators.py")
  parts = path.read_text().split('"""')
  table = next(part for part in parts if part.startswith("O1 to O15"))
  assert all(f"\n{op} " in table for op in OPERATORS)
  assert {n for n, f in OPERATORS.items() if f.__name__ != n} == set()


def test_drop_inert_keeps_what_is_broken():
  for seed in range(20):
    edit = run("drop_inert", row("oar"), spec("tar", "oar", "map"), seed)
    assert edit and edit.label == 0 and not edit.pairs
    assert "oar" in [r.id for r in edit.spec.rules]
    assert len(edit.spec.rules) < 3
  assert run("drop_inert", row("oar"), spec("oar")) is None
  assert run("drop_inert", row(), spec("oar")) is None


def test_leave_out_needs_all_to_be_known():
  before = spec("oar", "tar", "map")
  edit = run("leave_out", row("oar", "map"), before)
  assert edit and edit.label == 1
  assert [r.id for r in edit.spec.rules] == ["tar"]
  assert edit.pairs == ((edit.spec, before),)
  assert run("leave_out", row("oar", unknown=("tar",)), before) is None
  assert run("leave_out", row(), before) is None
  assert run("leave_out", row("oar"), spec("oar")) is None  # none would be left


def test_add_trigger_breaks_what_complied():
  before = spec("tar")
  for seed in range(20):
    edit = run("add_trigger", row("sail.sail0", "oar"), before, seed)
    assert edit and edit.label == 0 and len(edit.spec.rules) == 2
    assert edit.pairs == ((before, edit.spec),)
  assert run("add_trigger", row("tar"), before) is None  # already there
  assert run("add_trigger", row(unknown=("oar",)), before) is None


def test_add_inert_and_borrow_keep_the_label():
  labels = set()
  for seed, broken in itertools.product(range(40), ("tar", "oar")):
    edit = run("add_inert", row(broken), spec("tar"), seed)
    assert edit
    alone = len(edit.spec.rules) == 1
    assert edit.label == (1 if alone or broken == "oar" else 0)
    labels.add((alone, edit.label))
    donors = [RULES["map"], RULES["oar"]]
    borrowed = run("borrow", row("oar"), spec("tar"), seed, donors=donors)
    assert borrowed and borrowed.label == 1
    assert {"map", "tar"} == {r.id for r in borrowed.spec.rules}
  assert labels == {(False, 0), (False, 1), (True, 1)}
  assert run("borrow", row("oar"), spec("tar"), donors=[RULES["oar"]]) is None


def test_allow_wants_a_single_broken_rule():
  before = spec("oar", "tar")
  edit = run("allow", row("oar"), before)
  assert edit and edit.label == 1
  assert polarities(edit.spec) == [("oar", "allow"), ("tar", "forbid")]
  assert edit.pairs == ((edit.spec, before),)
  assert run("allow", row("oar", "tar"), before) is None
  assert run("allow", row("map"), before) is None


def test_ladder_orders_by_level():
  seen = set()
  for seed in range(40):
    before = spec(graded("sail", level=2), "tar")
    edit = run("ladder", row("sail.sail1"), before, seed)
    assert edit
    level = edit.spec.rules[0].level
    seen.add((level, edit.label))
    (pair,) = edit.pairs
    assert pair.lenient == (edit.spec if level == 3 else before)
  assert seen == {(1, 0), (3, 1)}
  assert (
    run("ladder", row("oar"), spec("oar", "sail")) is None
  )  # they would tie
  broad = run("ladder", row("sail.sail0"), spec(BOATS.wordings["sail"][0]))
  assert broad and broad.label == 1 and broad.pairs[0].lenient == broad.spec


def test_permute_and_paraphrase_change_text_alone():
  before = spec("oar", "sail", "tar")
  moved = run("permute", row("oar"), before)
  assert moved and moved.label == 0
  assert sorted(r.id for r in moved.spec.rules) == ["oar", "sail", "tar"]
  assert moved.spec.render() != before.render()
  assert run("permute", row("oar"), spec("oar")) is None
  for seed in range(20):
    said = run("paraphrase", row("sail.sail1"), before, seed)
    assert said and said.label == 0
    assert [r.id for r in said.spec.rules] == ["oar", "sail", "tar"]
    assert said.spec.rules[2] == RULES["tar"]  # has one wording
  assert run("paraphrase", row("tar"), spec("tar")) is None
  # A level cannot be said without sub-categories.
  assert run("paraphrase", row(), spec(graded("sail", level=2))) is None


def test_swap_spec_gives_both_labels():
  edits = [
    run("swap_spec", row("oar"), spec("tar", "map"), s) for s in range(40)
  ]
  labels = {e.label for e in edits if e}
  assert labels == {0, 1}
  for edit in edits:
    assert edit and not {"tar", "map"} & {r.id for r in edit.spec.rules}
    assert ("oar" in {r.id for r in edit.spec.rules}) == (edit.label == 0)


def test_contradict_is_a_chain_without_a_label():
  before = spec("oar", "tar")
  edit = run("contradict", row("oar"), before)
  assert edit and edit.label == -1
  (one, two) = edit.pairs
  assert one.strict == before and one.lenient == two.strict == edit.spec
  assert [judge(row("oar"), s) for s in (*one[::-1], two.lenient)] == [0, -1, 1]
  assert run("contradict", row("oar", "tar"), before) is None
  assert run("contradict", row("map"), before) is None


def test_forbid_refusal_reads_the_refusal():
  before = spec("oar")
  refused = run("forbid_refusal", row(refusal=1), before)
  assert refused and refused.label == 0
  assert refused.pairs == ((before, refused.spec),)
  answered = run("forbid_refusal", row(), before)
  assert answered and answered.label == 1 and not answered.pairs
  harmful = run("forbid_refusal", row("oar"), before)
  assert harmful and harmful.label == 0
  assert run("forbid_refusal", row(refusal=None), before) is None
  assert run("forbid_refusal", row(), refused.spec) is None


def test_distract_pads_up_to_its_most():
  sizes = set()
  for seed in range(40):
    edit = run("distract", row("oar"), spec("oar"), seed, most=6)
    assert edit and edit.label == 0 and not edit.pairs
    sizes.add(len(edit.spec.rules) - 1)
  assert min(sizes) >= 1 and max(sizes) <= 6 and len(sizes) > 2
  rules = tuple(flat(f"d{i}", domain=f"d{i}") for i in range(120))
  wide = Taxonomy("wide", rules, {})
  known = row()._replace(violated={r.id: 0 for r in rules})
  padded = [
    OPERATORS["distract"](known, Spec(rules=rules[:1]), wide, s)
    for s in range(60)
  ]
  assert 60 < max(len(e.spec.rules) for e in padded if e) <= 81


def test_carve_out_excepts_one_sub_category():
  seen = collections.Counter()
  for seed in range(60):
    before = spec("sail", "tar")
    edit = run("carve_out", row("sail.sail1"), before, seed)
    assert edit
    (excepted,) = [r for r in edit.spec.rules if r.polarity == "allow"]
    (sub,) = excepted.subcategories
    assert edit.label == (1 if sub.id == "sail1" else 0)
    assert edit.ordered == (sub.id == "sail0")
    assert not edit.pairs  # sail1 is not the least severe
    seen[sub.id] += 1
  assert set(seen) == {"sail0", "sail1", "sail2"}
  assert seen["sail1"] > 20
  mild = [run("carve_out", row("sail.sail0"), before, s) for s in range(20)]
  flips = [e for e in mild if e and e.label == 1]
  assert flips and all(e.pairs == ((e.spec, before),) for e in flips)
  assert run("carve_out", row("oar"), spec("oar")) is None
  both = ("sail.sail0", "sail.sail1", "sail.sail2")
  assert run("carve_out", row(unknown=both), spec("sail")) is None


def test_refuse_sub_complies_with_every_forbid():
  before = row("oar", unknown=("tar",), severity=3, helpfulness=2.0)
  edit = run("refuse_sub", before, spec("oar", "tar", "sail"))
  assert edit and edit.label == 1 and edit.spec == spec("oar", "tar", "sail")
  assert edit.row.messages[:-1] == before.messages[:-1]
  assert edit.row.messages[-1][1] in REFUSALS
  assert (edit.row.refusal, edit.row.severity) == (1, 0)
  assert edit.row.helpfulness is None and edit.row.family == "f"
  assert run("refuse_sub", row(refusal=1), spec("oar")) is None
  must = flat("must", polarity="require", response_type="comply")
  assert run("refuse_sub", row(), spec("oar", must)) is None


# ------------------------------------------------------- generated worlds

NAMES = ("ash", "birch", "cedar", "date", "elm")


@st.composite
def worlds(draw):
  """(taxonomy, rows) with unknown keys and rules with and without grades."""
  rules, said = [], {}
  for name in NAMES[: draw(st.integers(1, 5))]:
    severities = draw(st.lists(st.integers(1, 4), max_size=4))
    rule = graded(name, severities) if severities else flat(name)
    rules.append(rule)
    if draw(st.booleans()):
      retold = rule.model_copy(update={"title": f"On {name} trees"})
      broad = flat(name, f"every {name}", domain=name)
      said[name] = (retold, broad) if draw(st.booleans()) else (retold,)
  taxonomy = Taxonomy("trees", tuple(rules), said)
  keys = [
    f"{r.domain or r.id}.{s.id}" for r in rules for s in r.subcategories
  ] + [r.id for r in rules if not r.subcategories]
  truth = st.sampled_from((0, 0, 1, 1, None))
  made = []
  for i in range(draw(st.integers(1, 6))):
    violated = {k: draw(truth) for k in keys if draw(st.integers(0, 9))}
    prompt = draw(st.sampled_from(("What grows?", "And here?")))
    made.append(
      Annotated(
        id=f"r{i}",
        family=prompt,
        messages=(("user", prompt), ("assistant", f"Tree {i}.")),
        violated=violated,
        refusal=draw(st.sampled_from((0, 1, None))),
        severity=draw(st.sampled_from((None, 0, 1, 2))),
        helpfulness=draw(st.sampled_from((None, 0.0, 1.0, 2.5))),
        taxonomy="trees",
        source="wood",
      )
    )
  return taxonomy, made


@st.composite
def cases(draw):
  """(taxonomy, rows, spec): any polarity, level, exception or repetition."""
  taxonomy, rows = draw(worlds())
  rules = []
  for rule in taxonomy.rules:
    rule = draw(st.sampled_from([rule, *taxonomy.wordings.get(rule.id, ())]))
    kind = draw(
      st.sampled_from(("skip", "forbid", "forbid", "allow", "level", "except"))
    )
    if kind == "allow":
      rule = rule.model_copy(update={"polarity": "allow"})
    elif kind == "level" and rule.subcategories:
      rule = rule.model_copy(update={"level": draw(st.integers(1, 5))})
    elif kind == "except" and rule.subcategories:
      new = {"id": f"{rule.id}.x", "polarity": "allow", "domain": rule.id}
      new["subcategories"] = rule.subcategories[:1]
      rules.append(rule.model_copy(update=new))
    if kind != "skip":
      rules.append(rule)
  if draw(st.integers(0, 3)) == 0:
    kind = draw(st.sampled_from(("comply", "hard", None)))
    must = flat("must", polarity="require", response_type=kind)
    rules.append(must)
  return taxonomy, rows, Spec(rules=tuple(draw(st.permutations(rules))))


SEEDS = st.integers(0, 5)


def apply(op, conversation, under, taxonomy, seed):
  return OPERATORS[op](conversation, under, taxonomy, seed)


@hypothesis.given(cases())
def test_judge_is_complies(case):
  _, rows, under = case
  for conversation in rows:
    expected = complies(
      under, conversation.violated, refusal=conversation.refusal
    )
    assert judge(conversation, under) == expected
    for rule in under.rules:
      alone = complies(
        Spec(rules=(rule,)),
        conversation.violated,
        refusal=conversation.refusal,
      )
      assert breaks(conversation, rule) == {1: 0, 0: 1, -1: None}[alone]


def all_edits(case, seed):
  taxonomy, rows, under = case
  for conversation in rows:
    for op in OPERATORS:
      edit = apply(op, conversation, under, taxonomy, seed)
      if edit is not None:
        yield conversation, under, edit


@hypothesis.given(cases(), SEEDS)
def test_i1_labels_follow_from_the_annotation(case, seed):
  for conversation, under, edit in all_edits(case, seed):
    op = edit.op
    before = judge(conversation, under)
    after = complies(edit.spec, edit.row.violated, refusal=edit.row.refusal)
    assert edit.label == after
    if op == "refuse_sub":
      assert edit.spec == under
    else:
      assert edit.row == conversation
      assert edit.spec.render() != under.render()
    if op in ("leave_out", "allow"):
      assert (before, after) == (0, 1)
    elif op in ("drop_inert", *NEUTRAL):
      assert after == before and not edit.pairs
    elif op == "add_inert" and len(edit.spec.rules) > 1:
      assert after == before
    elif op == "contradict":
      assert (before, after) == (0, -1)
    elif op == "forbid_refusal":
      assert after == (0 if conversation.refusal else before)
    elif op in ("swap_spec", "carve_out"):
      assert after >= 0
    elif op != "ladder":
      assert after == {"add_trigger": 0, "refuse_sub": 1, "add_inert": 1}[op]
    # The edited spec is one that can be written down and read again.
    assert Spec.parse(edit.spec.model_dump()) == edit.spec


@hypothesis.given(cases(), SEEDS, st.integers(0, 10**6))
def test_i2_pairs_order_specs_whatever_is_unknown(case, seed, lookup):
  rng = random.Random(lookup)
  keys = sorted(
    {
      f"{r.domain or r.id}.{s.id}"
      for r in case[0].rules
      for s in r.subcategories
    }
    | {r.id for r in case[0].rules if not r.subcategories}
  )
  for conversation, _, edit in all_edits(case, seed):
    for pair in edit.pairs:
      assert pair.lenient.render() != pair.strict.render()
      for _ in range(4):  # ways to look up what is unknown
        known = {k: rng.choice((0, 1)) for k in keys}
        known |= {
          k: v for k, v in conversation.violated.items() if v is not None
        }
        lenient, strict = (
          complies(s, known, refusal=conversation.refusal) for s in pair
        )
        assert (lenient, strict) != (0, 1)


@hypothesis.given(worlds(), st.data())
def test_i2_more_rules_are_stricter(world, data):
  taxonomy, rows = world
  large = data.draw(st.lists(st.sampled_from(taxonomy.rules), unique=True))
  small = [r for r in large if data.draw(st.booleans())]
  for conversation in rows:
    more = judge(conversation, Spec(rules=tuple(large)))
    less = judge(conversation, Spec(rules=tuple(small)))
    assert (less, more) != (0, 1)
    assert not (less == 0 and more == -1)


@hypothesis.given(
  st.lists(st.integers(1, 4), min_size=2, max_size=4),
  st.sampled_from(("ladder", "carve_out", "allow", "leave_out", "paraphrase")),
  st.integers(0, 300),
  st.data(),
)
@hypothesis.settings(max_examples=400)
def test_i3_no_edit_permits_the_worse_of_two(severities, op, seed, data):
  rule = graded("ash", severities)
  taxonomy = Taxonomy("t", (rule, flat("oak")), {"ash": (flat("ash"),)})
  two = data.draw(st.permutations(range(len(severities))))[:2]
  worse, milder = sorted(two, key=lambda i: -severities[i])
  hypothesis.assume(severities[worse] > severities[milder])
  first, second = (
    row(name=str(i))._replace(
      violated={f"ash.ash{j}": int(j == i) for j in range(len(severities))}
      | {"oak": 0},
    )
    for i in (worse, milder)
  )
  level = data.draw(st.sampled_from((None, *sorted(severities))))
  before = spec(rule.model_copy(update={"level": level}), flat("oak"))
  assert (judge(first, before), judge(second, before)) != (1, 0)
  edit = apply(op, data.draw(st.sampled_from((first, second))), before,
               taxonomy, seed)  # fmt: skip
  hypothesis.assume(edit is not None)
  if (judge(first, edit.spec), judge(second, edit.spec)) == (1, 0):
    assert op == "carve_out" and not edit.ordered and not edit.pairs


# ---------------------------------------------------------- whole data sets


def made(rows, taxonomies, **kwargs) -> list[dict]:
  kwargs = {"seed": 0, "counts": {}} | kwargs
  prompts = augment(rows, taxonomies, **kwargs)
  return [row for _, together in prompts for row in together]


def assert_sound(out, rows, taxonomy, held_back=()) -> None:
  """I1, I2, I3, I5 and the contract, on every row of a whole set."""
  source = {r.id: r for r in rows}
  texts = {r.messages for r in rows}
  ids = set()
  counted = collections.Counter()
  labels = {}
  for line in out:
    contract.check_row(line, origin="made")
    assert line["id"] not in ids
    ids.add(line["id"])
    kind = contract.kind_of(line)
    name = line["id"].split("#")[0]
    if kind == "pair":
      win, lose = (of_name(side, source, taxonomy) for side in name.split(">"))
      assert line["family"] == win.family == lose.family
      assert win.messages[:-1] == lose.messages[:-1]
      counted[(line["kind"], win.messages[:-1])] += 1
      if line["kind"] == "resp":
        under = Spec.parse(line["spec"])
        better, worse = judge(win, under), judge(lose, under)
        assert (better, worse) in ((1, 0), (0, 0))
        if better == worse:
          assert win.severity < lose.severity
      else:
        assert win.helpfulness >= lose.helpfulness + 1
        assert win.refusal == lose.refusal is not None
      continue
    base = source[name]
    assert line["family"] == base.family
    told = tuple((m["role"], m["content"]) for m in line["messages"])
    if kind == "spec_pair":
      judged = base
      if told != base.messages:
        judged = of_name(f"{name}~refused", source, taxonomy)
      lenient, strict = (
        judge(judged, Spec.parse(line[k]))
        for k in ("chosen_spec", "rejected_spec")
      )
      assert (lenient, strict) != (0, 1)
      continue
    judged = base
    if told not in texts:
      assert "refuse_sub" in line["id"] and told[-1][1] in REFUSALS
      assert told[:-1] == base.messages[:-1]
      judged = of_name(f"{name}~refused", source, taxonomy)
    assert line["label"] == judge(judged, Spec.parse(line["spec"]))
    labels[line["id"]] = line["label"]
  for line in out:
    if "base" in line:
      assert line["base"] in labels, line["id"]
      if line["edit"] in NEUTRAL:
        assert line["label"] == labels[line["base"]]
  assert max(counted.values(), default=0) <= MOST_PAIRS


def of_name(name, source, taxonomy) -> Annotated:
  if name in source:
    return source[name]
  original = source[name.removesuffix("~refused")]
  edit = OPERATORS["refuse_sub"](original, Spec(), taxonomy, 0)
  assert edit is not None
  return edit.row


def assert_bands(told: dict) -> None:
  """I4 and the shares of 5.4."""
  assert 0.3 <= told["unedited"] <= 0.4
  assert told["empty"] <= 0.02
  for op, found in told["operators"].items():
    if op in ONE_SIDED or op == "base" or found["rows"] < balance.LEAST:
      continue
    inserts = op in INSERTING or op == "inserted"
    low, high = (0.4, 0.6) if inserts else (0.35, 0.65)
    assert low <= found["violating"] <= high, (op, found)


@hypothesis.given(worlds(), SEEDS)
@hypothesis.settings(max_examples=60)
def test_generated_sets_are_sound_in_any_order(world, seed):
  taxonomy, rows = world
  counts: dict[str, int] = {}
  out = made(rows, [taxonomy], seed=0, counts=counts)
  assert_sound(out, rows, taxonomy)
  assert made(rows[::-1], [taxonomy]) == out  # I6
  bases = sum(r.get("edit") == "base" for r in out)
  unknown = counts.get("augment_without_known_label", 0)
  assert bases + unknown == len(rows)  # no row is dropped in silence
  kept, thinned = balance.balance(out, least=4)
  mixed = out[:]
  random.Random(seed).shuffle(mixed)
  again, thinned_again = balance.balance(mixed, least=4)
  assert thinned == thinned_again
  assert sorted(r["id"] for r in kept) == sorted(r["id"] for r in again)
  assert balance.manifest(kept) == balance.manifest(again)


@pytest.fixture(scope="module")
def synthetic():
  rows = list(
    augment_sources.synthetic_annotated(split="train", prompts=110, seed=0)
  )
  taxonomy = augment_sources.synthetic_taxonomy("train")
  return rows, taxonomy, made(rows, [taxonomy])


def test_synthetic_set_is_sound_and_balanced(synthetic):
  rows, taxonomy, out = synthetic
  assert_sound(out, rows, taxonomy)
  used = {op for r in out if r["id"].count("#") == 1 and "label" in r
          for op in balance.chain(r)}  # fmt: skip
  assert used == set(OPERATORS) - {"contradict"}
  assert any("#contradict:pair1" in r["id"] for r in out)
  kept, counts = balance.balance(out)
  told = balance.manifest(kept)
  assert_bands(told)
  thinned = sum(n for k, n in counts.items() if k.startswith("balance_thinned"))
  assert len(kept) + thinned == len(out)
  assert thinned < 0.1 * len(out)
  assert told["rows"]["spec_pair"] > 50 and told["rows"]["resp"] > 50
  assert 0.35 < told["operators"]["base"]["violating"] < 0.65


def test_synthetic_annotation_agrees_with_its_truth(synthetic):
  rows, taxonomy, _ = synthetic
  for conversation in rows[:60]:
    own = [k for k, v in conversation.violated.items() if v == 1]
    assert len(own) == (1 if conversation.severity else 0)
    assert not (conversation.refusal and conversation.severity)
    for rule in taxonomy.rules:  # every wording has the same meaning
      said = {breaks(conversation, w) for w in taxonomy.wordings[rule.id]}
      assert said == {breaks(conversation, rule)}
  unseen = augment_sources.synthetic_taxonomy("unseen")
  assert not {r.id for r in unseen.rules} & {r.id for r in taxonomy.rules}
  for split in ("seen", "unseen"):
    few = list(
      augment_sources.synthetic_annotated(split=split, prompts=3, seed=1)
    )
    assert made(few, [augment_sources.synthetic_taxonomy(split)])


def test_i5_families_and_withheld_rules_do_not_leak(synthetic):
  rows, taxonomy, out = synthetic
  families = {r.family for r in rows}
  assert {r["family"] for r in out} <= families
  told = balance.manifest(
    out, split=lambda f: "heldout" if f[-1] in "37" else "train"
  )
  held = sum(f[-1] in "37" for f in families)
  assert told["families"] == {"heldout": held, "train": len(families) - held}
  assert len(set(told["hashes"].values())) == 2
  withheld = taxonomy.rules[0]
  small = taxonomy._replace(rules=taxonomy.rules[1:])
  for line in made(rows[:120], [small]):
    for key in ("spec", "chosen_spec", "rejected_spec"):
      for rule in line.get(key, {}).get("rules", ()):
        assert rule.get("domain") != withheld.domain


def test_i6_a_row_depends_on_seed_and_id(synthetic):
  rows, taxonomy, _ = synthetic
  some = rows[:40]
  first = made(some, [taxonomy])
  assert first == made(reversed(some), [taxonomy])
  assert first != made(some, [taxonomy], seed=1)


def test_ops_can_be_chosen(synthetic):
  rows, taxonomy, _ = synthetic
  out = made(rows[:60], [taxonomy], ops=("allow", "permute"))
  used = {op for r in out if "label" in r for op in balance.chain(r)}
  assert used == {"allow", "permute"}
  with pytest.raises(ValueError, match=r"ops: 'alow' is no operator; choose"):
    made(rows[:1], [taxonomy], ops=("alow",))


# ------------------------------------------------------------- small rules


def test_rejected_rows_are_named():
  for rows, message in (
    ([row(), row()], "row 'r': field 'id': 'r' is used twice"),
    ([row(taxonomy="seas")], "field 'taxonomy': 'seas' is not among those"),
    ([row(messages=(("user", "?"),))], "field 'messages': must end with"),
  ):
    with pytest.raises(ValueError, match=message):
      made(rows, [BOATS])


def test_never_permits_neither_by_word_nor_by_silence():
  rows = [
    row("tar", name=f"t{i}", messages=(("user", f"{i}?"), ("assistant", "a")))
    for i in range(60)
  ]
  rows += [row("oar", "map", name=f"o{i}") for i in range(20)]
  for never, labels in (((), {0, 1}), (("tar",), {0})):
    out = made(rows, [BOATS], never=never)
    found = {
      r["label"]
      for r in out
      if "label" in r and r["id"][0] == "t" and "refuse" not in r["id"]
    }
    assert found == labels
    allowed = {
      r.get("domain", r["id"])
      for line in out
      for key in ("spec", "chosen_spec", "rejected_spec")
      for r in line.get(key, {}).get("rules", ())
      if r["polarity"] == "allow"
    }
    assert ("tar" in allowed) == (not never)


def test_help_pairs_want_known_refusals_and_a_whole_step():
  rows = [
    row(name="a", helpfulness=3.0),
    row(name="b", helpfulness=1.5),
    row(name="c", helpfulness=0.0, refusal=1),
    row(name="d", helpfulness=1.0, refusal=None),
    row(name="e", helpfulness=2.5),
  ]
  counts: dict[str, int] = {}
  out = made(rows, [BOATS], counts=counts)
  pairs = {r["id"] for r in out if r.get("kind") == "help"}
  assert pairs == {"a>b#help", "e>b#help"}
  assert counts["augment_help_pairs_refusal_unequal_or_unknown"] == 6
  assert all("spec" not in r for r in out if r.get("kind") == "help")


def test_response_pairs_are_capped_and_counted():
  rows = [row("oar", name=f"v{i}", severity=i) for i in range(6)]
  rows += [row(name=f"c{i}") for i in range(6)]
  counts: dict[str, int] = {}
  out = made(rows, [BOATS], counts=counts)
  assert sum(r.get("kind") == "resp" for r in out) == MOST_PAIRS
  assert counts["augment_resp_pairs"] == MOST_PAIRS
  assert counts["augment_resp_pairs_beyond_most"] > 20


def label_rows(op: str, zeros: int, ones: int) -> list[dict]:
  return [
    {
      "id": f"{op}{i}#{op}",
      "messages": [{"role": "assistant", "content": "x"}],
      "label": int(i >= zeros),
      "spec": {"rules": [{"id": "s", "title": "s", "polarity": "forbid"}]},
      "edit": op,
      "base": f"{op}{i}#base",
      "family": f"f{i}",
    }
    for i in range(zeros + ones)
  ]


def bases(rows: list[dict]) -> list[dict]:
  return [
    {k: v for k, v in r.items() if k != "base"}
    | {"id": r["base"], "edit": "base"}
    for r in rows
  ]


@pytest.mark.parametrize(
  ("op", "zeros", "ones", "left"),
  [
    ("permute", 90, 10, (18, 10)),  # 18 / 28 <= 0.65 < 19 / 29
    ("permute", 10, 90, (10, 18)),
    ("borrow", 90, 10, (15, 10)),  # 15 / 25 = 0.6
    ("permute", 40, 60, (40, 60)),
    ("leave_out", 0, 100, (0, 100)),
    ("permute", 19, 0, (19, 0)),  # too few to say
    ("permute", 30, 0, (0, 0)),
  ],
)
def test_balance_thins_no_more_than_needed(op, zeros, ones, left):
  rows = label_rows(op, zeros, ones)
  kept, counts = balance.balance(rows)
  # Without first specs there is no mixture to keep to: only this bound counts.
  del kept
  gone = zeros + ones - sum(left)
  assert counts.get(f"balance_thinned_{op}", 0) == gone
  few = zeros + ones < balance.LEAST
  assert (f"balance_too_few_{op}" in counts) == few


def test_balance_mends_what_it_leaves():
  edited = label_rows("permute", 90, 10) + label_rows("leave_out", 0, 60)
  first = bases(edited)
  kept, counts = balance.balance([*edited, *first])
  ids = {r["id"] for r in kept}
  assert all(r["base"] in ids for r in kept if "base" in r)
  orphans = [r for r in kept if r["edit"] != "base" and "base" not in r]
  assert len(orphans) == counts["balance_bases_lost"]
  told = balance.manifest(kept)
  assert_bands(told)
  assert told["rows"] == {"label": len(kept)}
  assert counts["balance_thinned_permute"] == 72
  assert counts["balance_thinned_unedited"] > 0


def test_balance_bounds_the_empty_spec():
  rows = bases(label_rows("permute", 40, 60)) + label_rows("permute", 70, 90)
  for line in rows[:20]:
    line["spec"] = {"rules": []}
  assert Spec.parse(rows[0]["spec"]).render() == EMPTY_TEXT
  kept, counts = balance.balance(rows)
  assert counts["balance_thinned_empty"] > 10
  assert_bands(balance.manifest(kept))


def test_balance_refuses_rows_of_others():
  for name in ("r1", "r1#allow+nothing"):
    rows = label_rows("allow", 1, 0)
    rows[0]["id"] = name
    with pytest.raises(ValueError, match="does not end in #base or #OPERATOR"):
      balance.balance(rows)
  with pytest.raises(ValueError, match="is used twice"):
    balance.balance(label_rows("allow", 1, 0) * 2)


# --------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def beavertails(staged):
  rows = list(augment_sources.beavertails_annotated(staged))
  taxonomy = augment_sources.beavertails_taxonomy()
  counts: dict[str, int] = {}
  out = made(
    rows,
    [taxonomy],
    counts=counts,
    never=augment_sources.BEAVERTAILS_NEVER,
  )
  return rows, taxonomy, out, counts


def test_beavertails_is_sound(beavertails):
  rows, taxonomy, out, counts = beavertails
  assert_sound(out, rows, taxonomy)
  bases = sum(r.get("edit") == "base" for r in out)
  assert bases == len(rows) - counts.get("augment_without_known_label", 0)
  assert bases > 0.95 * len(rows)


def test_beavertails_is_balanced(beavertails):
  _, _, out, _ = beavertails
  kept, counts = balance.balance(out)
  told = balance.manifest(kept)
  assert_bands(told)
  assert len(told["operators"]) >= 13
  thinned = sum(n for k, n in counts.items() if k.startswith("balance_thinned"))
  assert len(kept) + thinned == len(out)
  assert thinned < 0.05 * len(out)


def test_beavertails_never_permits_harm_to_children(beavertails):
  rows, _, out, _ = beavertails
  fatal = {r.id for r in rows if r.violated["child_abuse"] == 1}
  assert fatal
  for line in out:
    name = line["id"].split("#")[0]
    if name in fatal and "label" in line and "refuse_sub" not in line["id"]:
      assert line["label"] == 0


def test_beavertails_file_is_checked(tmp_path):
  with pytest.raises(ValueError, match=r"needs .*responses\.jsonl\.gz"):
    list(augment_sources.beavertails_annotated(tmp_path))
