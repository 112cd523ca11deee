"""DPO of SmolLM2-135M on pair rows, each under its own spec.

Cost: 2 CPU cores, about 20 s a step of 8 pairs, 1 hour, reckoned. Needs
--config.align.pairs=PAIRS.jsonl; --config.align.specs=A.yaml adds evaluations.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 200
  c.checkpoint_every = 20
  c.model.path = "smollm2"
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 1e-4
  c.align.method = "dpo"
  c.align.beta = 0.1
  c.align.pairs_per_step = 8
  c.align.prompt_length = 192
  c.align.response_length = 128
  return c
