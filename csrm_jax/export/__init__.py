"""Models for others to run: a Hugging Face folder and its model card."""

import sys
from typing import Any

from csrm_jax import CallableModule


def export(*args: Any, **kwargs: Any) -> dict[str, Any]:
  """See `csrm_jax.export.huggingface.export`."""
  from csrm_jax.export import huggingface

  return huggingface.export(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule  # `csrm.export(...)`
