"""Llama 3.1 70B, all layers, rows of 4096 tokens. Cost: a TPU v5p:4x8x8.

Weights and tokenizer: --config.model.path=FOLDER; data: --config.data.path.
Compiled for that: 13.0 of 95 GiB a chip, 1.32 s a step at best, see
benchmarks/pods; never run.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 2000
  c.batch_rows = 64
  c.checkpoint_every = 100
  c.model.path = ""
  c.model.size = "llama3_70b"
  c.model.remat = "layer"
  c.mesh.fsdp = 64
  c.mesh.tensor = 4
  c.optimizer.lr = 1e-5
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.data.source = "mixture"
  c.data.row_length = 4096
  c.data.slots = 192
  c.data.pairs = 384
  c.data.refusals = 0.3
  c.data.on_bad_row = "quarantine"
  return c
