"""Reward distillation of SmolLM2-135M: log-ratios learn R H from pairs.

Cost: 2 CPU cores, about 60 s an update of 8 x 16 responses, 2 hours, reckoned.
Needs a reward model, --config.align.reward=DIR, of configs/reward_smollm2.py.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 120
  c.checkpoint_every = 10
  c.model.path = "smollm2"
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 3e-4
  c.optimizer.final_lr = 0.3
  c.align.method = "distill"
  c.align.specs = "specs/align/shop_desk.yaml"
  c.align.prompts = "specs/align/prompts.jsonl"
  c.align.prompts_per_step = 8
  c.align.samples = 16
  c.align.top = 4
  c.align.bottom = 4
  c.align.contrasts = 2
  c.align.beta = 0.1
  c.align.prompt_length = 64
  c.align.response_length = 64
  return c
