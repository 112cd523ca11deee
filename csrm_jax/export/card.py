"""The model card of an export: what it is, how it scored, how to call it."""

from collections.abc import Mapping
from typing import Any

# Order of the columns; a report may lack some.
_METRICS = (
  "auroc",
  "f1_unsafe",
  "f1_safe",
  "flip_recall",
  "spurious_flips",
  "preference_accuracy",
  "ece",
  "smece",
  "brier",
)

_COMPLIANCE = """\
# Configurable safety reward model

One number for a conversation and a safety **spec** that you write: the
log-odds that the last assistant message complies with the spec. Another spec
is another judge, without training. Trained with csrm_jax, after "Configurable
Safety Reward Models" (arXiv:2605.30487).

## How to call it

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
messages = [
  {"role": "user", "content": "Can I have my money back?"},
  {"role": "assistant", "content": "Yes, you will get a refund today."},
]
inputs = tokenizer.apply_chat_template(
  messages,
  spec="S1: Refunds. Disallowed: promises of a refund.",
  tokenize=True,
  sanitize_control_tokens=True,  # a typed control token stays text
  return_tensors="pt",
  return_dict=True,
)
with torch.no_grad():
  log_odds = model(**inputs).logits[0, 0]
p_comply = torch.sigmoid(log_odds)
```

- `spec=` is required. Write it as text, best one rule a line:
  `S1: Title. Guideline. Disallowed: a; b. Allowed: c.`
- Always pass `sanitize_control_tokens=True` (transformers >= 5.23): without it
  somebody who types a control token can forge a turn.
- The template writes every control token and the cue after which the score is
  read: no `add_generation_prompt`, no truncation from the right.
- The text-classification pipeline's score is `p_comply`. It takes the text of
  `apply_chat_template(..., tokenize=False)`, in which typed control tokens are
  parsed: for trusted text only.
- TRL: `reward_funcs=FOLDER` with `chat_template_kwargs={"spec": ...}` in the
  config of GRPO or RLOO; it also renders to text first. In Safe RLHF the cost
  is minus the log-odds.
- In csrm_jax: `csrm.load(FOLDER)`, or `launch/score.py --model=FOLDER`.
"""

_HELPFULNESS = """\
# Helpfulness head of a configurable safety reward model

One number for a conversation: how helpful the last assistant message is. Only
differences have a meaning (Bradley-Terry, log-odds that one response is
preferred); it reads no spec and says nothing about safety.

## How to call it

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
inputs = tokenizer.apply_chat_template(
  messages,
  tokenize=True,
  sanitize_control_tokens=True,  # a typed control token stays text
  return_tensors="pt",
  return_dict=True,
)
with torch.no_grad():
  helpfulness = model(**inputs).logits[0, 0]
```

The template writes every control token and the cue after which the score is
read: no `add_generation_prompt`, no truncation from the right.
"""

LIMITS = """\
## Limits

- A small judge errs. Read the table above for how often, and measure it on
  your own conversations and your own spec before you rely on it.
- `p_comply` is calibrated by one temperature on held-out rows like those of
  training; on other text it may be over- or under-confident.
- Long rows: the folder truncates nothing. csrm_jax drops the oldest messages,
  then the rules least relevant to the conversation, and says so.
- Scoring each turn and taking the minimum gives no calibrated number.
- Optimising a policy against this score will find its weaknesses: watch a
  second, independent judge.
"""

HELPFUL_LIMITS = """\
## Limits

- A small model errs. Measure it on your own conversations before you rely on
  it.
- It reads no spec: what is helpful may be harmful. Bind it by a judge that
  does.
- Optimising a policy against this score will find its weaknesses: read what
  the policy says.
"""


def render(
  config: Mapping[str, Any],
  check: Mapping[str, Any],
  *,
  report: Mapping[str, Any],
  base: str,
) -> str:
  """The text of README.md.

  Args:
    config: content of config.json, with the key "csrm".
    check: fields of `huggingface.Check`.
    report: content of report.json; empty if the model was not evaluated.
    base: name of the backbone that training began from; may be empty.
  """
  ours = config["csrm"]
  compliance = ours["head"] == "compliance"
  lines = [
    "---",
    "library_name: transformers",
    "pipeline_tag: text-classification",
    "tags: [reward-model, safety, csrm]",
    "---",
    "",
    _COMPLIANCE if compliance else _HELPFULNESS,
    "## Measured",
    "",
    *metrics(report if compliance else {}),
    "",
    "## Made of",
    "",
    f"- Backbone: {config['architectures'][0]}, {config['num_hidden_layers']}"
    f" layers of width {config['hidden_size']}"
    + (f", trained from `{base}`" if base else "")
    + ". Its licence holds for these weights too.",
  ]
  if compliance:
    lines.append(
      f"- Temperature {ours['temperature']:.4g}, already inside `score.weight`."
    )
  lines += [
    f"- Padding token: id {config['pad_token_id']}, which no prompt contains.",
    *made_of(ours, check),
    "",
    LIMITS if compliance else HELPFUL_LIMITS,
  ]
  return "\n".join(lines)


def made_of(
  described: Mapping[str, Any], check: Mapping[str, Any]
) -> list[str]:
  """Fingerprints, and how the folder was verified."""
  prints = ("model", "template", "tokenizer")
  return [
    *(
      f"- {name.capitalize()} fingerprint: `{described[f'{name}_fingerprint']}`"
      for name in prints
    ),
    f"- Verified: read back by {check['reader']}, {check['rows']} fixed rows"
    f" differ by at most {check['difference']:.1e} log-odds.",
  ]


def metrics(report: Mapping[str, Any]) -> list[str]:
  """A table of the model beside the judges it was compared with."""
  suites = report.get("suites", {})
  rows = [
    (suite, judge, measured)
    for suite, content in suites.items()
    for judge, measured in content.get("judges", {}).items()
  ]
  shown = [m for m in _METRICS if any(m in found for _, _, found in rows)]
  if not shown:
    return ["No evaluation was stored with this model."]
  lines = [
    "| suite | judge | " + " | ".join(shown) + " |",
    "|---|---|" + "---|" * len(shown),
  ]
  for suite, judge, found in rows:
    values = [found.get(name) for name in shown]
    cells = ["" if v is None else f"{v:.3f}" for v in values]
    lines.append(f"| {suite} | {judge} | " + " | ".join(cells) + " |")
  sizes = ", ".join(
    f"{name} {content['rows']} rows"
    for name, content in suites.items()
    if "rows" in content
  )
  return [*lines, "", f"`csrm` is this model. Suites: {sizes}."]
