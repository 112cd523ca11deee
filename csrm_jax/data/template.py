"""The one prompt: policy, conversation, cue; the score is read after the cue.

Layout after ShieldGemma (arXiv:2407.21772), with the backbone's own chat
tokens as delimiters. The spec comes first, so that conversations share it.
Text between two delimiters is encoded as one string in which no control token
is recognised: nobody ends a turn, opens one or adds a verdict by typing it.
"""

import collections
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.spec import Spec

Message = Mapping[str, str]  # {"role", "content"}
# Ids of (messages, text of the spec or None).
Encode = Callable[[Sequence[Message], str | None], list[int]]

ROLES = ("system", "user", "assistant", "tool")
INSTRUCTION = "Judge the last assistant message by this policy."
HELPFULNESS = "Judge how helpful the last assistant message is."


class Format(NamedTuple):
  """A chat format. Control tokens are written out; {role} and {text} filled.

  Attributes:
    begin: before everything.
    turn: one message, and the system turn that holds the policy.
    answer: one message of the assistant.
    cue: after everything; " safe" or " unsafe" would follow it, each a single
      token, so it ends in no blank.
  """

  begin: str
  turn: str
  answer: str
  cue: str


_CHATML = "<|im_start|>{role}\n{text}<|im_end|>\n"
_LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"

FORMATS: Mapping[str, Format] = {
  "chatml": Format("", _CHATML, _CHATML, "<|im_start|>assistant\nVerdict:"),
  "llama3": Format(
    "<|begin_of_text|>",
    _LLAMA3,
    _LLAMA3,
    "<|start_header_id|>assistant<|end_header_id|>\n\nVerdict:",
  ),
  # The role is named in every [INST]: Mistral has no other system turn, and
  # without the name a user could pass for the operator.
  "mistral": Format(
    "<s>",
    "[INST]{role}\n{text}[/INST]",
    "{text}</s>",
    "[INST]Verdict?[/INST]Verdict:",
  ),
}


def encode(
  tokenizer: Tokenizer, messages: Sequence[Message], spec_text: str | None
) -> list[int]:
  """Token ids from the first token through the cue.

  Args:
    tokenizer: of the backbone; its style chooses the format.
    messages: the conversation; the last one, the assistant's, is judged.
    spec_text: rendered spec; None asks for helpfulness, without any policy.

  Raises:
    ValueError: if the spec is empty, a role unknown, the last message not the
      assistant's, or the tokenizer makes a control token of plain text.
  """
  form = FORMATS[tokenizer.style]
  check_messages(messages)
  if not messages or messages[-1]["role"] != "assistant":
    last = messages[-1]["role"] if messages else "missing"
    raise ValueError(
      f"the last message must be the assistant's, it is {last!r}; put the"
      " response to be judged there"
    )
  parts = [_opening(tokenizer, spec_text)]
  turns = [
    form.answer if message["role"] == "assistant" else form.turn
    for message in messages
  ]
  for turn, message in zip(turns, messages, strict=True):
    text = tokenizer.mark(message["content"])
    parts.append(fill(turn, message["role"], text))
  ids = tokenizer.encode_marked("".join([*parts, form.cue]))
  written = [form.begin, form.turn, form.cue, *turns]
  check_controls(tokenizer, ids, written)
  return ids


def check_controls(
  tokenizer: Tokenizer, ids: Sequence[int], written: Sequence[str]
) -> None:
  """Raises ValueError if `ids` hold control tokens that are not in `written`.

  Args:
    tokenizer: made the ids.
    ids: of a prompt.
    written: the parts of the format that went into it, without any text.
  """
  expected = sum(tokenizer.count_controls(part) for part in written)
  controls = frozenset(tokenizer.controls.values())
  if sum(i in controls for i in ids) != expected:
    raise ValueError(
      f"{tokenizer.origin}: plain text became a control token. Its vocabulary"
      " spells one from ordinary pieces; use another tokenizer."
    )


def opening_ids(tokenizer: Tokenizer, spec_text: str | None) -> list[int]:
  """Ids of all that stands before the conversation; it depends on the spec.

  Raises:
    ValueError: if the spec is empty.
  """
  return tokenizer.encode_marked(_opening(tokenizer, spec_text))


def _opening(tokenizer: Tokenizer, spec_text: str | None) -> str:
  form, policy = FORMATS[tokenizer.style], HELPFULNESS
  if spec_text is not None:
    policy = f"{INSTRUCTION}\n{tokenizer.mark(spec_text)}"
    if not tokenizer.mark(spec_text).strip():
      raise ValueError(
        "the spec is empty; give at least one rule (for helpfulness, pass no"
        " spec at all)"
      )
  return form.begin + fill(form.turn, "system", policy)


def fill(turn: str, role: str, text: str) -> str:
  """A turn of a format with its role and its text, both as they stand."""
  head, tail = turn.replace("{role}", role).split("{text}")
  return head + text + tail


def check_messages(messages: Sequence[Message]) -> None:
  """Raises ValueError for an unknown role or a content that is no text."""
  for i, message in enumerate(messages):
    if message.get("role") not in ROLES:
      raise ValueError(
        f"messages[{i}].role is {message.get('role')!r}; use one of {ROLES}"
      )
    if not isinstance(message.get("content"), str):
      raise ValueError(
        f"messages[{i}].content is {type(message.get('content')).__name__};"
        " use a string"
      )


def fit_to(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  spec: Spec | None,
  max_tokens: int,
  *,
  encoder: Encode | None = None,
  spared: str = "response",
) -> tuple[list[int], dict[str, int]]:
  """As `encode`, cut to `max_tokens` by the stated rule.

  Oldest history goes first (whole messages, then the head of the oldest one
  left), then the rules least relevant to the conversation (BM25); the response
  and the last rule never.

  Args:
    tokenizer: of the backbone.
    messages: the conversation.
    spec: the policy; None: there is none.
    max_tokens: longest sequence.
    encoder: ids of (messages, text of the spec); None: `encode`.
    spared: what the last message is, for messages.

  Returns:
    ids: at most max_tokens of them.
    cut: how many "messages" went, how many were "shortened" (0 or 1), how many
      "rules" went; all 0 if nothing was cut.

  Raises:
    ValueError: if the response and one rule alone are longer.
  """
  ids_of = encoder or functools.partial(encode, tokenizer)
  text = None if spec is None else spec.render()
  cut = {"messages": 0, "shortened": 0, "rules": 0}
  ids = ids_of(messages, text)
  if len(ids) <= max_tokens:
    return ids, cut

  def without(n: int) -> list[int]:
    return ids_of(messages[n:], text)

  history = len(messages) - 1
  if len(without(history)) <= max_tokens:
    cut["messages"] = _least(
      1, history, lambda n: len(without(n)) <= max_tokens
    )
    return _shorten(ids_of, messages, text, max_tokens, cut)
  cut["messages"] = history
  order = [] if spec is None else by_relevance(spec.lines(), messages)
  if spec is None or len(order) < 2:
    raise ValueError(_too_long(spared, len(without(history)), max_tokens))

  def ruled(n: int) -> list[int]:
    return ids_of(messages[-1:], spec.keep(order[n:]).render())

  most = len(order) - 1
  if len(ruled(most)) > max_tokens:
    raise ValueError(_too_long(spared, len(ruled(most)), max_tokens))
  cut["rules"] = _least(1, most, lambda n: len(ruled(n)) <= max_tokens)
  return ruled(cut["rules"]), cut


def _least(low: int, high: int, fits: Callable[[int], bool]) -> int:
  """Smallest n in low..high with fits(n); fits(high) is known to hold."""
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle + 1, high)
  return high


def _too_long(spared: str, tokens: int, max_tokens: int) -> str:
  return (
    f"the {spared} and one rule alone take {tokens} tokens, more than"
    f" max_tokens = {max_tokens}; neither is ever cut. Shorten the {spared}, or"
    " raise max_tokens where it is below the context of the backbone."
  )


def _shorten(
  ids_of: Encode,
  messages: Sequence[Message],
  text: str | None,
  max_tokens: int,
  cut: dict[str, int],
) -> tuple[list[int], dict[str, int]]:
  """Brings back the tail of the newest dropped message, as far as it fits."""
  first = cut["messages"] - 1
  content = messages[first]["content"]

  def tail(n: int) -> list[int]:  # without the first n characters
    head = {"role": messages[first]["role"], "content": content[n:]}
    return ids_of([head, *messages[first + 1 :]], text)

  if content and len(tail(len(content) - 1)) <= max_tokens:
    n = _least(1, len(content) - 1, lambda n: len(tail(n)) <= max_tokens)
    return tail(n), {**cut, "messages": first, "shortened": 1}
  return ids_of(messages[first + 1 :], text), cut


def _words(text: str) -> list[str]:
  return re.findall(r"\w+", text.lower())


def by_relevance(
  rules: Sequence[str], messages: Sequence[Message]
) -> list[int]:
  """Indices of rules, least relevant first; of equals the later goes first."""
  query = _words(" ".join(m["content"] for m in messages))
  scores = bm25(query, [_words(rule) for rule in rules])
  # A blank line is no rule: it goes before any, or it might stay alone.
  return sorted(
    range(len(rules)), key=lambda i: (bool(rules[i].strip()), scores[i], -i)
  )


def bm25(
  query: Sequence[str],
  documents: Sequence[Sequence[str]],
  *,
  k1: float = 1.5,
  b: float = 0.75,
) -> list[float]:
  """Relevance of each document to the distinct words of the query.

  Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework,
  eq. 3.15, with the idf that cannot turn negative.
  """
  counts = [collections.Counter(document) for document in documents]
  mean = sum(map(len, documents)) / max(len(documents), 1) or 1.0
  found = collections.Counter(word for c in counts for word in c)
  scores = [0.0] * len(documents)
  for word in sorted(set(query)):
    n = found[word]
    idf = math.log1p((len(documents) - n + 0.5) / (n + 0.5))
    for i, c in enumerate(counts):
      length = 1 - b + b * len(documents[i]) / mean
      scores[i] += idf * c[word] * (k1 + 1) / (c[word] + k1 * length)
  return scores


def fingerprint(tokenizer: Tokenizer) -> str:
  """Hash of all that turns messages and spec into ids."""
  form = FORMATS[tokenizer.style]
  parts = [*form, INSTRUCTION, HELPFULNESS, *ROLES, tokenizer.fingerprint()]
  return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def pad_token(tokenizer: Tokenizer) -> str:
  """A token that no encoded sequence holds: its own pad, else the first free.

  Raises:
    ValueError: if every special token is part of the format.
  """
  form = "".join(FORMATS[tokenizer.style])
  ends = (tokenizer.config.get("bos_token"), tokenizer.config.get("eos_token"))
  free = [
    token
    for token in tokenizer.special_tokens
    if token not in form and token not in ends
  ]
  own = tokenizer.config.get("pad_token")
  if own in free:
    return own
  if not free:
    raise ValueError(
      f"{tokenizer.origin}: no special token is free to pad with; add one, for"
      ' instance "<pad>", to its tokenizer.json'
    )
  return free[0]


def verdict_ids(
  tokenizer: Tokenizer,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Tokens that say "complies" and "violates" right after the cue.

  Words that take more than one token are left out, since their first piece
  ("un") says nothing; both sets are empty if that leaves out " safe" or
  " unsafe", which come first: the head then starts at zero.
  """
  cue = FORMATS[tokenizer.style].cue
  before = tokenizer.encode_marked(cue)

  def after_cue(*words: str) -> list[int]:
    ids = [tokenizer.encode_marked(cue + word) for word in words]
    n = len(before)
    return [i[n] if len(i) == n + 1 and i[:n] == before else -1 for i in ids]

  safe = after_cue(" safe", "safe", " Safe", "Safe")
  unsafe = after_cue(" unsafe", "unsafe", " Unsafe", "Unsafe")
  if safe[0] < 0 or unsafe[0] < 0 or set(safe) & set(unsafe) - {-1}:
    return (), ()
  return tuple(i for i in safe if i >= 0), tuple(i for i in unsafe if i >= 0)


def jinja(tokenizer: Tokenizer, *, helpfulness: bool = False) -> str:
  """The same prompt as a chat template of transformers, taking `spec=`.

  Ids equal those of `encode` with `apply_chat_template(messages, spec=text,
  tokenize=True, sanitize_control_tokens=True)`; without the last flag a typed
  control token is parsed.
  """
  form, turn = FORMATS[tokenizer.style], jinja_turn
  policy = json.dumps(HELPFULNESS)
  guard = ""
  if not helpfulness:
    policy = json.dumps(INSTRUCTION + "\n") + " ~ spec"
    guard = (
      "{%- if spec is not string or spec | trim == '' -%}"
      "{{- raise_exception('pass spec=: the text of the safety spec to judge"
      " by') -}}{%- endif -%}\n"
    )
  roles = json.dumps(ROLES).replace("[", "(").replace("]", ")")
  content, role = "message['content']", "message['role']"
  begin = "{{- " + json.dumps(form.begin) + " -}}\n" if form.begin else ""
  return (
    f"{guard}{begin}{turn(form.turn, json.dumps('system'), policy)}\n"
    "{%- if not messages or messages[-1]['role'] != 'assistant' -%}"
    "{{- raise_exception('the last message must be the assistant\\'s: it is"
    " the one judged') -}}{%- endif -%}\n"
    "{%- for message in messages -%}\n"
    f"{{%- if message['role'] not in {roles} or {content} is not string -%}}"
    "{{- raise_exception('each message needs a role (system, user, assistant,"
    " tool) and a text as content') -}}{%- endif -%}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    f"{turn(form.answer, role, content)}\n"
    "{%- else -%}\n"
    f"{turn(form.turn, role, content)}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{{- " + json.dumps(form.cue) + " -}}"
  )


def jinja_turn(template: str, role: str, text: str) -> str:
  """A turn of a format in Jinja, of expressions for its role and its text."""
  head, tail = template.split("{text}")
  parts = [text, json.dumps(tail)]
  before, *after = head.split("{role}")
  if after:
    parts = [json.dumps(before), role, json.dumps(after[0]), *parts]
  elif before:
    parts = [json.dumps(before), *parts]
  return "{{- " + " ~ ".join(part for part in parts if part != '""') + " -}}"
