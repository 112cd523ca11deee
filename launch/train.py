"""Trains a configurable safety reward model.

python launch/train.py --config=configs/demo.py --workdir=runs/demo
"""

from absl import app, flags, logging
from ml_collections import config_flags

from csrm_jax import errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Receives all that a run makes")


def main(_):
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file
  from csrm_jax.train.loop import fit

  with errors.told():
    result = fit(_CONFIG.value, str(_WORKDIR.value))
    for name, value in result.items():
      print(f"{name}: {value}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
