"""PPO of SmolLM2-135M for helpfulness and rule-based rewards.

Cost: 2 CPU cores, 100 updates; time not measured, above ppo_lag_smollm2.py, as
every proposition is graded on each response. Needs fitted weights
(launch/rules.py): --config.align.rules=DIR. The spec chooses which
weights act: under specs/align/book_club.yaml it refuses where this answers.
"""

from configs import ppo_lag_smollm2


def get_config():
  c = ppo_lag_smollm2.get_config()
  c.steps = 100
  c.align.method = "plain"  # violations are watched; the rules are the reward
  c.align.rbr_weight = 1.0
  c.align.rules_violation = "crosses"
  c.align.evaluate_every = 25
  return c
