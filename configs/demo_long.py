"""As the demo, with more groups and domains. Cost: 2 CPU cores, an hour.

Stops and resumes at its checkpoints.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 1800
  c.batch_rows = 2
  c.checkpoint_every = 200
  c.keep_checkpoints = 1
  c.model.path = "smollm2"
  # Adapters on all layers beat the upper layers themselves; docs/decisions.md.
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.dtype = "mixed"
  c.model.remat = "none"
  c.optimizer.lr = 1e-3
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.data.source = "synthetic:500,synthetic_wide:850"
  c.data.row_length = 512
  c.data.slots = 24
  c.data.pairs = 48
  c.data.max_rules = 3
  c.data.refusals = 0.3
  c.data.kinds = "presence=.38,swap=.26,level=.12,carve=.08,refusal=.16"
  # From the 24 domains: 60 groups of the wide world taught no presence.
  c.data.stages = "synthetic/presence:40"
  return c
