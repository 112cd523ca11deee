"""PPO-Lagrangian of Llama 3.1 8B under every spec here. Cost: a TPU v5p:4x4x4.

Policy and both critics have that size and are trained in full. Compiled, never
run: launch/align.py works in one process so far, and this machine has several.
launch/compile.py --config=configs/ppo_lag_llama3_8b.py \
  --program=ppo --topology=v5p:4x4x4
"""

from csrm_jax.config import default

SPECS = """
bank coding_assistant customer_support film_studio hospital_intake
kids_tutor language_school mature_game newspaper permissive_default
public_prosecutor social_network align/shop_desk
align/book_club
"""


def get_config():
  c = default()
  c.steps = 500
  c.checkpoint_every = 50
  c.model.path = ""
  c.model.size = "llama3_8b"
  c.model.remat = "layer"
  c.mesh.fsdp = 16
  c.mesh.tensor = 4
  c.optimizer.lr = 1e-6
  c.align.specs = ",".join(f"specs/{name}.yaml" for name in SPECS.split())
  c.align.limits = "0.05"
  c.align.critic_lr = 5e-6
  c.align.prompts_per_step = 64
  c.align.samples = 4
  c.align.minibatches = 4
  c.align.prompt_length = 1024
  c.align.response_length = 1024
  c.align.logit_tokens = 256
  c.align.kl = 0.02
  c.align.multiplier.window = 512
  return c
