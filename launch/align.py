"""Aligns a language model to specs: Safe RLHF and its family.

python launch/align.py --config=configs/ppo_lag_smollm2.py \
  --config.align.specs=specs/a.yaml,specs/b.yaml --workdir=runs/ppo_lag

docs/align.md explains the methods, the keys and what a workdir holds.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from csrm_jax import errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Receives all that a run makes")


def main(_):
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file
  with errors.told():
    from csrm_jax.align import rounds, run

    config = _CONFIG.value
    start = rounds.align_rounds if config.align.rounds != 1 else run.align
    result = start(config, str(_WORKDIR.value))
    for name, value in result.items():
      print(f"{name}: {value}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=errors.parsed)
