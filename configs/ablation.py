"""The recipe that `benchmarks/ablation.py` varies. Cost: 2 CPU cores.

18 min of training and 2 of evaluation a row of the table, two rows at a time,
a core each; benchmarks/quality has the table.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 200
  c.batch_rows = 2
  c.checkpoint_every = 50
  c.keep_checkpoints = 1
  c.model.path = "smollm2"
  # Adapters on all layers beat the upper layers themselves; docs/decisions.md.
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "layer"  # two trainings at once fill the memory's bandwidth
  c.model.dtype = "mixed"
  c.optimizer.lr = 1e-3
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  # The world's groups, and its conversations under specs that operators vary;
  # with a folder of real sets, those of BeaverTails too.
  c.data.source = "synthetic,synthetic_augmented"
  c.data.examples = 300
  c.data.row_length = 768
  c.data.slots = 48
  c.data.pairs = 64
  c.data.stages = "synthetic/presence:36"
  c.data.refusals = 0.3
  c.data.on_bad_row = "quarantine"
  return c
