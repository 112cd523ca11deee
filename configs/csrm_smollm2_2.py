"""The shipped adapter goes on with the non-commercial sets. Cost: 2 CPU cores.

92 min. On one machine, from models/smollm2-135m-csrm (`model.adapter`). Needs
--config.data.path=FOLDER of the sets. Figures in benchmarks/quality. Licences:
docs/data.md; the weights are not for commercial use.
"""

from pathlib import Path

from csrm_jax.config import from_file


def get_config():
  c = from_file(Path(__file__).with_name("csrm_permissive_2.py"))
  c.steps = 900
  c.checkpoint_every = 50
  c.model.adapter = "models/smollm2-135m-csrm"
  c.loss.resp = 0.6  # a fifth of the rows are pairs of responses
  c.data.source = (
    "polyguard:2000,beavertails:1600,beavertails_augmented:300,pku_pairs:1000,"
    "saferlhf_responses:600,answering:500,diasafety:200,hh_harmless:200,"
    "pyrit_scored:150,rbr_gold_train:150,harmbench_responses:100,"
    "synthetic_wide:120,synthetic_augmented:60"
  )
  return c
