"""Settings that every test shares."""

from hypothesis import HealthCheck, settings

# Time is measured in benchmarks/, not here: a busy machine fails no test.
settings.register_profile(
  "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")
