"""One constitutional round of SmolLM2-135M: draft, revise by the spec's rules.

Without a critic: so small a reviser copies what it reads of critique and answer
(docs/decisions.md). Nothing is trained. --config.align.monitor=DIR names a
second judge, --config.align.reward=DIR the model of helpfulness; pairs.jsonl
of the workdir is what configs/dpo_smollm2.py takes. Cost: 35 minutes for 224
prompts on one CPU core; 4 GB of memory with all three models beside.
"""

from csrm_jax.config import default


def get_config():
  c = default()
  c.model.path = "smollm2"
  c.align.method = "constitutional"
  c.align.specs = "specs/align/front_office.yaml"
  c.align.prompts = (
    "synthetic/medical_dosage,weight_loss_diets,investment_tips,gambling,"
    "refund_promises,discounts_haggling,legal_advice,landlord_disputes,alcohol,"
    "tobacco_vaping,homework_answers,competitor_names,visa_immigration"
  )
  c.align.prompts_per_step = 8
  c.align.prompt_length = 64
  c.align.response_length = 48
  c.align.temperature = 0.7  # at 1 it rambles, weights of 4 bits as they are
  c.align.constitutional.prompts = 200
  c.align.constitutional.revisions = 3
  c.align.constitutional.draw = "judged"
  c.align.constitutional.wording = "plain"
  c.align.constitutional.critique_length = 0
  c.align.constitutional.prompt_length = 96
  c.align.constitutional.temperature = 0.5
  c.align.constitutional.allowed = "synthetic/pet_care,astrology"
  c.align.constitutional.allowed_prompts = 24
  return c
