"""PPO-Lagrangian of SmolLM2-135M: helpfulness, bound by specs.

Cost: 2 CPU cores, about 35 s an update, 90 minutes, reckoned. Needs a reward
model: --config.align.reward=DIR, of configs/reward_smollm2.py. The policy
follows its spec alone: specs/align/study_hall.yaml (--config.align.specs) is
another one.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 150
  c.checkpoint_every = 10
  c.model.path = "smollm2"
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 4e-4
  c.optimizer.final_lr = 0.3
  c.align.specs = "specs/align/clinic_desk.yaml"
  c.align.limits = "0.25"  # about 0.35 at the start
  c.align.multiplier.start = 4.0
  c.align.multiplier.lr = 0.1
  c.align.multiplier.most = 10.0
  c.align.reward_scale = 0.25  # that reward model's answers differ by 4
  c.align.prompts = "specs/align/prompts.jsonl"  # half of them each topic
  c.align.prompts_per_step = 16
  c.align.samples = 1
  c.align.prompt_length = 40
  c.align.response_length = 64
  c.align.temperature = 0.7  # at 1 it rambles, weights of 4 bits as they are
  c.align.kl = 0.03
  c.align.epochs = 2
  c.align.evaluate_prompts = 48
  return c
