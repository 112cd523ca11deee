"""The prompt of a policy: the conversation so far, its answer opened.

In the backbone's own chat format. As in `template`, nobody ends a turn or
opens one by typing its delimiter. No system turn is added that nobody asked
for, also where the backbone's own Jinja template would add one.
"""

import functools
import json
from collections.abc import Mapping, Sequence

from csrm_jax.data import template
from csrm_jax.data.template import FORMATS, Format, Message
from csrm_jax.data.tokenizer import Tokenizer
from csrm_jax.spec import Spec

POLICY = "Follow this policy in your answers."

# What opens the answer is the `cue` here. Mistral has no system turn: that
# text goes before the last message of the user, as its own template does it.
_FORMATS: Mapping[str, Format] = {
  "chatml": FORMATS["chatml"]._replace(cue="<|im_start|>assistant\n"),
  "llama3": FORMATS["llama3"]._replace(
    cue="<|start_header_id|>assistant<|end_header_id|>\n\n"
  ),
  "mistral": Format("<s>", "[INST] {text}[/INST]", " {text}</s>", ""),
}
_STOPS: Mapping[str, tuple[str, ...]] = {
  "chatml": ("<|im_end|>", "<|endoftext|>"),
  "llama3": ("<|eot_id|>", "<|end_of_text|>"),
  "mistral": ("</s>",),
}


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Tokens after which an answer is over: end of turn, end of text."""
  names = [n for n in _STOPS[tokenizer.style] if n in tokenizer.added]
  eos = tokenizer.config.get("eos_token")
  if eos in tokenizer.added:
    names.append(eos)
  return tuple(sorted({tokenizer.special(name) for name in names}))


def end_id(tokenizer: Tokenizer) -> int:
  """The token that ends the assistant's turn in the chat format."""
  return tokenizer.special(_STOPS[tokenizer.style][0])


def encode(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  spec_text: str | None = None,
) -> list[int]:
  """Token ids up to where the answer begins.

  Args:
    tokenizer: of the backbone; its style chooses the format.
    messages: the conversation; the last one is not the assistant's.
    spec_text: rendered spec, which goes into the system turn, after what the
      conversation's own system message says; None: no policy.

  Raises:
    ValueError: an unknown role, an empty spec, or an assistant's message last.
  """
  template.check_messages(messages)
  if not messages or messages[-1]["role"] == "assistant":
    last = messages[-1]["role"] if messages else "missing"
    raise ValueError(
      f"the last message must be one to answer, it is {last!r}; end the prompt"
      " with the user's message"
    )
  system, rest = "", list(messages)
  if rest[0]["role"] == "system":
    system = rest.pop(0)["content"]
  if spec_text is not None:
    if not tokenizer.mark(spec_text).strip():
      raise ValueError(
        "the spec is empty; give at least one rule, or pass no spec"
      )
    policy = f"{POLICY}\n{spec_text}"
    system = f"{system}\n\n{policy}" if system else policy
  if system and tokenizer.style != "mistral":
    rest = [{"role": "system", "content": system}, *rest]
  elif system:
    at = _last_user(rest)
    text = f"{system}\n\n{rest[at]['content']}" if rest else system
    turn = {"role": "user", "content": text}
    rest = [*rest[:at], turn, *rest[at + 1 :]]
  form = _FORMATS[tokenizer.style]
  turns = [
    form.answer if message["role"] == "assistant" else form.turn
    for message in rest
  ]
  parts = [form.begin]
  for turn, message in zip(turns, rest, strict=True):
    text = tokenizer.mark(message["content"])
    parts.append(template.fill(turn, message["role"], text))
  ids = tokenizer.encode_marked("".join([*parts, form.cue]))
  template.check_controls(tokenizer, ids, [form.begin, form.cue, *turns])
  return ids


def answered(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  spec_text: str | None = None,
) -> tuple[list[int], int]:
  """Ids of a conversation that ends in an answer, its end of turn included.

  Args:
    tokenizer: as of `encode`, like the spec's text.
    messages: the last one is the answer.
    spec_text: see `encode`.

  Returns:
    (ids, where the answer begins).

  Raises:
    ValueError: as `encode`, of the messages before the answer.
  """
  before = encode(tokenizer, messages[:-1], spec_text)
  said = tokenizer.encode(messages[-1]["content"])
  return [*before, *said, end_id(tokenizer)], len(before)


def _last_user(messages: Sequence[Message]) -> int:
  """Index of the last message that is not the assistant's; 0 if none."""
  kept = [i for i, m in enumerate(messages) if m["role"] != "assistant"]
  return kept[-1] if kept else 0


def fit_to(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  spec: Spec | None,
  max_tokens: int,
) -> tuple[list[int], dict[str, int]]:
  """As `encode`, cut by the rule of `template.fit_to`.

  There it spares the response, here the last message; a system message is the
  oldest of the history and goes first.

  Raises:
    ValueError: if the last message and one rule alone are longer.
  """
  return template.fit_to(
    tokenizer,
    messages,
    spec,
    max_tokens,
    encoder=functools.partial(encode, tokenizer),
    spared="last message",
  )


def jinja(tokenizer: Tokenizer) -> str:
  """The same prompt as a chat template of transformers; `spec=` may be given.

  Ids equal those of `encode` with `apply_chat_template(messages,
  add_generation_prompt=True, tokenize=True, sanitize_control_tokens=True)`.
  Without a generation prompt the conversation is written to its end.
  """
  form = _FORMATS[tokenizer.style]
  begin = "{{- " + json.dumps(form.begin) + " -}}\n" if form.begin else ""
  roles = json.dumps(template.ROLES).replace("[", "(").replace("]", ")")
  turn = template.jinja_turn
  policy = json.dumps(POLICY + "\n") + " ~ spec"
  gap = json.dumps("\n\n")
  text = "message['content']"
  lone, first = "", ""
  if tokenizer.style == "mistral":
    lone = (
      "{%- if ns.system and not rest -%}\n"
      + turn(form.turn, "'user'", "ns.system")
      + "\n{%- endif -%}\n"
    )
    text = (
      f"((ns.system ~ {gap} ~ {text}) if ns.system and loop.index0 == ns.at"
      f" else {text})"
    )
    first = (
      "{%- for message in rest -%}{%- if message['role'] != 'assistant' -%}"
      "{%- set ns.at = loop.index0 -%}{%- endif -%}{%- endfor -%}\n"
    )
  else:
    lone = (
      "{%- if ns.system -%}\n"
      + turn(form.turn, "'system'", "ns.system")
      + "\n{%- endif -%}\n"
    )
  return (
    "{%- set ns = namespace(system='', at=0) -%}\n"
    "{%- set rest = messages -%}\n"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set ns.system = messages[0]['content'] -%}"
    "{%- set rest = messages[1:] -%}{%- endif -%}\n"
    "{%- if spec is defined and spec is not none -%}"
    "{%- if spec is not string or spec | trim == '' -%}"
    "{{- raise_exception('spec= is empty; give the text of a spec, or leave it"
    " out') -}}{%- endif -%}"
    f"{{%- set ns.system = (ns.system ~ {gap} ~ {policy}) if ns.system else"
    f" ({policy}) -%}}{{%- endif -%}}\n"
    f"{begin}{first}{lone}"
    "{%- for message in rest -%}\n"
    f"{{%- if message['role'] not in {roles} or message['content'] is not"
    " string -%}{{- raise_exception('each message needs a role (system, user,"
    " assistant, tool) and a text as content') -}}{%- endif -%}\n"
    "{%- if message['role'] == 'assistant' -%}\n"
    f"{turn(form.answer, 'message[' + repr('role') + ']', text)}\n"
    "{%- else -%}\n"
    f"{turn(form.turn, 'message[' + repr('role') + ']', text)}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{%- if rest and rest[-1]['role'] == 'assistant' -%}"
    "{{- raise_exception('the last message is the assistant\\'s: nothing to"
    " answer') -}}{%- endif -%}\n"
    "{{- " + json.dumps(form.cue) + " -}}\n"
    "{%- endif -%}"
  )
