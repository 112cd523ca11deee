"""Compiles a recipe for a machine that is not here, and says what it needs.

python launch/compile.py --config=configs/csrm_llama3_8b.py \
  --topology=v5p:4x4x4 [--slices=2] [--program=train|score|ppo|sample] \
  [--advise] [--output=FILE.json] [--hlo=FILE.txt]

Of an alignment recipe, configs/ppo_lag_llama3_8b.py, "ppo" is the update and
"sample" the decoding of its responses.

Exit code 3: it does not fit. Needs libtpu (pip install "csrm_jax[tpu]") and no
TPU.
"""

import os
import sys

# The plug-in asks for its machine's metadata unless told that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

from absl import app, flags
from ml_collections import config_flags

from csrm_jax import errors
from csrm_jax.pods import advise, ahead, alignment, chips, report

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "say v5p:4x4x4 or v5e:4x4")
_SLICES = flags.DEFINE_integer("slices", 1, "of that topology, joined by DCN")
_PROGRAM = flags.DEFINE_enum(
  "program", "train", (*ahead.PROGRAMS, *alignment.PROGRAMS), "what to run"
)
_ADVISE = flags.DEFINE_bool(
  "advise", False, "search mesh, remat, micro-batches"
)
_MOST = flags.DEFINE_integer("most", 12, "compilations of --advise")
_HLO = flags.DEFINE_string("hlo", None, "text file for the compiled program")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report")


def main(_):
  config = _CONFIG.value
  with errors.told():
    topology = chips.parse(str(_TOPOLOGY.value), _SLICES.value)
    aligning = _PROGRAM.value in alignment.PROGRAMS
    if _ADVISE.value and _PROGRAM.value != "train":
      raise ValueError(
        f"--advise searches training recipes, not --program={_PROGRAM.value}:"
        " leave one of the two out"
      )
    if _ADVISE.value:
      tried = advise.advise(config, topology, most=_MOST.value)
      print(advise.table(tried))
      _write(tried)
      sys.exit(0 if tried[0]["fits"] else 3)
    found = report.measure(
      config, topology, str(_PROGRAM.value), hlo_file=_HLO.value
    )
    print(report.text(found))
    if not found["fits"] and aligning:
      print(
        "  try a larger --config.align.minibatches, --config.model.lora_rank=16"
        " or more chips"
      )
    elif not found["fits"]:
      repaired = advise.nearest(config, topology)
      found["nearest"] = repaired[0] if repaired else None
      print(
        f"  would fit with {repaired[0]}" if repaired
        else "  no small change makes it fit; try --advise on more chips"
      )  # fmt: skip
    _write(found)
  sys.exit(0 if found["fits"] else 3)


def _write(found):
  if _OUTPUT.value:
    report.write(_OUTPUT.value, found)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(main, flags_parser=errors.parsed)
