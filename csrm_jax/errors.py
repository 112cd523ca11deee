"""How the launch scripts tell a user what is wrong: one line, exit code 2."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from absl import flags


@contextmanager
def told() -> Iterator[None]:
  """Prints the message of an expected error in place of a traceback."""
  try:
    yield
  except (ValueError, FloatingPointError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def parsed(argv: list[str]) -> list[str]:
  """What absl's flags leave of `argv`: `app.run(main, flags_parser=parsed)`.

  A mistake there has exit code 2 as well (absl's 1 would have a job started
  again), with a traceback if it may lie in a config file.
  """
  try:
    left = flags.FLAGS(argv)
    if "config" in flags.FLAGS:  # a file that is missing fails at first use
      dict(flags.FLAGS.config)
    return left
  except Exception as error:
    if not isinstance(error, (flags.Error, OSError)):
      traceback.print_exc()
    told = " ".join(str(error).replace("\\n", " ").split())
    print(f"error: command line: {told}; see --help", file=sys.stderr)
  sys.exit(2)
