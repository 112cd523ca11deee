"""Supervised fine-tuning of SmolLM2-135M: where the alignment runs start.

Cost: 2 CPU cores, 5 minutes. What a policy never says no reward can find. Here
it learns to answer directly, two times in three, or with reserve;
configs/ppo_lag_smollm2.py goes on from the folder:
--config.model.path=WORKDIR/policy
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 75  # 1200 rows, each of 600 twice
  c.checkpoint_every = 25
  c.model.path = "smollm2"
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "layer"
  c.model.dtype = "mixed"
  c.optimizer.lr = 5e-4
  c.align.method = "sft"
  c.align.ptx = "specs/align/answers.jsonl"
  c.align.ptx_rows = 16
  c.align.prompt_length = 40
  c.align.response_length = 40
  c.align.logit_tokens = 40
  c.align.temperature = 0.7  # of the runs that go on from it
  return c
