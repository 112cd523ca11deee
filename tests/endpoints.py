"""A chat endpoint on this machine, which answers as a test wants."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

# What to send back: (status, object or text, headers).
Reply = tuple[int, Any, dict[str, str]]
Behave = Callable[[dict[str, Any], dict[str, str]], Reply]


def said(text: str | None, tokens: list | None = None, **headers) -> Reply:
  """A chat completion; `tokens` are (token, {candidate: nats})."""
  choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
  if tokens is not None:
    choice["logprobs"] = {
      "content": [
        {
          "token": token,
          "logprob": max(told.values()),
          "top_logprobs": [
            {"token": c, "logprob": nats} for c, nats in told.items()
          ],
        }
        for token, told in tokens
      ]
    }
  return 200, {"choices": [choice]}, headers


class Server:
  """What a test sees of the endpoint: its address and all requests so far."""

  def __init__(self, port: int):
    self.url = f"http://127.0.0.1:{port}/v1"
    self.bodies: list[dict[str, Any]] = []
    self.headers: list[dict[str, str]] = []
    self.paths: list[str] = []


@contextlib.contextmanager
def serve(behave: Behave) -> Iterator[Server]:
  """Runs an endpoint; `behave` gets a request's body and headers."""
  lock = threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
      length = int(self.headers["Content-Length"])
      body = json.loads(self.rfile.read(length))
      headers = dict(self.headers)
      with lock:
        seen.bodies.append(body)
        seen.headers.append(headers)
        seen.paths.append(self.path)
      status, reply, extra = behave(body, headers)
      data = reply if isinstance(reply, str) else json.dumps(reply)
      with contextlib.suppress(OSError):  # the client may have given up
        self.send_response(status)
        for name, value in extra.items():
          self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data.encode())))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: Any) -> None:
      """Silent."""

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.daemon_threads = True
  seen = Server(server.server_port)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield seen
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
