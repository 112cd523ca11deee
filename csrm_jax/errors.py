"""How the launch scripts tell a user what is wrong: one line, exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told() -> Iterator[None]:
  """Prints the message of an expected error in place of a traceback."""
  try:
    yield
  except (ValueError, FloatingPointError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
