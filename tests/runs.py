"""The smallest training run that is whole: shared by slow-ish tests."""

from configs import tiny

SMALL = {
  "steps": 8,
  "batch_rows": 4,
  "checkpoint_every": 3,
  "data.examples": 8,
}


def tiny_config(**changes):
  """configs/tiny.py, smaller still."""
  config = tiny.get_config()
  config.update_from_flattened_dict(SMALL | changes)
  return config
