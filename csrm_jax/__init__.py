"""Configurable safety reward models: rules in, calibrated log-odds out."""

import importlib
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from csrm_jax.align.run import align as align
  from csrm_jax.eval.run import evaluate as evaluate
  from csrm_jax.export.huggingface import export as export
  from csrm_jax.judge import load as load
  from csrm_jax.score import score as score
  from csrm_jax.spec import Spec as Spec
  from csrm_jax.train.loop import fit as fit

# Imported at first use: `csrm_jax.Spec` alone should not wait for JAX.
_HOMES = {
  "Spec": "csrm_jax.spec",
  "load": "csrm_jax.judge",
  "score": "csrm_jax.score",
  "fit": "csrm_jax.train.loop",
  "evaluate": "csrm_jax.eval.run",
  "export": "csrm_jax.export.huggingface",
  "align": "csrm_jax.align",
}

__all__ = ["Spec", "align", "evaluate", "export", "fit", "load", "score"]


class CallableModule(types.ModuleType):
  """A module that is called like the function of its name.

  `csrm.score(...)` and `csrm.export(...)` are public functions, and importing
  `csrm_jax.score` sets that same attribute to the module: so it is both.
  """

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'csrm_jax' has no attribute {name!r}")
  value = getattr(importlib.import_module(_HOMES[name]), name)
  # The import may have set the attribute; every later access then finds it.
  return globals().get(name, value)
