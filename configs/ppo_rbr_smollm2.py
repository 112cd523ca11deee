"""PPO of SmolLM2-135M for helpfulness and rule-based rewards.

Cost: 100 updates on one CPU core, half an hour. Needs fitted weights and a
policy that answers and refuses (docs/rules.md has the commands):
--config.align.rules=DIR --config.model.path=DIR. The spec chooses which
weights act: under specs/align/book_club.yaml it refuses where this answers.
"""

from pathlib import Path

from csrm_jax.config import from_file


def get_config():
  c = from_file(Path(__file__).with_name("ppo_lag_smollm2.py"))
  c.steps = 100
  c.align.prompts = "specs/align/requests.jsonl"
  c.align.evaluate_prompts = 40  # all that are held out
  c.align.method = "plain"  # violations are watched; the rules are the reward
  c.align.rbr_weight = 1.0
  c.align.rules_violation = "crosses"
  # Rules give -17 to 13, and a policy that answers and refuses need not
  # leave its start: of what is best it says 0.15 to 0.5 (docs/decisions.md).
  c.align.reward_scale = 0.15
  c.align.kl = 0.2
  c.align.critic_lr = 2e-3
  c.optimizer.lr = 5e-4
  c.optimizer.final_lr = 0.1
  c.optimizer.warmup = 0.15  # critics first
  return c
