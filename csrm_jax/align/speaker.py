"""The model that drafts, criticises and revises, heard in whole sentences."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from csrm_jax.align import rollout
from csrm_jax.align.prompts import Prompt
from csrm_jax.align.setup import Setup
from csrm_jax.data import prompt as formats
from csrm_jax.types import Params

_END = re.compile(r"[.!?][\"')*\]]*(?=\s|$)")


class Speaker(NamedTuple):
  """The model of a run's policy.

  Attributes:
    setup: of the run.
    params: of its policy.
  """

  setup: Setup
  params: Params

  def __call__(
    self,
    asked: Sequence[Prompt],
    key: jax.Array,
    *,
    drafting: bool = False,
    critique: bool = False,
    samples: int = 1,
  ) -> list[tuple[str, str]]:
    """(text in whole sentences, or "" and what is wrong) for each prompt."""
    align = self.setup.config.align
    own, tokenizer = align.constitutional, self.setup.tokenizer
    room = align.prompt_length if drafting else own.prompt_length
    spec = self.setup.bound[0].spec if drafting else None
    if not align.policy_reads_spec:
      spec = None
    found = [("", "long")] * (len(asked) * samples)
    fit = []
    for i, messages in enumerate(asked):
      try:
        formats.fit_to(tokenizer, messages, spec, room)
      except ValueError:  # counted
        continue
      fit.append(i)
    if not fit:
      return found
    said = rollout.sample(
      self.setup.networks.policy,
      self.params,
      tokenizer,
      [asked[i] for i in fit],
      key=key,
      samples=samples,
      prompt_length=room,
      response_length=(
        own.critique_length if critique else align.response_length
      ),
      temperature=align.temperature if drafting else own.temperature,
      spec=spec,
      rows=align.prompts_per_step,
      on_long="cut",
      mesh=self.setup.mesh,
    )
    for at, (text, stopped) in enumerate(
      zip(said.texts, said.stopped.tolist(), strict=True)
    ):
      which, turn = divmod(at, samples)
      found[fit[which] * samples + turn] = whole(text, stopped)
    return found


def whole(text: str, stopped: bool) -> tuple[str, str]:
  """A response in whole sentences, or "" and what is wrong with it.

  Args:
    text: of the model.
    stopped: whether it came to its end; else it loses its last, broken
      sentence.
  """
  text = text.strip()
  if not text:
    return "", "empty"
  if not stopped:
    ends = [match.end() for match in _END.finditer(text)]
    text = text[: ends[-1]] if ends else ""
  return text, "" if text else "cut"
