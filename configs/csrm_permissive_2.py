"""The adapter that ships, second part: goes on from that of csrm_permissive.

Cost: 2 CPU cores, 91 min beside other work; figures in benchmarks/quality.
Needs --config.data.path=FOLDER of the sets, and --config.model.adapter=DIR, the
export of the first part (launch/export.py --format=adapter). Every family of
the public sets that the first part trained on is among this one's, so suites
leave out both.
"""

from pathlib import Path

from csrm_jax.config import from_file


def get_config():
  c = from_file(Path(__file__).with_name("csrm_permissive.py"))
  c.steps = 850
  c.optimizer.lr = 6e-4  # the adapter is no longer near zero
  c.data.source = (
    "polyguard:7000,synthetic:700,synthetic_augmented:250,answering:350,"
    "diasafety:1500,hh_harmless:600,permissive"
  )
  c.data.stages = ""  # presence is known
  # What the first part does worst weighs more than in the suites.
  c.data.kinds = "presence=0.3,swap=0.22,level=0.16,carve=0.12,refusal=0.2"
  return c
