"""A judge that knows the truth, for tests of probes and failure checks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from csrm_jax.eval.cases import _FRAME, Case
from csrm_jax.spec import Spec


class Oracle:
  """Scores +3 or -3 by the truth under the spec shown, 0 if contradictory.

  Without a spec, `helpfulness` answers. Specs are recognised by their text:
  `Spec.render` is patched to record it.
  """

  def __init__(self, monkeypatch: Any, cases: Sequence[Case]):
    self.cases = {c.id: c for c in cases}
    self.specs: dict[str, Spec] = {}
    self.asked = 0
    self.helpfulness: Callable[[Case], float] = lambda case: np.nan
    plain = Spec.render

    def recording(spec: Spec) -> str:
      text = plain(spec)
      if not spec.text:
        self.specs[text] = spec
      return text

    monkeypatch.setattr(Spec, "render", recording)

  def truth(self, row: Mapping[str, Any]) -> int:
    """1, 0 or -1."""
    text = row["spec"]
    if text not in self.specs:
      for ours, other in _FRAME.items():
        text = text.replace(other, ours)
    truth = self.cases[row["id"]].truth
    assert truth is not None
    return truth(self.specs[text])

  def __call__(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    self.asked += len(rows)
    known = {1: 3.0, 0: -3.0, -1: 0.0}
    return np.array(
      [
        known[self.truth(row)]
        if "spec" in row
        else self.helpfulness(self.cases[row["id"]])
        for row in rows
      ],
      np.float64,
    )
