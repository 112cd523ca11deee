"""The judge as a grader: adapters of SmolLM2-135M on marked completions.

Cost: 2 CPU cores, 400 steps of 1024 tokens; time not measured. Needs the
released gold set: --config.data.path=DATA with DATA/rbr_gold. Only its training
part is read; launch/rules.py grade --grader=WORKDIR then grades with it.
"""

from pathlib import Path

from csrm_jax.config import from_file


def get_config():
  c = from_file(Path(__file__).with_name("csrm_smollm2.py"))
  c.steps = 400
  c.batch_rows = 1
  c.data.source = "rbr_gold_train"
  c.data.row_length = 1024
  c.data.heldout = 0.34  # whole prompts, for grading
  return c
