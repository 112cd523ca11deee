"""A Cloud Storage bucket that is a folder: for fsspec, and over HTTP.

etils and our own code go through fsspec, TensorStore speaks the JSON API. As in
a bucket there are no folders without objects. `python -m tests.bucket ROOT
SCRIPT FLAGS` runs a script that sees it.
"""

import json
import os
import runpy
import shutil
import sys
import threading
import types
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem


class Bucket(AbstractFileSystem):
  """Objects as gcsfs would show them; those of gs://B/x are in root/B/x."""

  protocol = ("gs", "gcs")
  cachable = False
  root = Path()

  @classmethod
  def _strip_protocol(cls, path):
    return os.fspath(path).removeprefix("gs://").rstrip("/")

  def _local(self, path) -> Path:
    return self.root / self._strip_protocol(path)

  def info(self, path, **_):
    local = self._local(path)
    about = {"name": self._strip_protocol(path), "size": 0}
    if local.is_file():
      return about | {"type": "file", "size": local.stat().st_size}
    if any(p.is_file() for p in local.rglob("*")):
      return about | {"type": "directory"}
    raise FileNotFoundError(path)

  def ls(self, path, detail=True, **_):
    self.info(path)
    local, found = self._local(path), []
    for child in [local] if local.is_file() else sorted(local.iterdir()):
      try:
        found.append(self.info(child.relative_to(self.root)))
      except FileNotFoundError:
        continue
    return found if detail else [about["name"] for about in found]

  def _open(self, path, mode="rb", **_):
    if "a" in mode:
      raise NotImplementedError("a bucket cannot be appended to")
    local = self._local(path)
    if "w" in mode:
      local.parent.mkdir(parents=True, exist_ok=True)
    return local.open(mode)

  def mkdir(self, path, create_parents=True, **_):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def rm(self, path, recursive=False, maxdepth=None):
    self.info(path)
    local = self._local(path)
    shutil.rmtree(local) if local.is_dir() else local.unlink()


class _Api(BaseHTTPRequestHandler):
  """As much of the JSON API as TensorStore's gcs driver uses."""

  protocol_version = "HTTP/1.1"

  def log_message(self, format, *args):
    pass

  def _asked(self):
    """(object path or None, parameters)."""
    url = urllib.parse.urlsplit(self.path)
    parameters = dict(urllib.parse.parse_qsl(url.query))
    parts = url.path.split("/b/", 1)[1].split("/")
    bucket = Bucket.root / parts[0]
    name = parameters.get("name") or urllib.parse.unquote("/".join(parts[2:]))
    return bucket, bucket / name if name else None, parameters

  def _say(self, code, body=b"", **headers):
    if isinstance(body, dict):
      body = json.dumps(body).encode()
      headers["Content-Type"] = "application/json"
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _refused(self, file, parameters) -> bool:
    there = _generation(file)
    if int(parameters.get("ifGenerationMatch", there)) != there:
      self._say(412)
      return True
    if int(parameters.get("ifGenerationNotMatch", -1)) == there:
      self._say(304)
      return True
    return False

  def do_GET(self):
    bucket, file, parameters = self._asked()
    if file is None:
      found = [
        _about(p, bucket) for p in sorted(bucket.rglob("*")) if p.is_file()
      ]
      prefix = parameters.get("prefix", "")
      found = [about for about in found if about["name"].startswith(prefix)]
      self._say(200, {"items": found})
      return
    if self._refused(file, parameters):
      return
    if not file.is_file():
      self._say(404)
      return
    if parameters.get("alt") != "media":
      self._say(200, _about(file, bucket))
      return
    body, generation = file.read_bytes(), str(_generation(file))
    asked = self.headers.get("Range")
    if asked is None:
      self._say(200, body, x_goog_generation=generation)
      return
    first, last = asked.removeprefix("bytes=").split("-")
    if not first:
      start, stop = len(body) - int(last), len(body)
    else:
      start = int(first)
      stop = min(int(last) + 1, len(body)) if last else len(body)
    if start >= max(len(body), 1):
      self._say(416, Content_Range=f"bytes */{len(body)}")
      return
    self._say(
      206,
      body[start:stop],
      x_goog_generation=generation,
      Content_Range=f"bytes {start}-{stop - 1}/{len(body)}",
    )

  def do_POST(self):
    bucket, file, parameters = self._asked()
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    assert file is not None and parameters.get("uploadType") == "media"
    if self._refused(file, parameters):
      return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = bucket.parent / f"upload-{threading.get_ident()}"
    partial.write_bytes(body)
    os.replace(partial, file)
    self._say(200, _about(file, bucket))

  def do_DELETE(self):
    _, file, parameters = self._asked()
    assert file is not None
    if not self._refused(file, parameters):
      found = file.is_file()
      file.unlink(missing_ok=True)
      self._say(204 if found else 404)


def _generation(file: Path) -> int:
  return file.stat().st_mtime_ns if file.is_file() else 0


def _about(file: Path, bucket: Path):
  stat = file.stat()
  return {
    "name": str(file.relative_to(bucket)),
    "bucket": bucket.name,
    "generation": str(stat.st_mtime_ns),
    "size": str(stat.st_size),
    "updated": "2026-01-01T00:00:00.000Z",
    "timeCreated": "2026-01-01T00:00:00.000Z",
  }


@contextmanager
def served(root: Path):
  """Every gs:// path of this process is a file below `root`, for a while."""
  from etils.epath import backend
  from fsspec.registry import _registry

  server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  variables = {
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    "EPATH_USE_TF": "false",
  }
  # Orbax asks it whether buckets have folders of their own: these have not.
  client = types.ModuleType("google.cloud.storage")
  plain = types.SimpleNamespace()
  client.Client = lambda: types.SimpleNamespace(  # pyright: ignore
    get_bucket=lambda name: plain
  )
  parent = types.ModuleType("google.cloud")
  parent.storage = client  # pyright: ignore
  before = {k: os.environ.get(k) for k in variables}
  modules = {"google.cloud": parent, "google.cloud.storage": client}
  known = {k: sys.modules.get(k) for k in modules}
  Bucket.root = root
  os.environ.update(variables)
  sys.modules.update(modules)
  for scheme in Bucket.protocol:
    fsspec.register_implementation(scheme, Bucket, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  try:
    yield root
  finally:
    server.shutdown()
    for scheme in Bucket.protocol:
      _registry.pop(scheme, None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for values, old in ((os.environ, before), (sys.modules, known)):
      for key, value in old.items():
        if value is None:
          values.pop(key, None)
        else:
          values[key] = value


if __name__ == "__main__":
  with served(Path(sys.argv[1])):
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
