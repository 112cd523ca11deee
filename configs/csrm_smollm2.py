"""SmolLM2-135M on real rows from --config.data.path. Cost: 2 CPU cores.

2.5 s a step with AMX, 100 min (without it 4.3 s); 3 h 13 min beside other work;
figures in benchmarks/quality. Several of the sets are non-commercial, see
docs/data.md. Other sources: --config.data.source=beavertails, pku_pairs,
polyguard, "mixture" for these three, or any set of docs/data.md.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.steps = 2400
  c.batch_rows = 2
  c.checkpoint_every = 50
  c.model.path = "smollm2"
  # Adapters on all layers beat the upper layers themselves; docs/decisions.md.
  c.model.lora_rank = 16
  c.model.lora_alpha = 32.0
  c.model.remat = "none"
  c.model.dtype = "mixed"
  c.optimizer.lr = 1e-3
  c.loss.spec = 1.0
  c.loss.resp = 0.3
  c.data.source = (
    "polyguard:7500,beavertails:2000,beavertails_augmented:450,pku_pairs:1000,"
    "saferlhf_responses:600,diasafety:600,harmbench_responses:200,"
    "pyrit_scored:200,rbr_gold_train:150,hh_harmless:300,answering:350,"
    "synthetic:200"
  )
  c.data.row_length = 768
  c.data.slots = 36
  c.data.pairs = 96
  c.data.refusals = 0.3
  c.data.on_bad_row = "quarantine"  # answers longer than a row allows
  return c
