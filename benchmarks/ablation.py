"""Ablations: one recipe, one thing changed a row, the same budget of tokens.

python benchmarks/ablation.py --workdir=DIR --output=FILE.json \
    [--data=FOLDER] [--steps=N] [--seeds=3] [--table=FILE.md]

Every row is trained in DIR/ROW-seedS and resumes there; rows that are finished,
there or in FILE.json, are not repeated. FILE.json is written anew after every
row, with the rows that were asked for.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ablation_table
import jax
import machine

from csrm_jax import errors
from csrm_jax.config import Config, from_file
from csrm_jax.data import loader, prepare, sources, trie
from csrm_jax.eval import run
from csrm_jax.train import loop

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Variant(NamedTuple):
  """A row of the table.

  Attributes:
    says: what differs from the full recipe.
    changes: the keys that do.
    augmented_only: whether the synthetic groups go, and with them the stages,
      which are made of them: their specs contradict each other by design.
  """

  says: str
  changes: Mapping[str, Any] = {}
  augmented_only: bool = False


_LAYERS = {"model.lora_rank": 0, "optimizer.lr": 1e-4}
_NO_PAIRS = {"loss.spec": 0.0, "loss.resp": 0.0, "loss.severity": 0.0}
VARIANTS: Mapping[str, Variant] = {
  "full": Variant("the recipe as it is"),
  "spec_blind": Variant(
    "every text under the specs of other families, labels kept",
    {"data.shuffle_specs": True},
  ),
  "no_augmentation": Variant(
    "each text under its first spec alone, BCE alone, no edits",
    {"data.operators": "none", **_NO_PAIRS},
    augmented_only=True,
  ),
  "ladders_only": Variant(
    "strictness ladders the only edits",
    {"data.operators": "ladder"},
    augmented_only=True,
  ),
  "no_ladders": Variant(
    "all edits but ladders, no rules with levels, no order by severity",
    {
      "data.operators": "-ladder",
      "data.kinds": "presence=0.4,swap=0.3,carve=0.06,refusal=0.12",
      "loss.severity": 0.0,
    },
  ),
  "no_spec_pairs": Variant("no Bradley-Terry over specs", {"loss.spec": 0.0}),
  "no_response_pairs": Variant(
    "no Bradley-Terry over responses",
    {"loss.resp": 0.0, "loss.severity": 0.0},
  ),
  "bce_alone": Variant("no Bradley-Terry at all", _NO_PAIRS),
  "no_curriculum": Variant(
    "everything mixed from the first step", {"data.stages": ""}
  ),
  "upper_24_layers": Variant(
    "the upper 24 layers themselves trained, at a tenth of the rate",
    _LAYERS | {"model.train_layers": 24},
  ),
  "all_layers": Variant(
    "all layers themselves trained, at a tenth of the rate", _LAYERS
  ),
  "rank_4": Variant("adapters of rank 4", {"model.lora_rank": 4}),
}


def recipe(name: str, seed: int, args: argparse.Namespace) -> Config:
  """The config of a row, but for its number of steps.

  Raises:
    ValueError: the row needs an augmented source and the recipe has none.
  """
  variant = VARIANTS[name]
  config = from_file(args.config)
  config.seed = seed
  config.steps = args.steps or config.steps
  config.data.source = args.source or config.data.source
  config.data.path = args.data
  if args.data and not args.source:
    config.data.source += ",beavertails_augmented"
  if variant.augmented_only:
    limits = sources.split(config.data.source)
    kept = [
      f"{name}:{n}" if n else name
      for name, n in limits.items()
      if name in sources.AUGMENTED
    ]
    if not kept:
      raise ValueError(
        f"--source={config.data.source}: row {name!r} needs one of "
        f"{', '.join(sources.AUGMENTED)}; add it, or leave the row out (--only)"
      )
    config.data.source, config.data.stages = ",".join(kept), ""
  config.update_from_flattened_dict(dict(variant.changes))
  return config


def tokens_after(config: Config, folder: Path, steps: int) -> int:
  """Tokens, padding excluded, that the first steps of a run see."""
  rows = loader.open_rows(folder, seed=config.seed)
  return sum(_tokens(config, rows, k) for k in range(steps))


def _tokens(config: Config, rows: loader.Rows, k: int) -> int:
  batch = loader.batch_at(rows, k, batch_rows=config.batch_rows)
  return int(trie.real_tokens(batch).sum())


def steps_for(config: Config, folder: Path, budget: int) -> int:
  """The number of steps, at least 1, whose tokens come nearest to a budget."""
  rows = loader.open_rows(folder, seed=config.seed)
  steps = seen = last = 0
  while seen < budget:
    last = _tokens(config, rows, steps)
    seen, steps = seen + last, steps + 1
  short = budget - (seen - last)
  return steps if steps < 2 or seen - budget <= short else steps - 1


def one_row(
  name: str, seed: int, args: argparse.Namespace
) -> dict[str, Any] | None:
  """Trains and evaluates a row, as far as that is not done yet.

  Returns:
    What the table says of it; None if SIGTERM ended the training early.

  Raises:
    ValueError: its folder holds another recipe.
  """
  config = recipe(name, seed, args)
  mark = fingerprint(config, args)
  folder = args.workdir / f"{name}-seed{seed}"
  tokenizer = loop.load_tokenizer(config)
  if name == "full":
    rows = prepare.ensure(config, folder, tokenizer)
    budget = tokens_after(config, rows, config.steps)
  else:
    full = recipe("full", seed, args)
    beside = args.workdir / f"full-seed{seed}"
    budget = tokens_after(
      full, prepare.ensure(full, beside, tokenizer), full.steps
    )
    rows = prepare.ensure(config, folder, tokenizer)
    config.steps = steps_for(config, rows, budget)
  asked = {
    "config": config.to_dict(),
    "suites": args.suites,
    "data": args.data,
    "rows": args.rows,
    "bootstrap": args.bootstrap,
  }
  done = read(folder / "row.json")
  if done.get("asked") == asked:
    return done["result"] | {"recipe_sha256": mark}
  trained = read(folder / "result.json")
  same = read(folder / "config.json") == config.to_dict()
  if not same or "params_sha256" not in trained:
    trained = loop.fit(config, folder)
    jax.clear_caches()  # the next row compiles a step of its own
    if "params_sha256" not in trained:
      return None
  report = run.evaluate(
    folder,
    args.suites,
    data=args.data,
    output=folder / "report.json",
    judge_names=("csrm",),
    rows=args.rows,
    bootstrap=args.bootstrap,
  )
  jax.clear_caches()
  meta = prepare.read_meta(rows)
  result = {
    "row": name,
    "seed": seed,
    "recipe_sha256": mark,
    "says": VARIANTS[name].says,
    "changes": dict(VARIANTS[name].changes),
    "source": config.data.source,
    "stages": config.data.stages,
    "steps": config.steps,
    "budget_tokens": budget,
    "tokens": trained["tokens"],
    "packed_rows": meta["rows"],
    "rows_seen": config.steps * config.batch_rows,
    "label_balance": meta["label_balance"],
    "quarantined": meta["counts"].get("quarantined", 0),
    "loss": trained["loss"],
    "temperature": trained["temperature"],
    "params_sha256": trained["params_sha256"],
    "seconds": trained["seconds"],
    "evaluation_seconds": report["seconds"],
    "suites": {
      suite: {k: v for k, v in found.items() if k != "judges"}
      | {"metrics": found["judges"]["csrm"]}
      for suite, found in report["suites"].items()
    },
    "notes": report.get("notes", []),
  }
  write(folder / "row.json", {"asked": asked, "result": result})
  return result


def fingerprint(config: Config, args: argparse.Namespace) -> str:
  """Of what a row's figures follow from; the place of the sets does not count.

  Args:
    config: of `recipe`.
    args: the flags.
  """
  told = config.to_dict()
  told["data"]["path"] = ""
  told |= {key: getattr(args, key) for key in ("suites", "rows", "bootstrap")}
  return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
  """A JSON file; {} without it."""
  return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, content: Mapping[str, Any]) -> None:
  """Replaced whole: a killed run leaves no half file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, indent=2) + "\n")
  os.replace(partial, path)


def ablate(args: argparse.Namespace) -> dict[str, Any]:
  """Every row for every seed, seeds outermost; the content of the output."""
  wanted = [(name, seed) for seed in range(args.seeds) for name in args.only]
  told = {
    row.get("recipe_sha256"): row for row in read(args.output).get("rows", [])
  }
  found = {
    (name, seed): told[mark]
    for name, seed in wanted
    if (mark := fingerprint(recipe(name, seed, args), args)) in told
  }
  for name, seed in wanted:
    if (name, seed) in found:
      continue
    print(f"{name}, seed {seed}: {VARIANTS[name].says}", flush=True)
    result = one_row(name, seed, args)
    if result is None:
      print("stopped and saved; run the same command to go on")
      break
    found[name, seed] = result
    _written([found[row] for row in wanted if row in found], args)
  return _written([found[row] for row in wanted if row in found], args)


def _written(
  found: Sequence[dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
  result = {
    **machine.describe(PACKAGES),
    "config": Path(args.config).name,
    "suites": args.suites,
    "rows": list(found),
    "spread": ablation_table.spread(found),
  }
  write(args.output, result)
  if args.table:
    args.table.parent.mkdir(parents=True, exist_ok=True)
    args.table.write_text(ablation_table.markdown(result))
  return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The flags.

  Raises:
    ValueError: an unknown row, or a number out of range.
  """
  root = Path(__file__).parent.parent
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--output", type=Path, required=True, help="FILE.json")
  parser.add_argument("--table", type=Path, help="FILE.md, the same as tables")
  parser.add_argument("--data", help="folder of the real sets")
  parser.add_argument("--config", default=str(root / "configs" / "ablation.py"))
  parser.add_argument(
    "--source",
    help="in place of the recipe's data.source (to which --data adds"
    " beavertails_augmented)",
  )
  parser.add_argument("--steps", type=int, default=0, help="0: the recipe's")
  parser.add_argument("--seeds", type=int, default=1, help="0 to this less 1")
  parser.add_argument(
    "--suites",
    help="as --suite of launch/evaluate.py; default: synthetic_unseen, with"
    " --data also beavertails and polyguard",
  )
  parser.add_argument("--rows", type=int, default=400, help="of each suite")
  parser.add_argument("--bootstrap", type=int, default=500)
  parser.add_argument(
    "--only", default=",".join(VARIANTS), help="rows joined by commas"
  )
  args = parser.parse_args(argv)
  args.only = [n.strip() for n in args.only.split(",") if n.strip()]
  for name in args.only:
    if name not in VARIANTS:
      raise ValueError(
        f"--only: {name!r} is no row; choose from {', '.join(VARIANTS)}"
      )
  for name, least in (("steps", 0), ("seeds", 1), ("rows", 0)):
    if getattr(args, name) < least:
      value = getattr(args, name)
      raise ValueError(f"--{name}={value}: give {least} or more")
  if not args.suites:
    real = ",beavertails,polyguard" if args.data else ""
    args.suites = "synthetic_unseen" + real
  return args


def main() -> None:
  with errors.told():
    result = ablate(args := parse())
  print(ablation_table.markdown(result))
  print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
