"""SmolLM2-135M reads short specs of the synthetic world. Cost: 2 CPU cores.

The job of `make demo`.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 150
  c.batch_rows = 1
  c.model.path = "smollm2"
  c.model.train_layers = 18
  c.optimizer.lr = 1e-4
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.loss.severity = 0.1
  c.data.examples = 400
  c.data.row_length = 1024
  c.data.max_rules = 3
  c.checkpoint_every = 50
  return c
