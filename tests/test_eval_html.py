"""The page: whole, safe, readable, and with every number of the report."""

import base64
from html.parser import HTMLParser

import numpy as np
import pytest

from csrm_jax.data import synthetic
from csrm_jax.eval import cases, failures, html, run, sensitivity

SUITE = "synthetic_seen"
SIZE = 30
HOSTILE = "<script>alert('x')</script>&\" onload=\"x"
VOID = {"meta", "img"}


class Reader(HTMLParser):
  """Collects tags, attributes and text; fails on tags that do not match."""

  def __init__(self, text: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: list[tuple[str, dict]] = []
    self.texts: list[str] = []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


def judge(rows):
  return np.array(
    [np.sin(97.0 * len(r["spec"]) + len(str(r["messages"]))) for r in rows]
  )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("page")
  made = cases.synthetic(SUITE, size=SIZE)
  report = run.evaluate(
    judge, SUITE, judge_names=("csrm", "always_unsafe"), rows=SIZE, bootstrap=9
  )
  found = sensitivity.report(judge, made, limit=9, bootstrap=9)
  checks = failures.check(
    judge, made, names=["spec_ignored", "style"], bootstrap=9
  )
  pictures = {p.stem: p for p in sensitivity.draw(found, folder)}
  return report, found, checks, pictures


@pytest.fixture(scope="module")
def page(parts):
  report, found, checks, pictures = parts
  return html.page(
    report,
    sensitivity={"csrm": found},
    failures={"csrm": checks},
    pictures=pictures,
    title="Demo",
  )


def test_every_number_stands_on_the_page(parts, page):
  report, found, checks, _ = parts
  text = " ".join(Reader(page).texts)
  for values in report["suites"][SUITE]["judges"].values():
    for name, value in values.items():
      if name != "intervals":
        assert f"{value:.3f}" in text and name in text, name
  for name, (low, high) in report["suites"][SUITE]["judges"]["csrm"][
    "intervals"
  ].items():
    assert f"{low:.3f} to {high:.3f}" in text, name
  for probe, values in found.items():
    assert probe in text
    if isinstance(values, dict):
      for name, value in values.items():
        if isinstance(value, float):
          assert f"{value:.3f}" in text, (probe, name)
  for name, r in checks.items():
    assert name in text and r["pass_mark"] in text
    assert f"{r['value']:.3f}" in text
  assert ("no", "yes")[bool(checks["style"]["passed"])] in text


def test_nothing_is_loaded_and_nothing_runs(parts, page):
  tags = Reader(page).tags
  assert not {"script", "link", "iframe", "object", "base"} & {
    t for t, _ in tags
  }
  for tag, attributes in tags:
    assert not any(k.startswith("on") for k in attributes), (tag, attributes)
    for key in ("src", "href", "srcset", "action"):
      assert attributes.get(key, "data:").startswith("data:"), (tag, key)
  assert "url(" not in page and "@import" not in page and "http://" not in page
  policy = next(
    a["content"] for _, a in tags if "Policy" in str(a.get("http-equiv"))
  )
  assert policy.startswith("default-src 'none'")


def test_pictures_are_inside(parts, page):
  pictures = parts[3]
  images = [a for t, a in Reader(page).tags if t == "img"]
  assert [a["alt"] for a in images] == list(pictures)
  for image, path in zip(images, pictures.values(), strict=True):
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert data == path.read_bytes()


def test_light_dark_and_phone(page):
  assert "prefers-color-scheme: dark" in page
  assert "color-scheme: light dark" in page
  names = [
    a.get("content", "")
    for t, a in Reader(page).tags
    if t == "meta" and a.get("name") == "viewport"
  ]
  assert names == ["width=device-width, initial-scale=1"]
  tags = Reader(page).tags
  wide = [i for i, (t, a) in enumerate(tags) if a.get("class") == "wide"]
  tables = [i for i, (t, _) in enumerate(tags) if t == "table"]
  assert [i + 1 for i in wide] == tables  # every table scrolls by itself


def test_hostile_text_stays_text(tmp_path):
  result = {
    "value": 0.5,
    "pass_mark": HOSTILE,
    "passed": None,
    "n": 1,
    "interval": None,
    "also": {HOSTILE: 1.0},
  }
  picture = tmp_path / "a.png"
  picture.write_bytes(html._PNG)
  text = html.page(
    {
      "model": {HOSTILE: HOSTILE},
      "suites": {
        HOSTILE: {
          "rows": 1,
          "pairs": 0,
          "judges": {HOSTILE: {HOSTILE: 0.5, "intervals": {}}},
        }
      },
      "notes": [HOSTILE],
    },
    failures={HOSTILE: {HOSTILE: result}},
    sensitivity={
      HOSTILE: {
        HOSTILE: {
          HOSTILE: 1.0,
          "largest": [
            {
              "id": HOSTILE,
              "rule": 1,
              "text": HOSTILE,
              "shift": 0.1,
              "decisive": None,
            }
          ],
        }
      }
    },
    pictures={HOSTILE: picture},
    title=HOSTILE,
  )
  read = Reader(text)
  assert "<script" not in text
  assert not any("onload" in a for _, a in read.tags)
  assert sum(HOSTILE in t for t in read.texts) >= 12


def test_bare_report_and_writing(tmp_path):
  path = html.write(tmp_path / "deep" / "report.html", {"suites": {}})
  text = path.read_text(encoding="utf-8")
  read = Reader(text)
  assert text.startswith("<!DOCTYPE html>") and "Evaluation" in read.texts
  assert not any("Sensitivity" in t or "Failure" in t for t in read.texts)


def test_pictures_must_be_png(tmp_path):
  with pytest.raises(ValueError, match="no such file"):
    html.page({}, pictures={"x": tmp_path / "none.png"})
  (tmp_path / "not.png").write_text("text")
  with pytest.raises(ValueError, match="no PNG"):
    html.page({}, pictures={"x": tmp_path / "not.png"})


def test_largest_rules_of_cases_are_named(parts):
  found = parts[1]
  text = " ".join(Reader(html.page({}, sensitivity={"csrm": found})).texts)
  first = found["leave_one_out"]["largest"][0]
  assert first["id"] in text and f"S{first['rule']}: {first['text']}" in text
  assert synthetic.suite(SUITE, size=1)[0]["id"] == first["id"]
