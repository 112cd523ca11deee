"""Boolean expressions over names: read, decided, given a probability."""

import ast
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Truths = Bool[np.ndarray, " n"]
Chances = Float[np.ndarray, " n"]


class Expression(NamedTuple):
  """A node: `op` is "name", "not", "and", "or" or "true".

  Attributes:
    op: what the node does with its parts.
    name: of a proposition or a derived one; "" unless `op` is "name".
    parts: one of "not"; of "and" and "or" any number.
  """

  op: str
  name: str = ""
  parts: "tuple[Expression, ...]" = ()

  def names(self) -> tuple[str, ...]:
    """Names that occur, in order, each once."""
    if self.op == "name":
      return (self.name,)
    inner = [name for part in self.parts for name in part.names()]
    return tuple(dict.fromkeys(inner))

  def __str__(self) -> str:
    if self.op in ("name", "true"):
      return self.name or "true"
    if self.op == "not":
      return f"not {_bracketed(self.parts[0])}"
    return f" {self.op} ".join(_bracketed(part) for part in self.parts)


def _bracketed(part: Expression) -> str:
  return f"({part})" if part.op in ("and", "or") else str(part)


def parse(text: str, origin: str) -> Expression:
  """Reads `a and not (b or c)`; names are Python's, `true` always holds.

  Args:
    text: the expression.
    origin: file and field, for the message.

  Raises:
    ValueError: origin, the text and what it may hold.
  """
  try:
    tree = ast.parse(" ".join(text.split()), mode="eval").body
    return _node(tree)
  except (SyntaxError, TypeError) as error:
    raise ValueError(
      f"{origin}: {text!r} is no expression ({error}); use names, 'and', 'or',"
      " 'not', brackets and 'true'"
    ) from None


def _node(node: ast.expr) -> Expression:
  if isinstance(node, ast.Name):
    if node.id == "true":
      return Expression("true")
    return Expression("name", node.id)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
    return Expression("not", parts=(_node(node.operand),))
  if isinstance(node, ast.BoolOp):
    op = "and" if isinstance(node.op, ast.And) else "or"
    return Expression(op, parts=tuple(map(_node, node.values)))
  raise TypeError(f"{ast.unparse(node)!r} is none of these")


def conjunction(members: Mapping[str, bool]) -> Expression:
  """`{a: true, b: false}` as `a and not b`; of none, `true`."""
  parts = []
  for name, wanted in members.items():
    part = Expression("name", name)
    parts.append(part if wanted else Expression("not", parts=(part,)))
  if not parts:
    return Expression("true")
  return parts[0] if len(parts) == 1 else Expression("and", parts=tuple(parts))


def holds(
  expression: Expression, value: Callable[[str], Truths], n: int
) -> Truths:
  """Whether it holds in each of n cases; `value` gives that of a name."""
  if expression.op == "true":
    return np.ones(n, bool)
  if expression.op == "name":
    return value(expression.name)
  parts = [holds(part, value, n) for part in expression.parts]
  if expression.op == "not":
    return ~parts[0]
  joined = np.logical_and if expression.op == "and" else np.logical_or
  return functools.reduce(joined, parts)


def probability(
  expression: Expression, value: Callable[[str], Chances], n: int
) -> Chances:
  """The probability of each of n cases, were all parts independent.

  "and" multiplies, "not" is 1 - p, "or" follows by De Morgan. So 0 and 1 give
  what `holds` gives; between them a name that stands twice counts twice.

  Source: Mu et al. 2024 (arXiv:2411.01111), class features.
  """
  if expression.op == "true":
    return np.ones(n)
  if expression.op == "name":
    return value(expression.name)
  parts = [probability(part, value, n) for part in expression.parts]
  if expression.op == "not":
    return 1.0 - parts[0]
  if expression.op == "and":
    return np.prod(np.stack(parts), axis=0)
  return 1.0 - np.prod(1.0 - np.stack(parts), axis=0)
