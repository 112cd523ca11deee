"""Sizes and hashes of a checkpoint's files, written before the step counts."""

import hashlib
import json
from typing import Any

from csrm_jax import storage
from csrm_jax.storage import AnyPath

FILE = "manifest.json"
STEP_FILE = "_CHECKPOINT_METADATA"  # of Orbax, which writes to it until the end
_LATER = {FILE, STEP_FILE, "commit_success.txt"}


def write(folder: AnyPath) -> None:
  """Lists the files of a checkpoint that is whole, but does not count yet.

  Local files are hashed (one pass, out of the page cache); of files in a
  bucket, whose bytes the storage checksums itself, the sizes are kept.
  """
  listed: dict[str, dict[str, int | str]] = {}
  for name, size in storage.files(folder).items():
    if name not in _LATER:
      listed[name] = {"bytes": size}
      if not storage.is_remote(folder):
        listed[name]["sha256"] = _sha256(folder / name)
  storage.write_text(folder / FILE, json.dumps({"files": listed}, indent=1))


def check(folder: AnyPath, *, below: str = "") -> bool:
  """Compares a checkpoint with its manifest.

  Args:
    folder: of one step.
    below: files whose path begins so; "": all.

  Returns:
    Whether there is a manifest: checkpoints of earlier versions have none.

  Raises:
    ValueError: names the first file that is missing, cut off or changed, and
      how to go on from the checkpoint before.
  """
  remedy = _remedy(folder)
  step_file = folder / STEP_FILE
  if not step_file.exists():
    raise ValueError(f"{step_file}: missing; {remedy}")
  promised = storage.read_json(step_file, remedy=remedy).get("custom_metadata")
  if not (folder / FILE).exists():
    if FILE in (promised or {}).values():
      raise ValueError(f"{folder / FILE}: missing; {remedy}")
    return False
  listed = storage.read_json(folder / FILE, remedy=remedy).get("files")
  if not isinstance(listed, dict):
    raise ValueError(f"{folder / FILE}: field 'files' is missing; {remedy}")
  sizes = storage.files(folder)
  for name, wanted in listed.items():
    if not name.startswith(below):
      continue
    if name not in sizes:
      raise ValueError(f"{folder / name}: missing; {remedy}")
    if sizes[name] != wanted["bytes"]:
      raise ValueError(
        f"{folder / name}: has {sizes[name]} bytes, was saved with "
        f"{wanted['bytes']}; {remedy}"
      )
    if "sha256" in wanted and not storage.is_remote(folder):
      found = _sha256(folder / name)
      if found != wanted["sha256"]:
        raise ValueError(
          f"{folder / name}: has sha256 {found}, was saved with "
          f"{wanted['sha256']}; {remedy}"
        )
  return True


def _sha256(file: AnyPath) -> str:
  read: Any
  with file.open("rb") as read:
    return hashlib.file_digest(read, "sha256").hexdigest()


def _remedy(folder: AnyPath) -> str:
  """What the user can do about a damaged checkpoint."""
  others = [p.name for p in folder.parent.iterdir() if p.name.isdigit()]
  before = [int(n) for n in others if int(n) < int(folder.name)]
  if before:
    return (
      "the checkpoint is damaged: bring the file back, or delete the folder "
      f"{folder} to go on from step {max(before)}"
    )
  return (
    "the checkpoint is damaged and there is none before it: bring the file "
    f"back, or delete {folder.parent} to train from the beginning"
  )
