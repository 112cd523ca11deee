"""Safe RLHF's reward model: helpfulness pairs alone. Cost: 2 CPU cores.

About 20 minutes. Needs --config.data.path=FOLDER of the sets. With the
official data: --config.data.source=hf_pku_saferlhf --config.loss.resp=0.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 320
  c.batch_rows = 2
  c.checkpoint_every = 100
  c.model.path = "smollm2"
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 5e-4
  c.optimizer.head_lr = 1.0  # its row starts at zero
  c.loss.help = 1.0
  c.loss.calibration = 0.0
  c.loss.spec = 0.0
  c.loss.resp = 0.0
  c.data.source = "preference_general,contrasts"
  c.data.row_length = 1024
  c.data.slots = 16
  c.data.pairs = 16
  c.data.on_bad_row = "quarantine"  # answers longer than a row allows
  return c
