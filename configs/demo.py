"""SmolLM2-135M reads short specs of the synthetic world; `make demo`.

Cost: see `benchmarks/quality/README.md` for the minutes last measured.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 560
  c.batch_rows = 2
  c.checkpoint_every = 140
  c.keep_checkpoints = 1
  c.model.path = "smollm2"
  # Adapters on all layers beat the upper layers themselves; docs/decisions.md.
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.dtype = "mixed"
  c.model.remat = "none"  # memory is no concern at this size, time is
  c.optimizer.lr = 1e-3
  # Pairs of specs teach a model to read its spec; see docs/decisions.md.
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.data.examples = 700
  c.data.row_length = 512
  c.data.slots = 24
  c.data.pairs = 48
  c.data.max_rules = 3
  c.data.refusals = 0.3
  # Which rule applies before how it is worded: mixed from the start, neither
  # is learnt in this time.
  c.data.stages = "synthetic/presence:36"
  return c
