"""Where a run's files are: a folder here, or one in a Cloud Storage bucket.

Local paths are `pathlib`'s and behave as ever. A `gs://` path is etils' epath:
small files are read and written in place, and what only local libraries can
read (rows, tokenizers, TensorBoard events) is copied down or up whole.
"""

import atexit
import errno
import functools
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath import backend

AnyPath = Path | epath.Path

INSTALL = 'pip install "csrm_jax[gcs]"'  # gcsfs and google-cloud-storage
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def path(text: str | os.PathLike, *, flag: str = "--workdir") -> AnyPath:
  """A path here or in a bucket, as its scheme says.

  Args:
    text: a local path or "gs://BUCKET/FOLDER".
    flag: that it came by, for messages.

  Raises:
    ValueError: another scheme, or the packages that serve it are missing.
  """
  name = os.fspath(text)
  scheme, found, _ = name.partition("://")
  if not found:
    return Path(name)
  if scheme != "gs":
    raise ValueError(
      f"{flag}={name}: {scheme}:// is not served; give a local path (a mounted "
      "bucket is one) or gs://BUCKET/FOLDER"
    )
  try:
    importlib.import_module("fsspec").get_filesystem_class("gcs")
    importlib.import_module("google.cloud.storage")
  except ImportError as error:
    raise ValueError(
      f"{flag}={name}: gs:// needs packages that are not installed ({error}); "
      f"run: {INSTALL}"
    ) from error
  return epath.Path(name)


def is_remote(place: AnyPath) -> bool:
  """Whether a path lies in a bucket."""
  return not isinstance(place, Path)


def refresh(place: AnyPath) -> None:
  """Forgets listings of a bucket: they lack what TensorStore wrote since."""
  if is_remote(place):
    backend.fsspec_backend.fs(str(place)).invalidate_cache()


def files(folder: AnyPath) -> dict[str, int]:
  """Bytes of every file below a folder, by path relative to it, sorted."""
  refresh(folder)
  found: dict[str, int] = {}
  for child in folder.iterdir():
    if child.is_dir():
      below = files(child)
      found |= {f"{child.name}/{name}": size for name, size in below.items()}
    else:
      found[child.name] = _size(child)
  return dict(sorted(found.items()))


def _size(file: AnyPath) -> int:
  if isinstance(file, Path):
    return file.stat().st_size
  return int(file.stat().length)


def write_text(file: AnyPath, text: str) -> None:
  """Writes a file whole or not at all; objects in a bucket always are."""
  if not isinstance(file, Path):
    file.write_text(text)
    return
  partial = file.with_name(file.name + ".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, file)


def write_json(file: AnyPath, content: Mapping[str, Any]) -> None:
  """`write_text` of an object, indented."""
  write_text(file, json.dumps(content, indent=2) + "\n")


def read_json(file: AnyPath, *, remedy: str) -> dict[str, Any]:
  """The object in a JSON file.

  Args:
    file: must exist.
    remedy: what to do if it is damaged.

  Raises:
    ValueError: it is cut off or damaged; has the path and `remedy`.
  """
  try:
    found = json.loads(file.read_bytes().decode("utf-8"))
  except ValueError as error:  # both of JSON and of UTF-8
    raise ValueError(
      f"{file}: no whole JSON ({error}): cut off or damaged; {remedy}"
    ) from error
  if not isinstance(found, dict):
    raise ValueError(f"{file}: {str(found)[:40]!r} is no object; {remedy}")
  return found


@contextmanager
def naming(place: AnyPath) -> Iterator[None]:
  """Says where a disk was full or broken, and that nothing else is lost.

  Raises:
    ValueError: in place of an OSError of that sort, with the path.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL:
      raise
    raise ValueError(
      f"{error.filename or place}: {error.strerror}; make room or mend it, "
      "then start again: a run goes on from its newest checkpoint"
    ) from error


# -- Copies ----------------------------------------------------------------


@functools.cache
def _scratch() -> Path:
  """A folder of this process, gone with it."""
  folder = tempfile.mkdtemp(prefix="csrm_jax_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return Path(folder)


def here(folder: AnyPath) -> Path:
  """The local folder that stands for a remote one; a local one itself."""
  if isinstance(folder, Path):
    return folder
  return _scratch() / str(folder).removeprefix("gs://")


def fetch(folder: AnyPath, *names: str) -> Path:
  """A local folder with files of `folder`; a local one is returned as it is.

  Args:
    folder: anywhere.
    names: files and folders below it, left out where they do not exist;
      none: all. What was fetched of them before is replaced.

  Raises:
    ValueError: a file arrived with another size.
  """
  if isinstance(folder, Path):
    return folder
  local = here(folder)
  local.mkdir(parents=True, exist_ok=True)
  for name in names or ("",):
    source = folder / name if name else folder
    remove(local / name)
    if source.is_dir():
      for part in files(source):
        _copy(source / part, local / name / part)
    elif source.exists():
      _copy(source, local / name)
  return local


def put(local: Path, folder: AnyPath, *names: str, last: str = "") -> None:
  """Copies files of a local folder to the place it stands for.

  Args:
    local: of `here` or another folder.
    folder: where they go; nothing happens if that is `local`.
    names: files and folders below it, as in `fetch`.
    last: of the files, the one that says that all others are there.
  """
  if folder == local:
    return
  found = [
    part
    for part in files(local)
    if not names or any(part == n or part.startswith(n + "/") for n in names)
  ]
  for part in sorted(found, key=lambda part: (part == last, part)):
    _copy(local / part, folder / part)


def _copy(source: AnyPath, target: AnyPath) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  with source.open("rb") as read, target.open("wb") as write:
    shutil.copyfileobj(read, write, 1 << 22)
  if _size(target) != _size(source):
    raise ValueError(
      f"{target}: {_size(target)} bytes, but {source} has {_size(source)}: it "
      "changed while it was copied, or the copy broke off; start again"
    )


def remove(place: AnyPath) -> None:
  """Removes a file, or a folder with all that is below it, if it exists."""
  if not isinstance(place, Path):
    if place.exists():
      place.rmtree()
  elif place.is_file():
    place.unlink()
  else:
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def writing(output: AnyPath) -> Iterator[Path]:
  """A local folder that takes the place of `output` once the block succeeded.

  What is in `output` is replaced (in a bucket: file by file); if the block
  fails, it stays.
  """
  partial = output.with_name(output.name + ".partial")
  local = here(partial)
  remove(local)
  local.mkdir(parents=True)
  try:
    yield local
  except BaseException:
    remove(local)
    raise
  remove(output)
  if isinstance(output, Path):
    local.rename(output)
  else:
    put(local, output)
    remove(local)


@contextmanager
def writing_beside(output: AnyPath) -> Iterator[Path]:
  """A local path for the file `output`, whose folder holds more files.

  For a remote one, all that the block wrote is copied up after it, `output`
  last.
  """
  if isinstance(output, Path):
    yield output
    return
  with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
    yield Path(folder) / output.name
    put(Path(folder), output.parent, last=output.name)
