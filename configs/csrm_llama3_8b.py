"""Llama 3.1 8B, all layers, rows of 4096 tokens. Cost: a TPU v5p:4x4x4.

Weights and tokenizer: --config.model.path=FOLDER; data: --config.data.path.
Compiled for that: 9.7 of 95 GiB a chip, 0.57 s a step at best, see
benchmarks/pods; never run. What it needs elsewhere:
launch/compile.py --config=configs/csrm_llama3_8b.py --topology=v5p:8x8x8
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 2000
  c.batch_rows = 64
  c.checkpoint_every = 100
  c.model.path = ""
  c.model.size = "llama3_8b"
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
