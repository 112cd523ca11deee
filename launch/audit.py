"""Audits an alignment run: was its judge gamed, does it refuse too much?

python launch/audit.py --workdir=runs/desk --allowed=topic=stories

Compares the responses before training with the last ones, by the judge of the
run and by one that had no part in it. docs/audit.md explains the checks.
"""

import argparse

from csrm_jax import errors


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "--workdir", required=True, help="of launch/align.py, evaluated"
  )
  parser.add_argument(
    "--output", default="", help="folder; default: WORKDIR/audit"
  )
  parser.add_argument(
    "--gold",
    default="",
    help="folder of the second judge; default: align.monitor of the run",
  )
  parser.add_argument(
    "--allowed",
    default="",
    help="FIELD=VALUE of the rows of the run's file of prompts: those that the"
    " spec allows to answer",
  )
  flags = parser.parse_args()
  with errors.told():
    from csrm_jax.align.audited import audit_run

    output = flags.output or f"{flags.workdir}/audit"
    found = audit_run(
      flags.workdir, output, gold=flags.gold, allowed=flags.allowed
    )
  for name, report in found.items():
    for phase in ("before", "after"):
      for check, result in report[phase].items():
        verdict = {True: "passed", False: "FAILED", None: ""}[result["passed"]]
        value = result["value"]
        shown = "not measured" if value is None else f"{value:.3f} {verdict}"
        print(f"{name} {phase} {check}: {shown}")
    print(f"{name}: {output}/{name}/audit.html")


if __name__ == "__main__":
  main()
