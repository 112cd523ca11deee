"""Who argues in a debate, a model or an endpoint; the whole evaluation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from csrm_jax.align import rollout
from csrm_jax.config import default
from csrm_jax.data import prompt as formats
from csrm_jax.data import tokenizer as tokenizers
from csrm_jax.data.template import Message
from csrm_jax.eval import oversight, recipes, suites
from csrm_jax.eval.chat import Endpoint, connect, in_order
from csrm_jax.eval.oversight import Speak
from csrm_jax.eval.run import ENDPOINT_KEY, open_model
from csrm_jax.model import reward as reward_models


def oversee(
  model: str | Path,
  suite_name: str,
  *,
  name: str = "",
  data: str | Path | None = None,
  rows: int = 0,
  rounds: int = 1,
  prompt_length: int = 512,
  response_length: int = 48,
  bootstrap: int = 2000,
  seed: int = 0,
) -> dict[str, Any]:
  """A judge with and without help on a suite; see `oversight.evaluate`.

  Args:
    model: the judge, as of `judge.load`.
    suite_name: of `suites.read`.
    name: of the debater, see `debater`; "": no debates.
    data: folder of the real sets.
    rows: of the suite, by whole families; 0: all.
    rounds: words of each side.
    prompt_length: see `debater`.
    response_length: see `debater`.
    bootstrap: resamples for the intervals.
    seed: of samples and resamples.

  Returns:
    Its report, and model, suite, debater, rows_cut (questions that the judge's
    context had no room for).
  """
  suite = suites.read(
    suite_name, data=data, model=recipes.here(model), rows=rows, seed=seed
  )
  judge, speak = open_model(model), None
  if name:
    speak = debater(
      name,
      prompt_length=prompt_length,
      response_length=response_length,
      seed=seed,
    )
  found = oversight.evaluate(
    judge.judge,
    suite.rows,
    speak,
    rounds=rounds,
    bootstrap=bootstrap,
    seed=seed,
  )
  told = {"model": judge.facts, "suite": suite_name, "debater": name}
  return told | {"rows_cut": judge.cut.total()} | found


def debater(
  name: str,
  *,
  prompt_length: int = 512,
  response_length: int = 48,
  temperature: float = 0.3,
  rows: int = 8,
  seed: int = 0,
) -> Speak:
  """Both sides of a debate.

  Args:
    name: "endpoint:MODEL@URL" (OpenAI-compatible; greedy; key in
      `eval.run.ENDPOINT_KEY`), or a causal model: "smollm2", a Hugging Face
      folder, a .gguf file.
    prompt_length: tokens; a side whose prompt has more says nothing.
    response_length: tokens of a side's word, at most.
    temperature: of a model that we load.
    rows: of a batch of a model that we load.
    seed: of the samples.

  Raises:
    ValueError: no such model; when asked, an endpoint that does not answer.
  """
  if name.startswith("endpoint:"):
    return _endpoint(name, response_length)
  config = default()
  model, load = reward_models.make(
    config.model,
    path=name,
    row_length=prompt_length + response_length,
    language_model=True,
  )
  key = jax.random.key(seed)
  params, tokenizer = load(key), tokenizers.load(name)
  calls = 0

  def speak(prompts: Sequence[Sequence[Message]]) -> list[str]:
    nonlocal calls
    calls += 1
    fit = [
      i
      for i, messages in enumerate(prompts)
      if len(formats.encode(tokenizer, messages)) <= prompt_length
    ]
    said = [""] * len(prompts)
    if not fit:
      return said
    sampled = rollout.sample(
      model,
      params,
      tokenizer,
      [prompts[i] for i in fit],
      key=jax.random.fold_in(key, calls),
      prompt_length=prompt_length,
      response_length=response_length,
      temperature=temperature,
      rows=rows,
    )
    for i, text in zip(fit, sampled.texts, strict=True):
      said[i] = text.strip()
    return said

  return speak


def _endpoint(name: str, max_tokens: int) -> Speak:
  model, at, url = name.removeprefix("endpoint:").partition("@")
  if not (model and at and url):
    raise ValueError(
      f"--debater={name}: give endpoint:MODEL@URL, for example"
      " endpoint:my-model@http://localhost:8000/v1"
    )
  key = ENDPOINT_KEY if ENDPOINT_KEY in os.environ else ""
  send = connect(Endpoint(url, model, key))

  def speak(prompts: Sequence[Sequence[Message]]) -> list[str]:
    bodies = [
      {"messages": [dict(m) for m in prompt], "max_tokens": max_tokens}
      for prompt in prompts
    ]
    return [answer["text"] for answer in in_order(send, bodies, 8)]

  return speak
