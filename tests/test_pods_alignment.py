"""The update of an alignment recipe, compiled without weights."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from csrm_jax.align import setup as setups
from csrm_jax.config import default
from csrm_jax.model import sizes
from csrm_jax.pods import ahead, alignment, roofline
from tests import runs, tiny
from tests.test_pods import ROOT, compile_for

pytestmark = pytest.mark.usefixtures("compiled_anew")
TINY = sizes.SIZES["llama3_8b"] | {
  "vocab_size": 512,
  "hidden_size": 64,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 128,
}
LAYER = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128  # weights of its products
N, LENGTH = 16, 24  # responses of an update, tokens


def recipe(**changes):
  """Two constraints, two minibatches; shapes of `TINY`."""
  config = default()
  config.update_from_flattened_dict(
    {
      "model.path": "",
      "model.size": "tiny",
      "model.dtype": "float32",
      "align.specs": "specs/align/shop_desk.yaml,specs/align/book_club.yaml",
      "align.prompts_per_step": 8,
      "align.samples": 2,
      "align.minibatches": 2,
      "align.prompt_length": 16,
      "align.response_length": 8,
    }
    | changes
  )
  return config


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def shapes(tree):
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in paths
  }


@pytest.mark.parametrize("rank", [0, 4])
def test_shapes_are_those_of_a_run(tmp_path, rank):
  """`set_up` reads weights; here they are of the same names and shapes."""
  tiny.write_workdir(tmp_path, tiny.judge())
  config = recipe(
    **{
      "model.path": str(tmp_path),
      "model.lora_rank": rank,
      "align.judge": str(tmp_path),
      "align.prompts": "synthetic/alcohol",
    }
  )
  setup, trained = setups.set_up(
    config, tmp_path, lambda c: np.zeros(len(c)), None
  )
  made = alignment.program(config, jax.devices())
  assert shapes(made.state.params) == shapes(trained)
  assert shapes(made.frozen) == shapes(setup.frozen)
  assert [c.name for c in made.bound] == ["shop_desk", "book_club"]
  assert made.state.multiplier.window.shape == (128, 2)
  assert made.episodes.cost_values.shape == (N, LENGTH, 2)


@pytest.mark.parametrize("rank", [0, 4])
def test_memory_is_that_of_a_hand_count(small, rank):
  config = recipe(**{"model.lora_rank": rank})
  made = alignment.program(config, jax.devices())
  found = alignment.compile_program(config, made, "ppo")
  layers, table, norms = 3 * LAYER, 512 * 64, 3 * 2 * 64 + 64
  adapters = 3 * rank * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))
  heads = 2 * 64 + (64 + 1) + 2 * (64 + 1)  # the policy's own has two rows
  whole = 3 * (layers + norms + adapters + table) + table + heads
  assert found.memory.parameters == pytest.approx(4 * whole / 2**30, rel=1e-6)
  trained = 3 * (adapters or layers + norms) + heads - 2 * 64
  moments = 8 * trained + 4 * 2 * 128 * 2  # and two windows of two costs
  assert found.memory.moments == pytest.approx(moments / 2**30, rel=1e-2)
  start = 0 if rank else layers + norms
  assert found.memory.idle == pytest.approx(4 * start / 2**30)
  # The policy's score row and the numbers of the prompts are no arguments.
  unused = 4 * 2 * 64 + 4 * N
  assert found.memory.padding * 2**30 == pytest.approx(-unused)
  assert found.memory.outputs * 2**30 < 4096  # metrics: the state is donated
  assert not found.collectives


def test_flops_are_those_of_a_hand_count(small):
  config = recipe(**{"align.epochs": 2, "model.remat": "none"})
  made = alignment.program(config, jax.devices())
  tokens, square = N * LENGTH, 4 * N * LENGTH**2 * 64
  one = 3 * (6 * LAYER * tokens + 3 * square / 2)
  logits = 2 * 512 * 64 * tokens
  counted = alignment.flops(config, made)
  assert counted.model == pytest.approx(2 * (3 * one + 2 * logits))
  dense = 3 * (6 * LAYER * tokens + 3 * square)
  assert counted.hardware == pytest.approx(2 * (3 * dense + 3 * logits))
  # Where the tied table is trained, it has a gradient as well.
  tied = sizes.SIZES["tiny"] | {"tie_word_embeddings": True}
  sizes.SIZES["tiny"] = tied
  config.model.train_embedding = True
  policy = alignment.program(config, jax.devices()).networks.policy
  counted = roofline.vocabulary(policy, rows=N, length=LENGTH)
  assert counted == (3 * logits, 4 * logits)


def test_methods_without_critics_have_a_policy_alone(small):
  config = recipe(**{"align.method": "grpo"})
  made = alignment.program(config, jax.devices())
  assert set(made.state.params) == set(made.frozen) == {"policy"}
  assert made.episodes.cost_values is None
  found = alignment.compile_program(config, made, "ppo")
  assert found.memory.temporaries > 0


def test_mistakes_are_named(small, tmp_path):
  with pytest.raises(ValueError, match=r"batch_rows = 16 must be a multiple"):
    config = recipe(**{"align.minibatches": 3})
    alignment.program(config, jax.devices())
  config = recipe()
  made = alignment.program(config, jax.devices())
  with pytest.raises(ValueError, match="use one of ppo, sample"):
    alignment.compile_program(config, made, "train")
  path = f"--config={ROOT / 'configs' / 'tiny.py'}"
  code, said, _ = compile_for(
    tmp_path, path, "--topology=v5e:2x2", "--program=ppo", "--advise"
  )
  assert code == 2 and "--advise searches training recipes" in said


SPREAD = """
import json, sys
import jax
from csrm_jax.model import sizes
from csrm_jax.pods import ahead, alignment
from tests.test_pods_alignment import TINY, recipe
sizes.SIZES["tiny"] = TINY
config = recipe(**{"mesh.replica": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
made = alignment.program(config, jax.devices())
state = (made.parameters, made.carried)
found = {
  "held": ahead.bytes_a_chip(state), "even": ahead.even_share(state, made.mesh)
}
for name in alignment.PROGRAMS:
  done = alignment.compile_program(config, made, name)
  found[name] = {
    "given": done.arguments,
    "memory": done.memory._asdict(),
    "kinds": sorted({c.kind for c in done.collectives}),
    "stacked": len(ahead.stacked_gathers(done.collectives, 3)),
  }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_eight_devices_share_the_state():
  found = json.loads(runs.on_devices(SPREAD))
  # What is whole on every device: norms, heads, windows of costs.
  assert found["held"] == pytest.approx(found["even"], rel=0.02)
  update, sample = found["ppo"], found["sample"]
  for one in (update, sample):
    known = sum(one["memory"][k] for k in ("parameters", "moments", "batch"))
    assert one["given"] == pytest.approx(known, rel=1e-2)
    assert {"all-gather", "all-reduce"} <= set(one["kinds"])
    held = known - one["memory"]["batch"] + one["memory"]["idle"]
    assert held * ahead.GIB == pytest.approx(found["held"])
  assert update["stacked"] == sample["stacked"] == 0


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='no TPU compiler here: pip install "csrm_jax[tpu]"',
)
def test_ppo_of_8b_compiles_for_a_tpu(tmp_path):
  path = Path("configs") / "ppo_lag_llama3_8b.py"
  code, said, report = compile_for(
    tmp_path, f"--config={path}", "--topology=v5p:4x4x4", "--program=ppo"
  )
  assert code == 0, said
  assert "Involuntary full rematerialization" not in said
  assert report
  held = report["arguments_gib"] - report["memory"]["batch"]
  held += report["memory"]["idle"]
  assert held == pytest.approx(report["even_gib"], rel=0.05)
  assert report["stacked_gathers"] == 0
  assert report["constraints"] == 14
