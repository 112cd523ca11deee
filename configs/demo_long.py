"""As the demo, with more groups. Cost: 2 CPU cores, 75 min (2.5 s a step).

Stops and resumes at its checkpoints.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 1800
  c.batch_rows = 2
  c.checkpoint_every = 100
  c.keep_checkpoints = 1
  c.model.path = "smollm2"
  c.model.train_layers = 24
  c.model.remat = "none"
  c.optimizer.lr = 1e-4
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.data.examples = 1500
  c.data.row_length = 512
  c.data.slots = 24
  c.data.pairs = 48
  c.data.max_rules = 3
  c.data.stages = "synthetic/presence:40"
  return c
