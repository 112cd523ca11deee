"""Responses of alignment runs, judged under every spec, not only their own.

Whether a run suppressed what its spec forbids, and nothing else, shows under
the specs of other runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csrm_jax.align.evaluation import rate, responses
from csrm_jax.judge import Judge
from csrm_jax.score import score
from csrm_jax.spec import Spec


def crossed(
  workdirs: Mapping[str, str | Path],
  specs: Sequence[str],
  judges: Mapping[str, Judge],
  *,
  last: int,
) -> list[dict[str, Any]]:
  """A line for each run, spec and judge.

  Args:
    workdirs: of the runs, by the name they get.
    specs: files.
    judges: by the name they get.
    last: updates before the end whose evaluations count as the end.

  Returns:
    "run", "spec", "judge", and the violation rates "start" and "end" with 95 %
    Wilson intervals ("start_low", ...).

  Raises:
    ValueError: a run left no responses.
  """
  table = []
  for run, workdir in workdirs.items():
    by_step = responses(Path(workdir))
    first, end = min(by_step), max(by_step)
    ends = [i for i in by_step if i > max(first, end - last)]
    sides = {"start": [first], "end": ends}
    for file in specs:
      spec = Spec.read(file)
      for name, judge in judges.items():
        line: dict[str, Any] = {
          "run": run,
          "spec": spec.spec_id,
          "judge": name,
        }
        for side, steps in sides.items():
          said = [x["messages"] for step in steps for x in by_step[step]]
          found = score(judge, spec, said)
          violations = sum(s.verdict == "violate" for s in found)
          line |= rate(side, violations, len(found))
        table.append(line)
  return table
