"""distrust report: the page, looked at in a real browser.

A copy of the page with a measuring script is shown in frames of different widths.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distrust.checkpoint import catalog
from distrust.reporting.panels import PANELS
from run_folders import HOSTILE, write_run

SECTIONS = {"state", "pictures", "provenance", "evaluations", "checkpoints", "options", "environment"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (400, 1200)
MEASURE = """<script>
addEventListener("load", () => parent.postMessage({
  width: innerWidth,
  overflow: document.documentElement.scrollWidth,
  title: document.title,
  sections: [...document.querySelectorAll("section")].map(e => e.id),
  pictures: [...document.querySelectorAll("figure svg")].map(e => {
    const box = e.getBoundingClientRect();
    return [e.getAttribute("aria-label"), box.width, box.height, e.querySelectorAll("path, use").length];
  }),
  clipped: [...document.querySelectorAll("figure svg text")].filter(e => {
    const box = e.getBoundingClientRect(), around = e.closest("figure").getBoundingClientRect();
    return box.left < around.left - 1 || box.right > around.right + 1;
  }).map(e => e.textContent),
  cells: [...document.querySelectorAll("#provenance td:first-child")].map(e => e.textContent),
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  scripts: document.scripts.length,
  images: document.images.length,
  requests: performance.getEntriesByType("resource").map(e => e.name),
  ink: getComputedStyle(document.body).color,
  page: getComputedStyle(document.body).backgroundColor,
  label: getComputedStyle(document.querySelector("figure svg text")).fill,
  line: getComputedStyle(document.querySelector("#picture-loss svg path[style*='series-1']")).stroke,
}, "*"));
</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose source classes have names that a page could obey, and with a damaged checkpoint."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run", classes=HOSTILE, max_steps=90)
    (folder / "checkpoints" / "checkpoint-80.safetensors").write_bytes(b"cut")
    return folder


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    from distrust.cli import main

    target = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", str(run), "--out", str(target)]) == 0
    return target


def looked_at(page: Path, folder: Path, *, dark: bool) -> tuple[list[dict], str]:
    """The measurements of a browser at each width, and its console output."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    text = page.read_text("utf-8")
    assert len(policy.findall(text)) == 1
    folder.mkdir()
    (folder / "measured.html").write_text(policy.sub("", text).replace("</body>", MEASURE + "</body>"))
    (folder / "untouched.html").write_text(text)
    (folder / "frames.html").write_text(
        """<!doctype html><title>frames</title><pre id=found></pre><script>
        const found = [];
        addEventListener("message", e => {
          found.push(e.data);
          document.getElementById("found").textContent = JSON.stringify(found);
        });
        </script>"""
        + "".join(f"<iframe src=measured.html width={w} height=900 frameborder=0></iframe>" for w in WIDTHS)
        + "<iframe src=untouched.html width=900 height=900></iframe>"
    )
    completed = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000",
            "--dump-dom", (folder / "frames.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    match = re.search(r"<pre id=\"found\">(.*?)</pre>", completed.stdout, re.DOTALL)
    assert match, completed.stderr
    console = "\n".join(line for line in completed.stderr.splitlines() if "CONSOLE" in line)
    return sorted(json.loads(html.unescape(match[1]) or "[]"), key=lambda frame: frame["width"]), console


@pytest.fixture(scope="module")
def light(report, tmp_path_factory):
    return looked_at(report, tmp_path_factory.mktemp("browser") / "light", dark=False)


def test_a_browser_shows_every_section_and_picture(light):
    frames, console = light
    assert [frame["width"] for frame in frames] == list(WIDTHS)
    assert console == ""
    for frame in frames:
        assert set(frame["sections"]) == SECTIONS
        labels = [label for label, *_ in frame["pictures"]]
        assert [label.split(".")[0] for label in labels] == [
            panel.title for name, panel in PANELS.items() if name != "device"
        ]
        for label, width, height, paths in frame["pictures"]:
            assert 250 < width <= frame["width"], label
            assert 0.5 < height / width < 1.2, label
            assert paths > 5, label
        assert len(set(frame["ids"])) == len(frame["ids"])


def test_nothing_overflows_on_a_phone_or_a_desk(light):
    for frame in light[0]:
        assert frame["overflow"] <= frame["width"]
        assert frame["clipped"] == []


def test_hostile_names_are_text_in_a_browser(light):
    for frame in light[0]:
        assert frame["title"].startswith("run: not finished")
        assert frame["scripts"] == 1  # the one that measures
        assert frame["images"] == 0
        assert frame["requests"] == []
        assert [cell[:8] for cell in frame["cells"][:3]] == [name[:8] for name in HOSTILE]


def test_dark_is_dark(light, report, tmp_path):
    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    day, night = light[0][0], looked_at(report, tmp_path / "dark", dark=True)[0][0]
    assert brightness(day["page"]) > 700 > 100 > brightness(night["page"])
    assert brightness(day["ink"]) < 200 < 600 < brightness(night["ink"])
    assert brightness(day["label"]) < 400 < brightness(night["label"])
    assert brightness(day["line"]) < brightness(night["line"])


class _Markup(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_but_itself(report):
    text = report.read_text("utf-8")
    page = _Markup(text)
    assert not set(page.tags) & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name.endswith(("href", "src", "data", "action", "srcset")):
            assert value.startswith(("#", "data:,")), value
        assert not re.search(r"url\((?!#)", value or "")
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"<code>.*?</code>", "", text))
    assert "@import" not in text
    # Every reference of a picture leads to something in the same picture.
    ids = [value for name, value in page.attributes if name == "id"]
    references = re.findall(r'(?:url\(|href=")#([^")]+)', text)
    assert set(references) <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_shows_what_the_folder_holds(report, run):
    text = " ".join(_Markup(report.read_text("utf-8")).words)
    newest = catalog.scan(run / "checkpoints").files[-1]
    for expected in (
        newest.state_digest,
        "step 60 of 90; the newest checkpoint is of step 60",
        "checkpoint-80.safetensors",
        "damaged",
        "learning_rate",
        "default 0.0002",  # it is 0.0001
        "2.13.0",
        "monotone",
        "effective sample size 144",
        "distrust train --resume ",
        "0.20%",  # 3 saves of 10 ms next to 60 steps of 250
    ):
        assert expected in text, expected
    for name in HOSTILE[:2]:
        assert name[:25] in text


def test_the_same_folder_gives_the_same_bytes(distrust, report, run, tmp_path):
    completed = distrust("report", run, "--out", tmp_path / "again.html")
    assert (completed.code, completed.out) == (0, f"{tmp_path / 'again.html'}\n")
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_the_page_of_a_run_without_metrics_or_checkpoints(distrust, tmp_path):
    old = write_run(tmp_path / "old")
    (old / "metrics.jsonl").unlink()
    (old / "provenance.json").unlink()
    assert distrust("report", old).code == 0
    text = (old / "report.html").read_text("utf-8")
    assert "no metrics.jsonl" in text
    assert 'id="provenance"' not in text
    young = tmp_path / "young"
    young.mkdir()
    (young / "metrics.jsonl").write_text("")
    assert distrust("report", young).code == 0
    assert "not saved yet" in (young / "report.html").read_text("utf-8")


def test_a_mistake_is_reported_in_one_line(distrust, run, tmp_path, tmp_path_factory):
    young = tmp_path_factory.mktemp("young")  # without pictures
    (young / "metrics.jsonl").write_text("")
    for arguments, code, message in [
        ([run, "--out", tmp_path / "page.pdf"], 2, "give a name that ends with .html"),
        ([tmp_path], 1, "no run here"),
        ([young, "--out", "/dev/null/page.html"], 1, "not written"),
    ]:
        completed = distrust("report", *arguments)
        assert (completed.code, completed.out, completed.err.count("\n")) == (code, "", 1), completed.err
        assert message in completed.err
    assert list(tmp_path.iterdir()) == []
