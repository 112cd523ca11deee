"""PPO-Lagrangian of SmolLM2-135M: helpfulness, bound by specs.

Cost: 2 CPU cores, about 30 s an update, 1 hour, reckoned. Needs a reward model:
--config.align.reward=DIR, of configs/reward_smollm2.py. The policy follows its
spec alone: --config.align.specs=specs/align/study_hall.yaml is another one.
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
  c.align.specs = "specs/align/clinic_desk.yaml"
  c.align.limits = "0.1"
  c.align.prompts = "synthetic/medical_dosage,homework_answers"
  c.align.prompts_per_step = 8
  c.align.samples = 2
  c.align.prompt_length = 64
  c.align.response_length = 64
  c.align.temperature = 0.7  # at 1 it rambles, weights of 4 bits as they are
  c.align.kl = 0.05
  return c
