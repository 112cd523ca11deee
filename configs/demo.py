"""SmolLM2-135M reads short specs of the synthetic world; `make demo`.

Cost: see `benchmarks/quality/README.md` for the minutes last measured.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 480
  c.batch_rows = 2
  c.checkpoint_every = 120
  c.keep_checkpoints = 1
  c.model.path = "smollm2"
  c.model.train_layers = 24
  c.model.remat = "none"  # memory is no concern at this size, time is
  c.model.dtype = "mixed"
  c.optimizer.lr = 1e-4
  # Pairs of specs teach a model to read its spec; see docs/decisions.md.
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.data.examples = 480
  c.data.row_length = 512
  c.data.slots = 24
  c.data.pairs = 48
  c.data.max_rules = 3
  c.data.refusals = 0.3  # else a refusal counts as talk of what it refuses
  # Which rule applies before how it is worded: mixed from the start, neither
  # is learnt in this time.
  c.data.stages = "synthetic/presence:36"
  return c
