"""Qwen3 4B, all layers, rows of 4096 tokens. Cost: a TPU v5e:8x8.

Weights and tokenizer: --config.model.path=FOLDER; data: --config.data.path.
Compiled for that: 7.0 of 16 GiB a chip, 0.81 s a step at best, see
benchmarks/pods; never run.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 2000
  c.batch_rows = 64
  c.checkpoint_every = 100
  c.model.path = ""
  c.model.size = "qwen3_4b"
  c.model.remat = "layer"
  c.mesh.fsdp = 16
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
