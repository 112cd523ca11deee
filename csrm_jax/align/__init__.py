"""Alignment: policies that earn reward under constraints written as specs."""

import sys
from typing import Any

from csrm_jax import CallableModule


def align(*args: Any, **kwargs: Any) -> dict[str, Any]:
  """`run.align`: aligns a policy, see there."""
  from csrm_jax.align import run  # not at import: the losses need no models

  return run.align(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule  # `csrm_jax.align(...)`
