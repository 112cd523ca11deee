"""The same responses and weights under other specs: what editing a spec turns.

python benchmarks/rbr_switch.py --workdir=runs/rbr --output=FILE.json \
    --specs=specs/align/shop_desk.yaml,specs/align/book_club.yaml

WORKDIR is a run of configs/ppo_rbr_smollm2.py. Its first and last responses to
held-out prompts are graded once under each spec, by the run's own grader and
fitted weights; nothing is fitted or trained.
"""

import argparse
import json
from pathlib import Path

import machine
import numpy as np

from csrm_jax import errors
from csrm_jax.align import evaluation, feedback, rule_reward
from csrm_jax.config import default
from csrm_jax.judge import SHIPPED, load

# Of the run's configuration: what grades.
_KEPT = ("judge", "judge_dtype", "rules", "rules_grader", "rules_violation")


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--specs", required=True, help="files, A.yaml,B.yaml")
  parser.add_argument("--output", type=Path, required=True)
  flags = parser.parse_args()
  table = []
  with errors.told():
    said = evaluation.responses(flags.workdir)
    config = default()
    kept = json.loads((flags.workdir / "config.json").read_text("utf-8"))
    for key in _KEPT:
      config.align[key] = kept["align"][key]
    judge = load(config.align.judge or str(SHIPPED))
    judge = judge.computing(config.align.judge_dtype)
    for file in flags.specs.split(","):
      config.align.specs = file
      rules = rule_reward.rules_of(config, judge, feedback.constraints(config))
      if rules is None:
        raise ValueError(f"{flags.workdir}: a run without align.rules")
      for step in (min(said), max(said)):
        talks = [line["messages"] for line in said[step]]
        graded = rules.graded(talks)
        line = {
          "spec": Path(file).stem,
          "step": step,
          "rule_reward": float(np.mean(graded.rewards)),
        }
        for name, (count, of) in rules.shares(talks, graded).items():
          line |= evaluation.rate(name, count, of)
        table.append(line)
        print(json.dumps({k: v for k, v in line.items() if k[-4:] != "high"}))
  about = machine.describe(("jax", "flax", "scikit-learn"))
  flags.output.parent.mkdir(parents=True, exist_ok=True)
  flags.output.write_text(
    json.dumps({"graded": table} | about, indent=1) + "\n", "utf-8"
  )


if __name__ == "__main__":
  main()
