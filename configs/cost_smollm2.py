"""Safe RLHF's cost model, the baseline judge: one policy, never another.

Its cost is minus the score: calibration and response pairs at equal weight are
the paper's cost loss (arXiv:2310.12773, eq. 4). Cost: 2 CPU cores, about an
hour, reckoned. Needs --config.data.path=FOLDER of the sets.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 1000
  c.batch_rows = 2
  c.checkpoint_every = 100
  c.model.path = "smollm2"
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 5e-4
  c.loss.calibration = 1.0
  c.loss.resp = 1.0
  c.loss.spec = 0.0
  c.data.source = "pku_pairs,saferlhf_responses"
  c.data.row_length = 1024
  c.data.slots = 32
  c.data.pairs = 32
  c.data.on_bad_row = "quarantine"  # answers longer than a row allows
  return c
