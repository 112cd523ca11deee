"""What many constraints cost: seconds an update under 1 and under 50 specs.

python benchmarks/align.py --output=FILE.json [--constraints=50] [--steps=2]
    [--repetitions=3] [--prompts=8] [--samples=2] [--response_length=64]

The policy, its critics and the judge are SmolLM2 as in
configs/ppo_lag_smollm2.py; the judge keeps what it read of each spec. Three
modes take turns: one constraint, all of them, and all of them of which each
response is judged by one, drawn anew (`align.judged=1`).
"""

import argparse
import collections
import functools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import machine
import numpy as np

from csrm_jax import errors, sharding
from csrm_jax.align import feedback, online, ppo
from csrm_jax.align import setup as setups
from csrm_jax.config import Config, from_file
from csrm_jax.data import domains, groups
from csrm_jax.judge import SHIPPED, load
from csrm_jax.spec import Spec

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax")
PARTS = ("sample", "judge", "update")
REWARD = ROOT / "models" / "smollm2-135m-helpfulness"


class Mode(NamedTuple):
  """One way to constrain, ready to run."""

  setup: setups.Setup
  update: Any
  estimates: Any
  held: dict[str, ppo.AlignState]  # its one state, as an update consumes it


def spec_of(number: int) -> Spec:
  """A spec of two rules of the synthetic world: one forbids, one asks."""
  rng = random.Random(f"benchmark/{number}")
  known = list(domains.world().values())
  forbidden = known[number % len(known)]
  others = [d for d in known if d.id != forbidden.id]
  clauses = (
    groups.Clause(forbidden, "forbid"),
    groups.Clause(rng.choice(others), "answer"),
  )
  return Spec(rules=tuple(groups.word(rng, c) for c in clauses))


def recipe(args: argparse.Namespace, specs: list[str], judged: int) -> Config:
  config = from_file(ROOT / "configs" / "ppo_lag_smollm2.py")
  changes: dict[str, Any] = {
    "align.specs": ",".join(specs),
    "align.judged": judged,
    "align.judge": args.judge,
    "align.reward": args.reward,
    "align.prompts": "synthetic",
    "align.prompts_per_step": args.prompts,
    "align.samples": args.samples,
    "align.prompt_length": args.prompt_length,
    "align.response_length": args.response_length,
    # Nothing is learnt, so that all modes judge the same responses.
    "optimizer.lr": 1e-12,
    "align.critic_lr": 1e-12,
  }
  config.update_from_flattened_dict(changes)
  return config


def make(config: Config, reward: Any, compliance: Any, frozen: Any) -> Mode:
  """Models and programs of a mode; frozen leaves are those of the first."""
  setup, params = setups.set_up(config, Path(), reward, compliance)
  if frozen is not None:
    setup = setup._replace(frozen=frozen)
  optimizer = setups.make_optimizers(config)
  fresh = functools.partial(
    setups.first_state, config=config, optimizer=optimizer, k=len(setup.bound)
  )
  shape = jax.eval_shape(fresh, params)
  places = sharding.shardings(shape, setup.mesh)
  update = setups.compile_update(
    shape,
    setup.frozen,
    setup.mesh,
    agent=setup.agent,
    optimizer=optimizer,
    keywords=setups.update_keywords(config, setup.bound),
  )
  state = jax.jit(fresh, out_shardings=places)(params)
  return Mode(setup, update, setups.compile_estimates(setup), {"state": state})


def step(mode: Mode, number: int) -> tuple[dict[str, float], np.ndarray]:
  """Seconds of each part of update `number`, and the tokens it was about."""
  setup, state = mode.setup, mode.held["state"]
  clock = [time.perf_counter()]
  sampled = online.sample(setup, state.params, step=number)
  clock.append(time.perf_counter())
  judged = online.judge(setup, sampled, step=number)
  clock.append(time.perf_counter())
  arrays = online.place(setup, sampled, judged)
  known = mode.estimates(
    state.params, setup.frozen, arrays["tokens"], arrays["length"]
  )
  align = setup.config.align
  indices = ppo.minibatches(
    jax.random.key(number),
    len(sampled.length),
    epochs=align.epochs,
    count=align.minibatches,
  )
  episodes = ppo.Episodes(**arrays, **known)
  mode.held["state"], measured = mode.update(
    state, setup.frozen, episodes, indices, None
  )
  if int(jax.device_get(measured)["skipped"]):
    raise FloatingPointError(f"update {number}: loss or gradient not finite")
  jax.block_until_ready(mode.held["state"].params)
  clock.append(time.perf_counter())
  return dict(zip(PARTS, np.diff(clock).tolist(), strict=True)), sampled.tokens


def summary(values: list[float]) -> dict[str, float]:
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
  specs = []
  for i in range(args.constraints):
    specs.append(str(folder / f"c{i:02d}.txt"))
    Path(specs[-1]).write_text(spec_of(i).render() + "\n", encoding="utf-8")
  first = recipe(args, specs[:1], 0)
  dtype = first.align.judge_dtype
  judge = load(args.judge).computing(dtype)
  reward = feedback.reward_of(load(args.reward).computing(dtype))
  many = recipe(args, specs, 0)
  start = time.perf_counter()
  asked = {
    "one": feedback.compliance_of(judge, feedback.constraints(first)),
    "all": feedback.compliance_of(judge, feedback.constraints(many)),
  }
  read = time.perf_counter() - start
  asked["drawn"] = asked["all"]
  drawn = recipe(args, specs, 1)
  modes: dict[str, Mode] = {}
  for name, config in (("one", first), ("all", many), ("drawn", drawn)):
    frozen = modes["one"].setup.frozen if modes else None
    modes[name] = make(config, reward, asked[name], frozen)
  seconds = {name: collections.defaultdict(list) for name in modes}
  ratios = collections.defaultdict(list)
  same = []
  # The first round of each update compiles what its shapes need.
  for repetition in range(1 + args.repetitions):
    for number in range(args.steps):
      took, about = {}, {}
      for name, mode in modes.items():
        took[name], about[name] = step(mode, number)
        took[name]["step"] = sum(took[name].values())
        print(repetition, number, name, took[name], flush=True)
      same.append(all(np.array_equal(about["one"], x) for x in about.values()))
      if not repetition:
        continue
      for name, parts in took.items():
        ratios[name].append(parts["step"] / took["one"]["step"])
        for part, value in parts.items():
          seconds[name][part].append(value)
  words = judge.tokenizer
  lengths = [len(words.encode(Spec.read(s).render())) for s in specs]
  return {
    "task": "constraints",
    "constraints": args.constraints,
    "responses": args.prompts * args.samples,
    "response_length": args.response_length,
    "seconds": {
      name: {part: summary(v) for part, v in parts.items()}
      for name, parts in seconds.items()
    },
    "ratio_to_one": {name: summary(v) for name, v in ratios.items()},
    "all_seconds": seconds,
    "updates": args.steps,
    "repetitions": args.repetitions,
    "same_responses": all(same),
    "judge": Path(args.judge).name,
    "reward": Path(args.reward).name,
    "judge_dtype": dtype,
    "spec_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths)},
    "seconds_to_read_specs": read,
  } | machine.describe(PACKAGES)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--output", type=Path, required=True)
  for name, value, what in (
    ("constraints", 50, "of the modes `all` and `drawn`"),
    ("steps", 2, "different updates"),
    ("repetitions", 3, "of each update, after one that is not counted"),
    ("prompts", 8, "an update"),
    ("samples", 2, "responses to a prompt"),
    ("prompt_length", 64, "tokens"),
    ("response_length", 64, "tokens, at most"),
  ):
    parser.add_argument(f"--{name}", type=int, default=value, help=what)
  parser.add_argument("--judge", default=str(SHIPPED), help="folder")
  parser.add_argument("--reward", default=str(REWARD), help="folder")
  args = parser.parse_args()
  with errors.told():
    if min(args.constraints - 1, args.steps, args.repetitions) < 1:
      raise ValueError(
        f"--constraints={args.constraints} --steps={args.steps}"
        f" --repetitions={args.repetitions}: use 2, 1 and 1 or more"
      )
    with tempfile.TemporaryDirectory() as folder:
      found = measure(args, Path(folder))
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(json.dumps(found, indent=1) + "\n")
  print(json.dumps({k: found[k] for k in ("seconds", "ratio_to_one")}))


if __name__ == "__main__":
  main()
