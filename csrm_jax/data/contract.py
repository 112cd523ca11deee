"""The data contract: four kinds of rows, read from JSON lines and checked.

docs/data.md describes them.
"""

import difflib
import functools
import gzip
import hashlib
import json
import lzma
import math
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from csrm_jax.spec import Spec
from csrm_jax.storage import AnyPath

Row = dict[str, Any]
Bad = Callable[[Any, str], None]  # (row or raw text, reason)
# Where a row stands: number of its source, then its place there.
Key = tuple[int, str, int]

ROLES = ("system", "user", "assistant", "tool")

_COMMON = {"id", "weight", "source", "family", "base", "edit"}
_SPEC = {"spec", "spec_file"}
_KEYS = {
  "label": {"messages", "label", "severity"} | _SPEC | _COMMON,
  "pair": {"prompt", "chosen", "rejected", "kind", "margin"} | _SPEC | _COMMON,
  "spec_pair": {"messages", "chosen_spec", "rejected_spec", "margin"} | _COMMON,
  "ladder": {"ladder", "margin"} | _COMMON,
}
KINDS = tuple(_KEYS)


def kind_of(row: Mapping[str, Any]) -> str:
  """Which of `KINDS` a row is, by the keys that only this kind has."""
  if "ladder" in row:
    return "ladder"
  if "chosen_spec" in row or "rejected_spec" in row:
    return "spec_pair"
  if "chosen" in row or "rejected" in row or "prompt" in row:
    return "pair"
  return "label"


def read_rows(
  path: str | Path,
  *,
  on_bad_row: str = "stop",
  quarantine: "list | str | Path | Bad | None" = None,
  counts: dict[str, int] | None = None,
  kinds: tuple[str, ...] = KINDS,
  need_label: bool = True,
  need_spec: bool = True,
) -> Iterator[Row]:
  """Reads and checks the rows of a JSON-lines file, plain or .gz, in order.

  A `spec_file` comes back as `spec`; nothing else is changed.

  Args:
    path: the file.
    on_bad_row: "stop" raises at the first bad row; "quarantine" hands it over.
    quarantine: where bad rows go: a list (objects with `line`, `reason`,
      `row`), the path of a JSON-lines file to write, or a function of
      (row, reason).
    counts: receives "quarantined" and "rows_read".
    kinds: the kinds of rows that are welcome.
    need_label: whether label rows must have their label.
    need_spec: whether rows must have their spec.

  Raises:
    ValueError: file, line, field, value and remedy of the first bad row.
  """
  path = Path(path)
  check_option(on_bad_row, quarantine, "quarantine=")
  counts = {} if counts is None else counts
  counts.setdefault("quarantined", 0)
  counts.setdefault("rows_read", 0)
  if isinstance(quarantine, str | Path):
    Path(quarantine).write_text("", encoding="utf-8")
  line_of = _first_lines()
  for number, raw in raw_lines(path):
    counts["rows_read"] += 1
    row: Any = raw.decode("utf-8", "replace")
    try:
      row = parse_line(raw, f"{path}:{number}")
      checked = check_row(
        row,
        origin=f"{path}:{number}",
        folder=path.parent,
        kinds=kinds,
        need_label=need_label,
        need_spec=need_spec,
      )
      first = line_of(checked["id"], number)
      if first != number:
        raise ValueError(
          f"{path}:{number}: field 'id': {checked['id']!r} stands in line "
          f"{first} already; make ids unique"
        )
    except ValueError as error:
      if on_bad_row == "stop":
        raise
      counts["quarantined"] += 1
      _put_aside(quarantine, number, row, str(error))
      continue
    yield checked


def _first_lines() -> Callable[[str, int], int]:
  """A function of (id, line) that gives the first line it met an id in.

  The ids go to a database on disk: a file has more than memory may hold.
  """
  # A thread may go on with the rows that another began to read.
  held = sqlite3.connect("", isolation_level=None, check_same_thread=False)
  held.execute("PRAGMA journal_mode = OFF")
  held.execute("PRAGMA synchronous = OFF")
  held.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, line) WITHOUT ROWID")
  held.execute("BEGIN")
  find = "SELECT line FROM ids WHERE id = ?"

  def line_of(name: str, line: int) -> int:
    key = hashlib.sha256(name.encode()).digest()[:16]
    put = held.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, line))
    if put.rowcount:
      return line
    return held.execute(find, (key,)).fetchone()[0]

  return line_of


def check_row(
  row: Any,
  *,
  origin: str,
  folder: Path | None = None,
  kinds: tuple[str, ...] = KINDS,
  need_label: bool = True,
  need_spec: bool = True,
) -> Row:
  """The row if it follows the contract, with `spec_file` read into `spec`.

  Args:
    row: what stood in the line.
    origin: file and line, for errors.
    folder: that `spec_file` is relative to.
    kinds: welcome kinds.
    need_label: whether a label row must have its label.
    need_spec: whether there must be a spec.

  Raises:
    ValueError: origin, field, value and remedy.
  """
  if not isinstance(row, dict):
    raise ValueError(f"{origin}: {_short(row)} is no row; write an object")
  kind = kind_of(row)
  if kind not in kinds:
    raise ValueError(
      f"{origin}: a {kind} row where only {', '.join(kinds)} rows are read; "
      "remove it"
    )
  _check_keys(row, _KEYS[kind], origin)
  row = dict(row)
  _check_text(_required(row, "id", origin), "id", origin)
  for key in ("source", "family", "base", "edit"):
    if key in row:
      _check_text(row[key], key, origin)
  for key, low, high in (
    ("weight", 0.0, math.inf),
    ("severity", 0.0, math.inf),
    ("margin", -math.inf, math.inf),
    ("label", 0.0, 1.0),
  ):
    if key in row:
      _check_number(row[key], key, low, high, origin)
  if kind == "label":
    if need_label:
      _required(row, "label", origin)
    check_messages(_required(row, "messages", origin), "messages", origin)
    _settle_spec(row, "", need_spec, origin, folder)
  elif kind == "pair":
    _check_pair(row, origin)
    needed = need_spec and row["kind"] == "resp"
    _settle_spec(row, "", needed, origin, folder)
  elif kind == "spec_pair":
    check_messages(_required(row, "messages", origin), "messages", origin)
    for key in ("chosen_spec", "rejected_spec"):
      _check_spec(_required(row, key, origin), key, origin)
    if row["chosen_spec"] == row["rejected_spec"]:
      raise ValueError(
        f"{origin}: field 'rejected_spec': equal to chosen_spec; give two specs"
      )
  else:
    row["ladder"] = _check_ladder(row["ladder"], need_spec, origin, folder)
  return row


def family_of(row: Mapping[str, Any]) -> str:
  """The family of a row: its own key, else a hash of the prompt.

  Case and punctuation are dropped first. A lone response (no prompt) is a
  family of its own.
  """
  if row.get("family"):
    return row["family"]
  if "ladder" in row:
    messages = row["ladder"][0]["messages"]
  elif "prompt" in row:
    messages = [*row["prompt"], *row["chosen"][-1:]]
  else:
    messages = row["messages"]
  prompt = messages[:-1] or messages
  return hash_family("\n".join(m["content"] for m in prompt))


def hash_family(text: str) -> str:
  """A family name for a prompt; equal but for case, space, punctuation."""
  plain = re.sub(r"[\W_]+", " ", text.lower()).strip()
  return hashlib.sha256(plain.encode()).hexdigest()[:16]


def find(path: str | Path | None, name: str, file: str) -> Path:
  """The file of a real set below the data folder.

  Raises:
    ValueError: no folder given, or the file is not in it.
  """
  if not path:
    raise ValueError(
      f"source {name!r} needs its folder; give --config.data.path=FOLDER, "
      f"where FOLDER holds {file}"
    )
  found = Path(path) / file
  if not found.is_file():
    raise ValueError(
      f"--config.data.path={path}: source {name!r} needs {found}, which is "
      "not there; name the folder that holds the sets"
    )
  return found


def objects(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
  """Objects of a real set's JSON-lines file, each with all `fields`.

  Raises:
    ValueError: file, line, field and remedy.
  """
  for number, raw in raw_lines(path):
    origin = f"{path}:{number}"
    row = parse_line(raw, origin)
    if not isinstance(row, dict):
      raise ValueError(f"{origin}: {_short(row)} is no row; write an object")
    for field in fields:
      _required(row, field, origin)
    yield row


# -- Lines ----------------------------------------------------------------


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """(line number from 1, bytes) of the lines that are not blank."""
  try:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as file:
      for number, raw in enumerate(file, 1):
        if number == 1:
          raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
          yield number, raw.rstrip(b"\r\n")
  except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
    kind = "xz" if path.suffix == ".xz" else "gzip"
    raise ValueError(
      f"{path}: broken {kind} file ({error}); fetch or write it again"
    ) from None
  except OSError as error:
    raise ValueError(
      f"{path}: {error.strerror}; give the path of a .jsonl or .jsonl.gz file"
    ) from None


def check_option(on_bad_row: str, place: object, argument: str) -> None:
  """Refuses an `on_bad_row` that does not exist, or has nowhere to put rows.

  Raises:
    ValueError: names `argument`, which would give the place.
  """
  if on_bad_row not in ("stop", "quarantine"):
    raise ValueError(
      f"on_bad_row: {on_bad_row!r}; must be 'stop' or 'quarantine'"
    )
  if on_bad_row == "quarantine" and place is None:
    raise ValueError(
      f"on_bad_row 'quarantine' without a place for the rows; pass {argument}"
    )


def aside_of(output: AnyPath) -> AnyPath:
  """The file for bad rows that belongs to an output."""
  return output.with_name(output.name + ".quarantine.jsonl")


def line_numbers(path: Path) -> list[int]:
  """Of the lines that are not blank: where the n-th row of a file stands."""
  return [number for number, _ in raw_lines(path)]


def parse_line(raw: bytes, origin: str) -> Any:
  try:
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{origin}: byte {error.start} is not UTF-8; save the file as UTF-8"
    ) from None
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{origin}: not JSON: {error.msg} at column {error.colno}; write one "
      "object a line"
    ) from None
  except RecursionError:
    raise ValueError(f"{origin}: nested too deeply; flatten it") from None
  except KeyError as error:
    raise ValueError(
      f"{origin}: field {error.args[0]!r}: given twice; keep one"
    ) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [k for k, _ in pairs]
    raise KeyError(next(k for k in keys if keys.count(k) > 1))
  return found


def _put_aside(quarantine: Any, line: int, row: Any, reason: str) -> None:
  if callable(quarantine):
    quarantine(row, reason)
    return
  entry = {"line": line, "reason": reason, "row": row}
  if isinstance(quarantine, list):
    quarantine.append(entry)
    return
  with Path(quarantine).open("a", encoding="utf-8") as out:
    out.write(json.dumps(entry) + "\n")


# -- Fields ---------------------------------------------------------------


def _check_keys(row: Row, known: set[str], origin: str, at: str = "") -> None:
  for key in row:
    if key not in known:
      close = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean {close[0]!r}" if close else "remove it"
      raise ValueError(
        f"{origin}: field '{at}{key}': unknown key; {hint} (known: "
        f"{', '.join(sorted(known))})"
      )


def _required(row: Row, key: str, origin: str) -> Any:
  if key not in row:
    raise ValueError(f"{origin}: field '{key}': missing; add it")
  return row[key]


def _check_text(value: Any, field: str, origin: str) -> None:
  if not isinstance(value, str):
    raise ValueError(
      f"{origin}: field '{field}': {_short(value)}: must be text: put it in "
      "quotes"
    )
  if not value.strip():
    raise ValueError(f"{origin}: field '{field}': empty; write some text")
  try:
    value.encode()
  except UnicodeEncodeError:
    raise ValueError(
      f"{origin}: field '{field}': holds half of a surrogate pair, which is "
      "no character; remove it"
    ) from None


def _check_number(
  value: Any, field: str, low: float, high: float, origin: str
) -> None:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not number or not math.isfinite(value) or not low <= value <= high:
    wanted = "a finite number"
    if field == "label":
      wanted = "a number from 0 (violates) to 1 (complies)"
    elif low == 0:
      wanted = "a finite number, 0 or more"
    raise ValueError(
      f"{origin}: field '{field}': {_short(value)}: must be {wanted}"
    )


def check_messages(
  messages: Any, field: str, origin: str, *, response: bool = True
) -> None:
  """Refuses what is no list of messages.

  Args:
    messages: of a row.
    field: its key there.
    origin: file and line.
    response: whether the last one must be the assistant's.

  Raises:
    ValueError: file, line, field and remedy.
  """
  if not isinstance(messages, list) or (response and not messages):
    raise ValueError(
      f"{origin}: field '{field}': {_short(messages)}: must be a list of "
      'messages, such as [{"role": "assistant", "content": "..."}]'
    )
  for i, message in enumerate(messages):
    at = f"{field}[{i}]"
    if not isinstance(message, dict):
      raise ValueError(
        f"{origin}: field '{at}': {_short(message)}: must be an object "
        "{'role', 'content'}"
      )
    _check_keys(message, {"role", "content"}, origin, f"{at}.")
    for key in ("role", "content"):
      if key not in message:
        raise ValueError(f"{origin}: field '{at}.{key}': missing; add it")
    if message["role"] not in ROLES:
      raise ValueError(
        f"{origin}: field '{at}.role': {_short(message['role'])}: must be one "
        f"of {', '.join(ROLES)}"
      )
    _check_text(message["content"], f"{at}.content", origin)
  if response and messages[-1]["role"] != "assistant":
    raise ValueError(
      f"{origin}: field '{field}[{len(messages) - 1}].role': "
      f"{messages[-1]['role']!r}: the last message is the one judged and must "
      "be the assistant's; append the response"
    )


def _check_pair(row: Row, origin: str) -> None:
  prompt = _required(row, "prompt", origin)
  check_messages(prompt, "prompt", origin, response=False)
  for key in ("chosen", "rejected"):
    check_messages(_required(row, key, origin), key, origin)
  if row["chosen"] == row["rejected"]:
    raise ValueError(
      f"{origin}: field 'rejected': equal to chosen; give two responses"
    )
  if _required(row, "kind", origin) not in ("resp", "help"):
    raise ValueError(
      f"{origin}: field 'kind': {_short(row['kind'])}: must be 'resp' or 'help'"
    )


def _check_ladder(
  ladder: Any, need_spec: bool, origin: str, folder: Path | None
) -> list[Row]:
  if not isinstance(ladder, list) or len(ladder) < 2:
    raise ValueError(
      f"{origin}: field 'ladder': {_short(ladder)}: must be a list of at "
      "least two rungs, most severe first"
    )
  rungs = []
  for i, rung in enumerate(ladder):
    at = f"ladder[{i}]"
    if not isinstance(rung, dict):
      raise ValueError(
        f"{origin}: field '{at}': {_short(rung)}: must be an object with "
        "messages and a spec"
      )
    _check_keys(rung, {"messages"} | _SPEC, origin, f"{at}.")
    rung = dict(rung)
    if "messages" not in rung:
      raise ValueError(f"{origin}: field '{at}.messages': missing; add it")
    check_messages(rung["messages"], f"{at}.messages", origin)
    _settle_spec(rung, f"{at}.", need_spec, origin, folder)
    rungs.append(rung)
  return rungs


def _check_spec(value: Any, field: str, origin: str) -> None:
  if isinstance(value, str):
    _check_text(value, field, origin)
  elif isinstance(value, dict):
    spec = Spec.parse(value, f"{origin}: field '{field}'")
    _check_text(spec.render(), field, origin)
  else:
    raise ValueError(
      f"{origin}: field '{field}': {_short(value)}: must be text or an object "
      "with rules"
    )


def _settle_spec(
  row: Row, at: str, needed: bool, origin: str, folder: Path | None
) -> None:
  """Checks the spec of a row or rung, in place; a file is read."""
  if "spec" in row and "spec_file" in row:
    raise ValueError(
      f"{origin}: field '{at}spec_file': beside 'spec'; keep one of the two"
    )
  if "spec" in row:
    _check_spec(row["spec"], f"{at}spec", origin)
  elif "spec_file" in row:
    name = row.pop("spec_file")
    _check_text(name, f"{at}spec_file", origin)
    try:
      row["spec"] = _spec_of_file((folder or Path()) / name)
    except ValueError as error:
      raise ValueError(f"{origin}: field '{at}spec_file': {error}") from None
  elif needed:
    raise ValueError(
      f"{origin}: field '{at}spec': missing; add 'spec' (text or an object "
      "with rules) or 'spec_file' (a path)"
    )


@functools.lru_cache(maxsize=256)
def _read_spec(path: Path, modified: int) -> str:
  return Spec.read(path).render()


def _spec_of_file(path: Path) -> str:
  modified = path.stat().st_mtime_ns if path.exists() else 0
  return _read_spec(path, modified)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."
