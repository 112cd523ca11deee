"""The prompts and answers that ship, and the script that wrote them."""

import importlib.util
import json
from pathlib import Path

from csrm_jax.align import prompts

FOLDER = Path(__file__).parent.parent / "specs" / "align"
FILES = ("prompts.jsonl", "answers.jsonl", "refusals.jsonl")


def composer():
  spec = importlib.util.spec_from_file_location(
    "compose", FOLDER / "compose.py"
  )
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_compose_writes_the_files(tmp_path, monkeypatch):
  compose = composer()
  monkeypatch.setattr(compose, "HERE", tmp_path)
  compose.main()
  for name in FILES:
    assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_held_out_prompts_name_other_things():
  train, held_out = prompts.read(str(FOLDER / "prompts.jsonl"), heldout=0.2)
  said = {
    part: [prompt[-1]["content"] for prompt in found]
    for part, found in (("train", train), ("held out", held_out))
  }
  assert {part: len(texts) for part, texts in said.items()} == {
    "train": 400,
    "held out": 100,
  }
  new = composer().NEW
  assert not [t for t in said["train"] if any(name in t for name in new)]
  assert all(any(name in t for name in new) for t in said["held out"])
  rows = [json.loads(line) for line in (FOLDER / FILES[1]).open()]
  assert {row["messages"][0]["content"] for row in rows} == set(said["train"])


def test_every_second_prompt_is_answered_with_reserve_too():
  rows = [json.loads(line) for line in (FOLDER / FILES[1]).open()]
  styles = [row["style"] for row in rows]
  assert (styles.count("direct"), styles.count("reserved")) == (400, 200)
