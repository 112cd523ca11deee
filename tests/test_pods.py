"""Programs compiled for machines that are not here."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from csrm_jax import sharding
from csrm_jax.config import default
from csrm_jax.model import reward, sizes
from csrm_jax.model.backbone import Architecture
from csrm_jax.pods import advise, ahead, chips, hlo, roofline

pytestmark = pytest.mark.usefixtures("compiled_anew")
ROOT = Path(__file__).parent.parent

# In the form that XLA prints: a loop of 30 around a fused gather, a loop of
# unknown length, an all-reduce outside both.
HLO = textwrap.dedent("""\
  HloModule jit_step

  %fused (p: bf16[8,64]) -> bf16[16,64] {
    %p = bf16[8,64]{1,0} parameter(0)
    ROOT %ag = bf16[16,64]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}, metadata={op_name="jit(step)/while/body/dot"}
  }

  %body (a: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
    %a = (s32[], bf16[8,64]{1,0}) parameter(0)
    %f = bf16[16,64]{1,0} fusion(%a), kind=kCustom, calls=%fused
    ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%a, %f)
  }

  %condition (a: (s32[], bf16[8,64])) -> pred[] {
    %a = (s32[], bf16[8,64]{1,0}) parameter(0)
    ROOT %lt = pred[] compare(%a, %a), direction=LT
  }

  %endless (a: s32[]) -> s32[] {
    %a = s32[] parameter(0)
    ROOT %cp = s32[] collective-permute(%a), source_target_pairs={{0,1}}
  }

  %add (x: f32[], y: f32[]) -> f32[] {
    ROOT %s = f32[] add(%x, %y)
  }

  ENTRY %main (p: bf16[8,64]) -> f32[4] {
    %p = bf16[8,64]{1,0} parameter(0)
    %w = (s32[], bf16[8,64]{1,0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"30"}}
    %u = s32[] while(%p), condition=%condition, body=%endless
    ROOT %ar = f32[4]{0} all-reduce(%w), replica_groups=[1,4]<=[4], to_apply=%add
  }
  """)  # noqa: E501


# As XLA for TPUs prints: no length beside the loop, only its counter; a gather
# that runs beside a fusion, three times under one channel; a reduce-scatter as
# an all-reduce that is sliced.
TPU = textwrap.dedent("""\
  HloModule jit_step

  %start (p: bf16[1,8,64]) -> bf16[1,16,64] {
    ROOT %ag.1 = bf16[1,16,64]{2,1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={1}
  }

  %hidden (p: bf16[1,8,64]) -> bf16[1,16,64] {
    ROOT %ag.2 = bf16[1,16,64]{2,1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={1}
  }

  %all-reduce-scatter.6.clone (p: bf16[16,64], q: bf16[8,64]) -> bf16[8,64] {
    %ar = (bf16[16,64]{1,0}, /*index=1*/bf16[8,64]{1,0}) all-reduce(%p, %q), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
    ROOT %cut = bf16[8,64]{1,0} dynamic-slice(%ar)
  }

  %turn (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
    %state = (s32[], bf16[8,64]{1,0}) parameter(0)
    %i = s32[]{:T(128)} get-tuple-element(%state), index=0
    %i.2 = s32[]{:T(128)} copy(%i)
    %one = s32[]{:T(128)} constant(1)
    %next = s32[]{:T(128)} add(%i.2, %one), metadata={op_name="add"}
    %a = bf16[1,16,64]{2,1,0} fusion(%state), kind=kCustom, calls=%start
    %b = bf16[1,16,64]{2,1,0} fusion(%state), kind=kCustom, calls=%hidden
    %c = bf16[8,64]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.6.clone
    ROOT %t = (s32[]{:T(128)}, /*index=1*/bf16[8,64]{1,0}) tuple(%next, /*index=1*/%c)
  }

  %test (state: (s32[], bf16[8,64])) -> pred[] {
    %n = s32[]{:T(128)} constant(30)
    %state = (s32[], bf16[8,64]{1,0}) parameter(0)
    %i = s32[]{:T(128)} get-tuple-element(%state), index=0
    ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="lt"}
  }

  ENTRY %main (p: bf16[8,64]) -> (s32[], bf16[8,64]) {
    %p = bf16[8,64]{1,0} parameter(0)
    %zero = s32[]{:T(128)} constant(0)
    %zero.2 = s32[]{:T(128)} copy(%zero)
    %first = (s32[], bf16[8,64]{1,0}) tuple(%zero.2, %p)
    ROOT %w = (s32[]{:T(128)}, bf16[8,64]{1,0}) while(%first), condition=%test, body=%turn
  }
  """)  # noqa: E501


def test_topologies_are_read():
  found = chips.parse("v5p:4x4x4", slices=2)
  assert (found.chips, found.chip.hbm, found.platform) == (128, 95, "tpu")
  assert str(found) == "2 x v5p:4x4x4"
  for text in ("v5p", "v9:2x2", "v5e:0x2", "v5e:2x2x2x2"):
    with pytest.raises(ValueError, match="topology"):
      chips.parse(text)
  with pytest.raises(ValueError, match="slices=0"):
    chips.parse("v5e:2x2", slices=0)


def test_collectives_are_counted_with_their_loops():
  found = {c.kind: c for c in hlo.collectives(HLO)}
  gather = found["all-gather"]
  assert (gather.times, gather.group, gather.bytes) == (30, 2, 16 * 64 * 2)
  assert gather.shape == (16, 64) and gather.op.endswith("body/dot")
  assert gather.moved == 16 * 64 * 2 / 2
  reduce = found["all-reduce"]
  assert (reduce.times, reduce.group) == (1, 4)
  assert reduce.moved == 2 * 16 * 3 / 4
  assert found["collective-permute"].times is None

  totals = hlo.totals(list(found.values()))
  assert totals["all-gather"]["gib"] == pytest.approx(30 * 1024 / 2**30)
  assert totals["collective-permute"]["gib"] is None  # not a number too small


def test_collectives_of_a_tpu_count_once_and_by_their_counter():
  gather, scatter = hlo.collectives(TPU)
  assert (gather.kind, scatter.kind) == ("all-gather", "reduce-scatter")
  assert (gather.times, gather.group, gather.bytes) == (30, 2, 16 * 64 * 2)
  assert (scatter.times, scatter.group) == (30, 2)
  assert scatter.bytes == (16 + 8) * 64 * 2 and scatter.shape == (16, 64)


@pytest.mark.parametrize(
  "change",
  [
    ("constant(1)", "constant(2)"),  # two a turn
    ("constant(0)", "parameter(1)"),  # an unknown start
    ("direction=LT", "direction=NE"),
    ("constant(30)", "parameter(1)"),  # an unknown end
    ("tuple(%next,", "tuple(%i.2,"),  # another counter
  ],
)
def test_a_loop_of_another_form_has_no_length(change):
  assert change[0] in TPU
  found = hlo.collectives(TPU.replace(*change))
  assert [c.times for c in found] == [None, None]


def test_flops_are_those_of_a_hand_count():
  config = default()
  config.batch_rows, config.data.row_length = 4, 1024
  config.model.path, config.model.size = "", "smollm2_135m"
  model, _ = reward.make(config.model)
  layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
  assert roofline.kernel_parameters(model) == layer
  tokens = 4 * 1024
  attention = 4 * tokens * 1024 * 576
  counted = roofline.flops(config, model)
  assert counted.model == pytest.approx(
    30 * (6 * layer * tokens + 3 * attention / 2)
  )
  # Layers are computed again, and the dense products have no mask to skip.
  assert counted.hardware == pytest.approx(
    30 * (8 * layer * tokens + 4 * attention)
  )
  config.model.lora_rank = 8
  config.model.remat = "none"
  adapted, _ = reward.make(config.model)
  assert roofline.flops(config, adapted).model == pytest.approx(
    30 * (4 * layer * tokens + 3 * attention / 2)
  )


@pytest.mark.parametrize("name", sizes.SIZES)
def test_named_sizes_are_backbones(name):
  made = Architecture.from_config(sizes.size(name))
  assert made.heads % made.kv_heads == 0
  billions = made.layers * (
    made.width * made.head_dim * (2 * made.heads + 2 * made.kv_heads)
    + 3 * made.width * made.ffn
  ) + made.vocab_size * made.width * (1 if made.tied else 2)
  said = {"smollm2_135m": 0.1345, "qwen3_4b": 4.02, "llama3_8b": 8.03}
  said["llama3_70b"] = 70.55
  assert billions / 1e9 == pytest.approx(said[name], rel=2e-3)


def test_an_unknown_size_and_absent_weights_are_told():
  with pytest.raises(ValueError, match="'llama9': use one of smollm2_135m"):
    sizes.size("llama9")
  config = default()
  config.model.path, config.model.size = "", "smollm2_135m"
  _, load = reward.make(config.model)
  with pytest.raises(ValueError, match=r"--config\.model\.path=FOLDER"):
    load(jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Described:
  """As much of a device as a mesh looks at."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "described"


def _devices(slices: int, each: int):
  return [
    Described(s * each + i, s) for s in range(slices) for i in range(each)
  ]


def test_each_slice_holds_whole_replicas():
  mesh = sharding.make_mesh(replica=4, fsdp=2, devices=_devices(2, 4))
  where = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  assert (where == np.array([0, 0, 1, 1])[:, None, None]).all()
  assert len({d.id for d in mesh.devices.flat}) == 8
  with pytest.raises(ValueError, match="replica = 1 on 2 slices"):
    sharding.make_mesh(devices=_devices(2, 4))


def test_what_the_compiler_says_of_memory_is_understood():
  for text, needed in (
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
     "in memory space hbm. Used 34.46G of 15.75G hbm.", 34.46),
    ("CompileTimeHbmOom: 512.0M exceeds 15.75G", 0.5),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
      " for HLO temporaries (150.83G) exceeds available HBM (95.74G).",
      150.83,
    ),
  ):  # fmt: skip
    made = ahead._misfit(RuntimeError(text))
    assert isinstance(made, ahead.DoesNotFit)
    assert made.needed == pytest.approx(needed)
  other = RuntimeError("INTERNAL: something else")
  assert ahead._misfit(other) is other


def test_candidates_fill_every_data_shard():
  config = default()
  config.batch_rows = 32
  topology = chips.parse("v5e:4x4")
  made = list(advise.candidates(config, topology))
  assert made
  for one in made:
    mesh = one.mesh
    assert mesh.replica * mesh.fsdp * mesh.tensor == topology.chips
    assert (
      config.batch_rows % (mesh.replica * mesh.fsdp * one.microbatches) == 0
    )
  assert config.microbatches == 1  # the recipe itself stays
  config.batch_rows = 3
  with pytest.raises(ValueError, match="fills no mesh"):
    advise.advise(config, topology)


def test_best_comes_first():
  def made(fits, bound=1.0, total=1.0, needed=None):
    found = {"fits": fits, "needed": needed, "remat": "none"}
    found |= {"microbatches": 1, "mesh": {"replica": 1, "fsdp": 2, "tensor": 1}}
    if fits:
      found |= {"memory": {"total": total}, "seconds": {"bound": bound}}
    return found

  tried = [
    made(False, needed=99.0), made(True, 2.0, 1.0), made(True, 1.0, 9.0),
    made(True, 1.001, 3.0), made(False, needed=20.0),
  ]  # fmt: skip
  ranked = sorted(tried, key=advise._rank)
  assert [r.get("memory", {}).get("total") for r in ranked[:3]] == [3, 9, 1]
  assert [r["needed"] for r in ranked[3:]] == [20.0, 99.0]
  lines = advise.table(ranked).splitlines()
  assert len(lines) == 7 and lines[2].endswith("| yes |")


def compile_for(tmp_path, *args):
  """Runs launch/compile.py; (exit code, stdout + stderr, report)."""
  output = tmp_path / "report.json"
  done = subprocess.run(
    [sys.executable, ROOT / "launch" / "compile.py", f"--output={output}",
     *args],
    env={**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    capture_output=True,
    text=True,
  )  # fmt: skip
  report = json.loads(output.read_text()) if output.is_file() else None
  return done.returncode, done.stdout + done.stderr, report


def test_bad_machines_are_told_in_a_line(tmp_path):
  recipe = f"--config={ROOT / 'configs' / 'tiny.py'}"
  code, said, _ = compile_for(tmp_path, recipe, "--topology=v9:2x2")
  assert code == 2 and "KIND one of v4" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='no TPU compiler here: pip install "csrm_jax[tpu]"',
)
def test_a_recipe_compiles_for_a_tpu(tmp_path):
  recipe = ROOT / "configs" / "csrm_llama3_8b.py"
  code, said, report = compile_for(
    tmp_path,
    f"--config={recipe}",
    "--topology=v5p:2x2x2",
    "--config.mesh.fsdp=2",
    "--config.batch_rows=8",
  )
  assert code == 0, said
  assert "Involuntary full rematerialization" not in said
  assert report
  # Parameters and two moments over eight chips, as the compiler holds them.
  # (Where a kernel is narrower than a chip's 128 lanes, it pads: 8 % more for
  # SmolLM2 on two tensor shards.)
  held = report["arguments_gib"] - report["memory"]["batch"]
  assert held == pytest.approx(report["even_gib"], rel=0.05)
  assert report["state_gib"] == pytest.approx(report["even_gib"], rel=0.05)
  assert report["stacked_gathers"] == 0
  assert report["collectives"]["all-gather"]["gib"] > 0
  assert report["collectives"]["all-gather"]["instructions"] > 0
  assert report["batch_rows"] == 8
