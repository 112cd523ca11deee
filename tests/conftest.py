"""Settings that every test shares."""

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Annotated shapes and types hold at run time, in every call of every test.
install_import_hook("csrm_jax", "beartype.beartype")

# Time is measured in benchmarks/, not here: a busy machine fails no test.
settings.register_profile(
  "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")
