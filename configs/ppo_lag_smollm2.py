"""PPO-Lagrangian of SmolLM2-135M: helpfulness, bound by specs.

Cost: half an hour on one CPU core, 17 s an update (two runs at a time on two
cores). Reward and judge are those that ship with the repository. The policy
follows its spec alone: specs/align/book_club.yaml (--config.align.specs) is
another one. It is meant to start from what configs/sft_smollm2.py leaves:
--config.model.path=runs/sft/policy
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 100
  c.checkpoint_every = 10
  c.model.path = "smollm2"
  c.model.train_layers = 12  # of 30
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "layer"
  c.model.dtype = "mixed"
  c.optimizer.lr = 1e-3
  c.optimizer.final_lr = 0.3
  c.align.judge_dtype = "mixed"
  c.align.specs = "specs/align/shop_desk.yaml"
  c.align.limits = "0.2"  # the mean is 0.37 there, under both specs
  c.align.multiplier.start = 4.0
  c.align.multiplier.lr = 0.15
  c.align.multiplier.most = 20.0
  c.align.multiplier.window = 64
  c.align.reward = "models/smollm2-135m-helpfulness"
  c.align.reward_scale = 0.4  # a deviation of its answers is 1.3 at the start
  c.align.prompts = "specs/align/prompts.jsonl"  # half of them each topic
  c.align.prompts_per_step = 16
  c.align.samples = 1
  c.align.prompt_length = 40
  c.align.response_length = 40
  c.align.logit_tokens = 40
  c.align.temperature = 0.7  # at 1 it rambles, weights of 4 bits as they are
  c.align.kl = 0.03
  c.align.gae_lambda = 0.8
  c.align.critic_lambda = 1.0
  c.align.evaluate_every = 20
  c.align.evaluate_prompts = 96
  return c
