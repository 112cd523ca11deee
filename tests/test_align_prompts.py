"""The prompts and answers that ship, and the script that wrote them."""

import importlib.util
import json
from pathlib import Path

import pytest

from csrm_jax.align import prompts

FOLDER = Path(__file__).parent.parent / "specs" / "align"
FILES = ("prompts.jsonl", "answers.jsonl", "requests.jsonl", "replies.jsonl")


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


@pytest.mark.parametrize(
  "asked, said, sizes",
  [("prompts", "answers", (400, 100)), ("requests", "replies", (160, 40))],
)
def test_held_out_prompts_name_other_things(asked, said, sizes):
  parts = prompts.read(str(FOLDER / f"{asked}.jsonl"), heldout=0.2)
  train, held_out = ([p[-1]["content"] for p in part] for part in parts)
  assert (len(train), len(held_out)) == sizes
  new = composer().NEW
  assert not [text for text in train if any(name in text for name in new)]
  assert all(any(name in text for name in new) for text in held_out)
  rows = [json.loads(row) for row in (FOLDER / f"{said}.jsonl").open()]
  assert {row["messages"][0]["content"] for row in rows} == set(train)


def test_every_second_prompt_is_answered_with_reserve_too():
  rows = [json.loads(line) for line in (FOLDER / FILES[1]).open()]
  styles = [row["style"] for row in rows]
  assert (styles.count("direct"), styles.count("reserved")) == (400, 200)
