"""The client: retries, time-outs, keys that stay secret, a cache."""

import json
import threading
import time

import pytest

from csrm_jax.eval import chat
from csrm_jax.eval.chat import Endpoint, ask, asker
from tests.endpoints import said, serve

KEY = "sk-test-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fast(url: str, **how) -> Endpoint:
  return Endpoint(url, "m", **{"backoff": 0.001, "timeout": 5.0, **how})


def test_asks_greedily_and_returns_the_text():
  with serve(lambda body, _: said(body["messages"][0]["content"][::-1])) as s:
    assert ask(fast(s.url), "abc", max_tokens=7) == "cba"
    assert ask(fast(s.url + "/chat/completions"), "xy") == "yx"
  assert s.paths == ["/v1/chat/completions"] * 2
  assert s.bodies[0] == {
    "model": "m",
    "temperature": 0.0,
    "max_tokens": 7,
    "messages": [{"role": "user", "content": "abc"}],
  }
  assert not any("Authorization" in h for h in s.headers)


def test_an_empty_answer_is_an_answer():
  with serve(lambda body, _: said(None)) as s:
    assert ask(fast(s.url), "abc") == ""


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_failure_is_retried(status):
  replies = [(status, "busy", {}), (status, "busy", {}), said("now")]
  with serve(lambda *_: replies.pop(0)) as s:
    assert ask(fast(s.url, retries=2), "x") == "now"
  assert len(s.bodies) == 3


def test_a_lasting_failure_tells():
  with (
    serve(lambda *_: (502, "bad gateway", {})) as s,
    pytest.raises(ValueError) as error,
  ):
    ask(fast(s.url, retries=1), "x")
  message = str(error.value)
  assert s.url + "/chat/completions: status 502 (bad gateway)" in message
  assert "2 attempts" in message and "raise timeout or retries" in message
  assert len(s.bodies) == 2


def test_waits_double_and_retry_after_counts(monkeypatch):
  waits: list[float] = []
  monkeypatch.setattr(chat.time, "sleep", waits.append)
  headers = [
    {},
    {"Retry-After": "7"},
    {"Retry-After": "900"},
    {"Retry-After": "Mon"},
  ]
  replies = [(429, "slow", h) for h in headers] + [said("ok")]
  with serve(lambda *_: replies.pop(0)) as s:
    assert ask(fast(s.url, backoff=0.5), "x") == "ok"
  assert waits == [0.5, 7.0, 60.0, 4.0]


def test_a_refusal_is_not_retried():
  reply = (400, "logprobs are not supported", {})
  with serve(lambda *_: reply) as s:
    with pytest.raises(ValueError, match=r"status 400 .*top_logprobs=0"):
      ask(fast(s.url), "x")
    assert len(s.bodies) == 1
  with (
    serve(lambda *_: (404, "no such model", {})) as s,
    pytest.raises(ValueError, match=r"correct base_url .* name 'm'"),
  ):
    ask(fast(s.url), "x")


def test_a_slow_server_times_out():
  done = threading.Event()

  def slow(*_):
    done.wait(20)
    return said("late")

  with serve(slow) as s:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"no answer in 0\.2 s, 2 attempts"):
      ask(fast(s.url, timeout=0.2, retries=1), "x")
    assert time.monotonic() - began < 10
    done.set()


def test_no_server_tells():
  with serve(lambda *_: said("x")) as s:
    gone = s.url
  with pytest.raises(ValueError, match=r"refused.*see that the server runs"):
    ask(fast(gone, retries=1), "x")


def test_the_key_is_sent_and_a_wrong_one_is_told_without_it(monkeypatch):
  def behave(body, headers):
    if headers.get("Authorization") == f"Bearer {KEY}":
      return said("hello")
    return 401, f"wrong: {headers.get('Authorization')}", {}

  with serve(behave) as s:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert ask(fast(s.url, key_variable="SOME_KEY"), "x") == "hello"
    monkeypatch.setenv("SOME_KEY", "sk-wrong-98765")
    with pytest.raises(ValueError) as error:
      ask(fast(s.url, key_variable="SOME_KEY"), "x")
    with pytest.raises(ValueError, match="name its environment variable"):
      ask(fast(s.url), "x")
  assert "status 401 (wrong: Bearer ***)" in str(error.value)
  assert "correct the API key in SOME_KEY" in str(error.value)
  assert "98765" not in str(error.value) + repr(error.value.__cause__)
  assert len(s.bodies) == 3  # no attempt is repeated


def test_a_missing_or_broken_key_is_told_before_asking(monkeypatch):
  monkeypatch.delenv("SOME_KEY", raising=False)
  with pytest.raises(ValueError, match="SOME_KEY is not set; export"):
    asker(fast("http://127.0.0.1:9/v1", key_variable="SOME_KEY"))
  monkeypatch.setenv("SOME_KEY", "sk-one\nX-Other: two")
  with pytest.raises(ValueError, match="SOME_KEY holds characters") as error:
    asker(fast("http://127.0.0.1:9/v1", key_variable="SOME_KEY"))
  assert "sk-one" not in str(error.value)


def test_a_redirect_does_not_take_the_key_along(monkeypatch):
  monkeypatch.setenv("SOME_KEY", KEY)
  with serve(lambda *_: said("caught")) as other:
    away = {"Location": other.url + "/chat/completions"}
    for status in (302, 307):
      with (
        serve(lambda *_, status=status: (status, "", away)) as s,
        pytest.raises(ValueError, match="redirects to http://127"),
      ):
        ask(fast(s.url, key_variable="SOME_KEY"), "x")
  assert other.bodies == []


@pytest.mark.parametrize(
  "url",
  [
    "", "localhost:8000/v1", "file:///etc/hosts", "http:///v1",
    "http://host:port/v1", "http://host/v1?key=x", "http://ho st/v1",
  ],
)  # fmt: skip
def test_a_bad_address_is_told_at_once(url):
  with pytest.raises(ValueError, match="is no address of a server"):
    asker(fast(url))


def test_a_password_in_the_address_is_not_printed():
  with pytest.raises(ValueError, match="key_variable") as error:
    asker(fast("https://me:hush@host/v1"))
  assert "hush" not in str(error.value)


@pytest.mark.parametrize(
  "reply",
  ["<html>", "[]", {"choices": []}, {"choices": [{"message": None}]},
   {"choices": [{"message": {"content": 3}}]}],
)  # fmt: skip
def test_what_is_no_completion_is_told(reply):
  with (
    serve(lambda *_: (200, reply, {})) as s,
    pytest.raises(ValueError, match="is no chat completion; give"),
  ):
    ask(fast(s.url), "x")


def test_impossible_patience_is_refused():
  for how in ({"timeout": 0.0}, {"retries": -1}):
    with pytest.raises(ValueError, match="seconds above 0 and 0 or more"):
      asker(fast("http://host/v1", **how))


def test_answers_are_cached_by_question_model_and_address(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("SOME_KEY", KEY)
  path = tmp_path / "new" / "answers.jsonl"
  how = {"cache": str(path), "key_variable": "SOME_KEY"}
  with serve(lambda body, _: said(body["messages"][0]["content"] * 2)) as s:
    for _ in range(2):
      one = asker(fast(s.url, **how))
      assert [one("a"), one("b"), one("a")] == ["aa", "bb", "aa"]
    assert len(s.bodies) == 2
    assert ask(fast(s.url, **how)._replace(model="other"), "a") == "aa"
    assert ask(fast(s.url, **how), "a", max_tokens=3) == "aa"
    assert len(s.bodies) == 4
  with serve(lambda *_: said("elsewhere")) as s:
    assert ask(fast(s.url, **how), "a") == "elsewhere"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["answer"]["text"] for line in lines] == [
    "aa", "bb", "aa", "aa", "elsewhere",
  ]  # fmt: skip
  assert len({line["key"] for line in lines}) == 5
  assert KEY not in path.read_text()
  path.write_text(path.read_text() + '{"key": "x", "ans')
  with pytest.raises(ValueError, match=r"jsonl:6: .*delete the line"):
    asker(fast("http://host/v1", cache=str(path)))


def test_failures_are_not_cached(tmp_path):
  replies = [(500, "", {}), said("ok")]
  path = tmp_path / "answers.jsonl"
  with (
    serve(lambda *_: replies.pop(0)) as s,
    pytest.raises(ValueError, match="status 500"),
  ):
    ask(fast(s.url, retries=0, cache=str(path)), "x")
    assert not path.exists()
    assert ask(fast(s.url, retries=0, cache=str(path)), "x") == "ok"


def test_in_order_keeps_the_order_and_runs_at_once():
  gate = threading.Barrier(4)

  def send(body):
    gate.wait(20)  # returns only if four are under way together
    time.sleep(0.01 * (4 - body["n"] % 4))
    return {"text": str(body["n"]), "tokens": []}

  bodies = [{"n": n} for n in range(8)]
  made = chat.in_order(send, bodies, 4)
  assert [a["text"] for a in made] == [str(n) for n in range(8)]


def test_in_order_stops_at_the_first_error():
  asked = []

  def send(body):
    asked.append(body["n"])
    time.sleep(0.01)
    raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    chat.in_order(send, [{"n": n} for n in range(500)], 1)
  assert len(asked) < 50
