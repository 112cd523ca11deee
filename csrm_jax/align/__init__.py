"""Alignment: policies that earn reward under constraints written as specs."""

import sys
from typing import Any

from csrm_jax import CallableModule


def align(*args: Any, **kwargs: Any) -> dict[str, Any]:
  """See `csrm_jax.align.run.align`."""
  from csrm_jax.align import run

  return run.align(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule  # `csrm.align(...)`
