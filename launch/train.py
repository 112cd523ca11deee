"""Trains a configurable safety reward model.

python launch/train.py --config=configs/demo.py --workdir=runs/demo

On several hosts, run the same command on each: see docs/multihost.md.
"""

import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from csrm_jax import errors, hosts, peers

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Receives all that a run makes")
_HOSTS = {
  name: (flags.DEFINE_string if kind is str else flags.DEFINE_integer)(
    name, None, meaning
  )
  for name, (kind, meaning) in hosts.FLAGS.items()
}


def main(_):
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file
  place: dict[str, Any] = {name: flag.value for name, flag in _HOSTS.items()}
  with errors.told(), peers.joined(**place), errors.told():
    from csrm_jax.train.loop import fit

    result = fit(_CONFIG.value, str(_WORKDIR.value))
    if peers.is_first():
      for name, value in result.items():
        print(f"{name}: {value}")
    if "params_sha256" not in result and peers.several():
      sys.exit(peers.AGAIN)  # so that a JobSet does not take it for finished


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=errors.parsed)
