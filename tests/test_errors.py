import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
  "flags, told",
  [
    (["--config=configs/tiny.py"], "flag --workdir=None"),
    (["--config=configs/none.py", "--workdir=none"], "configs/none.py"),
    (["--config=configs/tiny.py", "--confg=1"], "flag 'confg'"),
    (["--config=configs/tiny.py", "--config.stps=1"], '"steps" instead of'),
    (["--config=configs/tiny.py", "--config.steps=few"], "config.steps=few"),
  ],
)
def test_a_mistake_in_the_flags_has_exit_code_2(flags, told):
  command = [sys.executable, "launch/train.py", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: command line: ") and told in last
