"""A random 2-layer model on the synthetic world. Cost: 2 CPU cores, 1 minute.

For tests and for trying out changes; it learns next to nothing.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 60
  c.batch_rows = 8
  c.checkpoint_every = 10
  c.model.path = "random"
  c.optimizer.lr = 3e-3
  c.data.examples = 120
  c.data.row_length = 512
  return c
