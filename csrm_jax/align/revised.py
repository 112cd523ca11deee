"""What a constitutional round leaves: rows to imitate, pairs, a report."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from csrm_jax import metrics, storage
from csrm_jax.align.evaluation import rate
from csrm_jax.align.setup import Setup

REPORT = "constitutional.json"
IMITATE = "sft.jsonl"
PAIRS = "pairs.jsonl"
SOURCE = "constitutional"
RESAMPLES = 2000  # of prompts, for the intervals of differences
Line = Mapping[str, Any]  # of revisions.jsonl


def write(setup: Setup, lines: Sequence[Line]) -> dict[str, Any]:
  """Writes sft.jsonl, pairs.jsonl and constitutional.json.

  Args:
    setup: of the run.
    lines: of revisions.jsonl, all of them.

  Returns:
    What constitutional.json holds.
  """
  own = setup.config.align.constitutional
  spec = setup.bound[0].spec.render()
  pairs = [*revision_pairs(lines, spec)]
  pairs += soft_pairs(
    lines, spec, temperature=own.preference_temperature, clamp=own.clamp
  )
  written = {IMITATE: [*imitation_rows(lines, spec)], PAIRS: pairs}
  for name, rows in written.items():
    text = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_text(setup.workdir / name, text)
  found = report(
    lines,
    principles=[c.name for c in setup.bound[1:]],
    seed=setup.config.seed,
  )
  found["rows"] = {name: len(rows) for name, rows in written.items()}
  found["monitor"] = setup.config.align.monitor
  if setup.reward is not None:
    found["help_fall"] = own.help_fall
  storage.write_json(setup.workdir / REPORT, found)
  return found


def _accepted(line: Line) -> bool:
  return any(x["outcome"] == "accepted" for x in line["revisions"])


def imitation_rows(
  lines: Iterable[Line], spec: str
) -> Iterable[dict[str, Any]]:
  """Label rows of the last accepted revisions, for `align.ptx`.

  The label is the judge's probability that the revision complies: an accepted
  one is better than its draft, which need not mean that it is good.
  """
  for line in lines:
    if _accepted(line):
      said = {"role": "assistant", "content": line["final"]["text"]}
      yield {
        "id": line["id"],
        "messages": [*line["prompt"], said],
        "label": float(expit(line["final"]["z"])),
        "spec": spec,
        "source": SOURCE,
      }


def revision_pairs(
  lines: Iterable[Line], spec: str
) -> Iterable[dict[str, Any]]:
  """Response pairs: the last accepted revision, and the draft below it."""
  for line in lines:
    if _accepted(line):
      yield _pair(
        line, line["id"], line["final"]["text"], line["draft"]["text"], spec
      )


def soft_pairs(
  lines: Iterable[Line], spec: str, *, temperature: float, clamp: float
) -> Iterable[dict[str, Any]]:
  """Response pairs of sampled answers, by the judge's preference.

  P(A over B) = sigmoid((z_A - z_B) / temperature), kept within [clamp, 1 -
  clamp]. A pair stands there both ways round, weighted by P and 1 - P: a loss
  linear in its weights then has a soft label. Answers that are equal, unusable
  or without a finite score make none.

  Source: Constitutional AI (arXiv:2212.08073), section 4.1, where P is the
  normalised probability of the answers (A) and (B), clamped to [0.4, 0.6]
  after a chain of thought.
  """
  for line in lines:
    good = [x if x.get("z") is not None else None for x in line["sampled"]]
    for i in range(0, len(good), 2):
      a, b = good[i : i + 2]
      if a is None or b is None or a["text"] == b["text"]:
        continue
      p = float(expit((a["z"] - b["z"]) / temperature))
      p = min(max(p, clamp), 1 - clamp)
      for way, (win, lose, weight) in enumerate(((a, b, p), (b, a, 1 - p))):
        if weight > 0:
          name = f"{line['id']}-sampled-{i // 2}-{way}"
          row = _pair(line, name, win["text"], lose["text"], spec)
          yield row | {"weight": weight}


def _pair(
  line: Line, name: str, chosen: str, rejected: str, spec: str
) -> dict[str, Any]:
  return {
    "id": name,
    "prompt": list(line["prompt"]),
    "chosen": [{"role": "assistant", "content": chosen}],
    "rejected": [{"role": "assistant", "content": rejected}],
    "kind": "resp",
    "spec": spec,
    "source": SOURCE,
  }


# -- The report --------------------------------------------------------------


def report(
  lines: Sequence[Line], *, principles: Sequence[str], seed: int = 0
) -> dict[str, Any]:
  """Compliance before and after, acceptance by rule, refusals, failures.

  Shares have Wilson intervals, differences (final less draft) those of a
  bootstrap that draws prompts, both at 95 %.

  Args:
    lines: of revisions.jsonl.
    principles: names of the rules.
    seed: of the bootstrap.

  Returns:
    `prompts`, `allowed`, `failures` (drafts by what was wrong), `revisions`
    (by outcome), `acceptance` (by rule), `revised` (prompts whose answer is
    not the draft), and for the prompts with a draft, those to be revised
    (`main`) and those of align.constitutional.allowed (`allowed_prompts`)
    apart: `judge`, `monitor`, `refusals`, `refusals_of_complying` (of prompts
    whose draft complied and did not refuse), `helpfulness`; `seconds`.
  """
  outcomes = Counter(x["outcome"] for y in lines for x in y["revisions"])
  found: dict[str, Any] = {
    "prompts": len(lines),
    "allowed": sum(line["allowed"] for line in lines),
    "failures": dict(Counter(x["failure"] for x in lines if x["failure"])),
    "revisions": dict(outcomes),
    "acceptance": {name: _by_rule(lines, name) for name in principles},
  }
  for name, allowed in (("main", False), ("allowed_prompts", True)):
    some = [x for x in lines if x["allowed"] == allowed and not x["failure"]]
    if some:
      found[name] = _before_and_after(some, seed=seed)
  found["seconds"] = sum(line.get("seconds", 0.0) for line in lines)
  return found


def _by_rule(lines: Sequence[Line], name: str) -> dict[str, Any]:
  drawn = [x for y in lines for x in y["revisions"] if x["rule"] == name]
  took = sum(x["outcome"] == "accepted" for x in drawn)
  return {"drawn": len(drawn), "accepted": took} | rate(
    "rate", took, len(drawn)
  )


def _before_and_after(lines: Sequence[Line], *, seed: int) -> dict[str, Any]:
  revised = sum(map(_accepted, lines))
  found: dict[str, Any] = {"prompts": len(lines), "revised": revised}
  found |= rate("revised_rate", revised, len(lines))
  for name, key in (("judge", "z"), ("monitor", "monitor")):
    known = [x for x in lines if _both(x, key) is not None]
    if known:
      z = np.array([_both(x, key) for x in known], np.float64)
      found[name] = _compared(z > 0, seed=seed)
      found[name] |= {"unscored": len(lines) - len(known)}
      found[name]["mean_log_odds"] = _means(z, seed=seed)
  refused = np.array(
    [[x["draft"]["refuses"], x["final"]["refuses"]] for x in lines]
  )
  found["refusals"] = _compared(refused, seed=seed)
  for name, key in (("judge", "z"), ("monitor", "monitor")):
    # No refusal was called for: the draft answered, and was found to comply.
    good = [
      (x["draft"].get(key) or 0.0) > 0 and not x["draft"]["refuses"]
      for x in lines
    ]
    count = int(np.sum(refused[good, 1]))
    found[f"refusals_of_complying_by_{name}"] = {
      "count": count,
      "of": sum(good),
    } | rate("rate", count, sum(good))
  h = [_both(x, "h") for x in lines]
  if any(h):
    pairs = np.array([x for x in h if x is not None], np.float64)
    found["helpfulness"] = _means(pairs, seed=seed)
  return found


def _both(line: Line, key: str) -> tuple[float, float] | None:
  """A number of the draft and of the final answer, if both are known."""
  a, b = line["draft"].get(key), line["final"].get(key)
  return None if a is None or b is None else (a, b)


def _compared(held: np.ndarray, *, seed: int) -> dict[str, Any]:
  """Shares of something that holds of drafts [:, 0] and of answers [:, 1]."""
  found: dict[str, Any] = {"of": len(held)}
  for i, side in enumerate(("draft", "final")):
    found |= rate(side, int(held[:, i].sum()), len(held))
  return found | {"difference": _difference(held.astype(float), seed=seed)}


def _means(values: np.ndarray, *, seed: int) -> dict[str, Any]:
  draft, final = values.mean(axis=0).tolist()
  change = _difference(values, seed=seed)
  return {"draft": draft, "final": final, "difference": change}


def _difference(values: np.ndarray, *, seed: int) -> dict[str, float]:
  """Mean of the final less the draft, prompts drawn with replacement."""
  change = values[:, 1] - values[:, 0]
  spread = metrics.intervals(
    lambda w: {"mean": (w @ change) / w.sum(axis=-1)},
    range(len(change)),
    resamples=RESAMPLES,
    seed=seed,
  )
  low, high = spread["mean"]
  return {"mean": float(change.mean()), "low": low, "high": high}
