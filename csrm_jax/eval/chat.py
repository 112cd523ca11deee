"""A client of OpenAI-compatible chat endpoints, on the standard library.

The key is read from an environment variable at every request; it is never
stored, written or named in a message.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

_LONGEST_WAIT = 60.0  # seconds, whatever Retry-After says


class Endpoint(NamedTuple):
  """Where to ask, and how patiently.

  Attributes:
    base_url: http(s)://host[:port]/v1; "/chat/completions" is added.
    model: its name there.
    key_variable: environment variable that holds the API key; "": no key.
    timeout: seconds for one attempt.
    retries: further attempts after status 429 or 5xx, a time-out or a broken
      connection.
    backoff: seconds before the first retry, doubled for each further one; a
      longer Retry-After counts, up to 60 s.
    cache: JSON-lines file of answers by hash of the question; "": none.
  """

  base_url: str
  model: str
  key_variable: str = ""
  timeout: float = 60.0
  retries: int = 4
  backoff: float = 1.0
  cache: str = ""


# An answer: `text`, and `tokens`: [[token, [[candidate, nats], ...]], ...]
Answer = dict[str, Any]


def asker(endpoint: Endpoint, *, max_tokens: int = 512) -> Callable[[str], str]:
  """A function from a prompt to the model's greedy answer.

  Args:
    endpoint: where to ask.
    max_tokens: of the answer.

  Raises:
    ValueError: at once, a bad URL or cache file; when asked, an endpoint that
      does not answer: names the URL, what happened and the remedy.
  """
  send = connect(endpoint)

  def ask(prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return send({"messages": messages, "max_tokens": max_tokens})["text"]

  return ask


def ask(endpoint: Endpoint, prompt: str, *, max_tokens: int = 512) -> str:
  """One question; `asker` says the rest."""
  return asker(endpoint, max_tokens=max_tokens)(prompt)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """A redirect would carry the key to a host that nobody named."""

  def redirect_request(self, *_: Any) -> None:
    return None


def connect(endpoint: Endpoint) -> Callable[[dict[str, Any]], Answer]:
  """A thread-safe function from a request's body to the answer, cached.

  Model and temperature 0 are added to the body.

  Raises:
    ValueError: a bad URL, key or cache file; in use, as `asker`.
  """
  if endpoint.timeout <= 0 or endpoint.retries < 0:
    raise ValueError(
      f"timeout = {endpoint.timeout}, retries = {endpoint.retries}; give "
      "seconds above 0 and 0 or more retries"
    )
  url = _url(endpoint.base_url)
  _key(endpoint, url)  # a missing variable is told before anything is asked
  path = Path(endpoint.cache) if endpoint.cache else None
  known = _read_cache(path)
  lock = threading.Lock()

  def send(body: dict[str, Any]) -> Answer:
    body = {"model": endpoint.model, "temperature": 0.0} | body
    text = json.dumps(body, sort_keys=True)
    key = hashlib.sha256(f"{url}\n{text}".encode()).hexdigest()
    if key not in known:
      answer = _answer(_post(endpoint, url, text.encode()), url)
      with lock:
        known[key] = answer
        if path is not None:
          path.parent.mkdir(parents=True, exist_ok=True)
          with path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"key": key, "answer": answer}) + "\n")
    return known[key]

  return send


def in_order(
  send: Callable[[dict[str, Any]], Answer],
  bodies: Sequence[dict[str, Any]],
  threads: int,
) -> list[Answer]:
  """Answers in the order of the bodies; the first error stops the rest."""
  with ThreadPoolExecutor(threads) as pool:
    waiting = [pool.submit(send, body) for body in bodies]
    try:
      return [one.result() for one in waiting]
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _url(base_url: str) -> str:
  if "@" in base_url:  # what stands before it is not to be printed
    raise ValueError(
      "base_url: it holds a user or a password (an @); put the key into an "
      "environment variable and name that as key_variable"
    )
  try:
    parts = urllib.parse.urlsplit(base_url)
    fits = parts.port != 0  # .port raises if it is no number
  except ValueError:
    fits, parts = False, urllib.parse.urlsplit("")
  fits = fits and parts.scheme in ("http", "https") and bool(parts.hostname)
  if not fits or parts.query or parts.fragment or " " in base_url:
    raise ValueError(
      f"base_url: {base_url!r} is no address of a server; give "
      "http(s)://host[:port]/v1"
    )
  base = base_url.rstrip("/")
  tail = "/chat/completions"
  return base if base.endswith(tail) else base + tail


def _key(endpoint: Endpoint, url: str) -> str:
  """The API key; "" if none is wanted."""
  if not endpoint.key_variable:
    return ""
  key = os.environ.get(endpoint.key_variable, "").strip()
  if not key or not key.isascii() or not key.isprintable():
    wrong = "holds characters that no key has" if key else "is not set"
    raise ValueError(
      f"{url}: environment variable {endpoint.key_variable} {wrong}; export "
      "the API key under that name"
    )
  return key


def _post(endpoint: Endpoint, url: str, body: bytes) -> bytes:
  """The server's reply to one request, after as many attempts as it takes."""
  key = _key(endpoint, url)
  headers = {"Content-Type": "application/json"}
  if key:
    headers["Authorization"] = f"Bearer {key}"
  opener = urllib.request.build_opener(_NoRedirect)
  for attempt in range(endpoint.retries + 1):
    request = urllib.request.Request(url, body, headers, method="POST")
    wait = endpoint.backoff * 2**attempt
    try:
      with opener.open(request, timeout=endpoint.timeout) as reply:
        return reply.read()
    except urllib.error.HTTPError as error:
      with error:
        said = _excerpt(error, key)
        wait = max(wait, _retry_after(error.headers))
      fault = f"status {error.code}{said}"
      if error.code != 429 and error.code < 500:
        raise ValueError(
          f"{url}: {fault}; {_remedy(error, endpoint)}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, "reason", error)
      late = isinstance(reason, TimeoutError)
      fault = f"no answer in {endpoint.timeout:g} s" if late else repr(reason)
    if attempt < endpoint.retries:
      time.sleep(min(wait, _LONGEST_WAIT))
  raise ValueError(
    f"{url}: {fault}, {endpoint.retries + 1} attempts; see that the server "
    "runs and can be reached, or raise timeout or retries"
  )


def _excerpt(error: urllib.error.HTTPError, key: str) -> str:
  """The first words of an error's body; servers may quote the key back."""
  try:
    text = error.read(2000).decode("utf-8", "replace")
  except (OSError, http.client.HTTPException):
    return ""
  text = " ".join(text.split())
  if key:
    text = text.replace(key, "***")
  return f" ({text[:200]})" if text else ""


def _retry_after(headers: Message) -> float:
  try:
    return max(float(headers.get("Retry-After") or 0.0), 0.0)
  except ValueError:  # a date
    return 0.0


def _remedy(error: urllib.error.HTTPError, endpoint: Endpoint) -> str:
  if error.code in (401, 403):
    name = endpoint.key_variable
    return (
      f"correct the API key in {name}"
      if name
      else "it wants an API key: name its environment variable as key_variable"
    )
  if error.code == 404:
    return f"correct base_url (.../v1) or the model's name {endpoint.model!r}"
  if 300 <= error.code < 400:
    place = error.headers.get("Location", "elsewhere")
    return f"it redirects to {place}; give that address as base_url"
  return (
    "the server refuses the request; if it speaks of logprobs, pass "
    "top_logprobs=0"
  )


def _answer(reply: bytes, url: str) -> Answer:
  """What matters of a reply.

  Raises:
    ValueError: it is no chat completion.
  """
  try:
    choice = json.loads(reply)["choices"][0]
    text = choice["message"].get("content") or ""
    told = (choice.get("logprobs") or {}).get("content") or []
    tokens = [
      [
        entry["token"],
        [
          [c["token"], float(c["logprob"])]
          for c in (entry.get("top_logprobs") or [entry])
        ],
      ]
      for entry in told
    ]
    if not all(isinstance(t, str) for t in (text, *(t for t, _ in tokens))):
      raise TypeError("content or a token is no text")
  except (ValueError, KeyError, IndexError, TypeError, AttributeError):
    shown = reply[:80].decode("utf-8", "replace")
    raise ValueError(
      f"{url}: {shown!r}... is no chat completion; give the base_url of an "
      "OpenAI-compatible server"
    ) from None
  return {"text": text, "tokens": tokens}


def _read_cache(path: Path | None) -> dict[str, Answer]:
  known: dict[str, Answer] = {}
  if path is None or not path.is_file():
    return known
  for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
    try:
      entry = json.loads(line)
      known[entry["key"]] = {
        "text": entry["answer"]["text"],
        "tokens": entry["answer"]["tokens"],
      }
    except (ValueError, KeyError, TypeError):
      raise ValueError(
        f"{path}:{number}: {line[:40]!r} is no cached answer (a run that was "
        "killed may leave half a line); delete the line"
      ) from None
  return known
