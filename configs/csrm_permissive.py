"""The adapter that ships: LoRA on permissively licensed sets and our world.

Cost: 2 CPU cores, 71 min beside other work; figures in benchmarks/quality.
Needs --config.data.path=FOLDER of the sets. Afterwards:
launch/export.py --model=WORKDIR --output=DIR --format=adapter
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 970  # one pass
  c.batch_rows = 2
  c.checkpoint_every = 100
  c.model.path = "smollm2"
  # 9.3 MiB in bfloat16 on all layers, 13 MiB with the tokenizer; 27 is the
  # highest rank whose adapter stays below 16 MiB.
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 1e-3  # ten times that of full fine-tuning
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  # A group of the world is many rows, polyguard has many times the others.
  c.data.source = "synthetic:200,polyguard:4000,diasafety:600,permissive"
  c.data.examples = 300  # families of each other source
  # Rows of 512 would put aside half of pyrit_scored and harmbench_responses: a
  # sequence may take half a row.
  c.data.row_length = 1024
  c.data.slots = 48
  c.data.pairs = 96
  c.data.stages = "synthetic/presence:40"
  c.data.refusals = 0.3
  c.data.on_bad_row = "quarantine"  # answers longer than a row allows
  return c
