"""`report.html` of a real job in a real browser: headless Chromium, driven by playwright.

Without Chromium or playwright the tests are skipped, saying so; where `CI` is set they fail instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perseus_plugin.reporting.report.findings import Findings, Options, find
from perseus_plugin.reporting.report.folder import load_folder
from perseus_plugin.reporting.report.following import Followed, Server
from tests.reporting.job import Job

from .observed import MICROBATCHES, STAGES, Observed, look_at_the_observed_job

# One job and one browser for all of them.
pytestmark = [pytest.mark.e2e, pytest.mark.browser, look_at_the_observed_job]

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_DRAWN = "[...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('.main-svg'))"


_CAPTIONS = ".annotation-text-g text, g[class$='title'] text, .legendtext, g[class$='tick'] text"
_CUT = """captions => [...document.querySelectorAll('.plotly-graph-div')].flatMap(d => {
    const paper = d.getBoundingClientRect();
    return [...d.querySelectorAll(captions)]
        .map(t => [t.textContent, t.getBoundingClientRect()])
        .filter(([text, b]) => b.width && (b.left < paper.left - 1 || b.right > paper.right + 1))
        .map(([text]) => `${d.id}: ${text}`);
})"""
"""Captions of pictures that go beyond their paper, to which plotly.js cuts them off."""
_CONTRASTS = """captions => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = colour => colour.slice(0, 3)
        .map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        const colour = numbers(getComputedStyle(e).backgroundColor);
        return colour[3] === 0 ? behind(e.parentElement) : colour;
    };
    // As `invert(0.9) hue-rotate(180deg)`, by which pictures are turned over.
    const turns = [[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]];
    const turned = colour => {
        const inverted = colour.slice(0, 3).map(c => 255 * 0.9 - 0.8 * c);
        return turns.map(row => Math.min(255, Math.max(0, row.reduce((sum, of, i) => sum + of * inverted[i], 0))));
    };
    const found = [];
    const note = (text, of, on) => {
        const [high, low] = [luminance(of), luminance(on)].sort((a, b) => b - a);
        found.push([text, (high + 0.05) / (low + 0.05)]);
    };
    for (const e of document.querySelectorAll('main *:not(script, style)'))
        if (!e.closest('.plotly-graph-div') && [...e.childNodes].some(n => n.nodeType === 3 && n.nodeValue.trim()))
            note(e.textContent.trim(), numbers(getComputedStyle(e).color), behind(e));
    for (const t of document.querySelectorAll(captions)) {
        const div = t.closest('.plotly-graph-div'), fill = numbers(getComputedStyle(t).fill);
        note(t.textContent, getComputedStyle(div).filter === 'none' ? fill : turned(fill), behind(div));
    }
    return found;
}"""
"""All text outside of pictures, and captions, each with its contrast to what is behind it (WCAG 2.2)."""
_LEGIBLE = 4.5  # WCAG 2.2, level AA


@dataclass
class Shown:
    """A page in the browser, and what it complained about or fetched."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def open(self, path: Path) -> None:
        self.page.goto(f"file://{path}", timeout=120_000)
        self.page.wait_for_function(_DRAWN, timeout=120_000)

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def data(self, figure: str) -> list[dict[str, Any]]:
        """Name, length and whether it is drawn, of every trace of a figure as plotly.js holds it."""
        script = (
            "id => document.getElementById(id)._fullData"
            ".map(t => ({name: t.name, length: t.x ? t.x.length : 0, visible: t.visible}))"
        )
        found: list[dict[str, Any]] = self.page.evaluate(script, f"figure-{figure}")
        return found

    def zoom(self, figure: str) -> None:
        """Drag a rectangle in its first picture."""
        element = self.page.locator(f"#figure-{figure} .nsewdrag").first
        element.scroll_into_view_if_needed()
        box, before = element.bounding_box(), self.range(figure)
        for at, press in ((0.2, self.page.mouse.down), (0.6, self.page.mouse.up)):
            self.page.mouse.move(box["x"] + at * box["width"], box["y"] + at * box["height"], steps=5)
            press()
        script = "([id, was]) => document.getElementById(id)._fullLayout.xaxis.range[0] !== was"
        self.page.wait_for_function(script, arg=[f"figure-{figure}", before[0]], timeout=10_000)

    def range(self, figure: str) -> list[float]:
        """What its first picture shows, from left to right."""
        found: list[float] = self.page.evaluate(
            "id => document.getElementById(id)._fullLayout.xaxis.range", f"figure-{figure}"
        )
        return found

    def top(self, section: str) -> float:
        """Where it is in the window."""
        return float(self.page.evaluate("id => document.getElementById(id).getBoundingClientRect().top", section))

    def hover(self, selector: str) -> str:
        """The label that appears over an element."""
        element = self.page.locator(selector)
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        # From beside it: plotly.js takes no notice of a pointer that appears out of nowhere.
        self.page.mouse.move(box["x"] + box["width"] / 2 - 3, box["y"] + box["height"] / 2)
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
        label = self.page.locator(".hoverlayer .hovertext")
        label.first.wait_for(timeout=10_000)
        return str(label.first.text_content())


@pytest.fixture(scope="module")
def shown() -> Iterator[Shown]:
    lacking = ""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking = "playwright is not installed (pip install playwright)"
    if chromium is None:
        lacking = lacking or "there is no Chromium (Debian: apt-get install chromium)"
    if lacking and os.environ.get("CI"):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        made = Shown(browser.new_page(viewport={"width": 1280, "height": 900}))
        made.page.on("console", lambda message: made.complaints.append(f"{message.type}: {message.text}"))
        made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
        made.page.on("request", lambda request: made.fetched.append(request.url))
        yield made
        browser.close()


def written(job: Job) -> None:
    """What has run so far is in its folder."""
    for recorder in job.recorders:
        recorder.step(final=True)
    job.summarise("running")


def report(folder: Path, page: Path) -> None:
    command = [sys.executable, "-m", "perseus_plugin.cli.main", "report", str(folder), "--html", str(page)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def found(observed: Observed) -> Findings:
    return find(load_folder(observed.out))


@pytest.fixture(scope="module")
def page(shown: Shown, observed: Observed, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(observed.out, path)
    shown.complaints.clear()
    shown.fetched.clear()
    shown.open(path)
    return shown


def test_a_real_job_leaves_a_record_that_lacks_nothing(found: Findings) -> None:
    assert found.folder.missing == []
    assert sorted(found.folder.records) == list(range(STAGES))
    assert len(found.lanes) == 3
    assert all(len(lane.blocks) == STAGES * MICROBATCHES * 2 for lane in found.lanes)
    for record in found.folder.records.values():
        planned = [sample for sample in record.samples if sample.state == "plan"]
        assert planned
        assert all(sample.readings and sample.requests for sample in planned)


def test_the_browser_has_nothing_to_complain_about_and_fetches_nothing(page: Shown) -> None:
    assert page.complaints == []
    assert [url for url in page.fetched if not url.startswith(("file://", "data:", "blob:"))] == []


def test_the_timeline_has_a_bar_per_instruction(page: Shown, found: Findings) -> None:
    blocks = sum(len(lane.blocks) for lane in found.lanes)
    gaps = sum(len(lane.waits) for lane in found.lanes)
    assert page.count("#figure-timeline .barlayer .point") == blocks + gaps
    traces = [trace for trace in page.data("timeline") if trace["name"] == "instructions"]
    assert [trace["length"] for trace in traces] == [STAGES * MICROBATCHES * 2] * 3


def test_the_frontier_has_its_points(page: Shown, found: Findings) -> None:
    assert found.frontier is not None
    samples = len(found.frontier.samples)
    lengths = {trace["name"]: trace["length"] for trace in page.data("frontier")}
    assert lengths["lower bound"] == lengths["plans"] == samples
    assert lengths["full clocks"] == lengths["the job's plan"] == 1
    assert found.per is not None
    as_run = 0 if found.per.predicted else 1  # on a busy machine too few iterations may be known to compare
    assert ("as run, against measured full clocks" in lengths) == bool(as_run)
    assert page.count("#figure-frontier .scatterlayer .point") == 2 * (samples + 2 + as_run), "energy above power"


def test_training_shows_every_iteration(page: Shown, found: Findings) -> None:
    assert found.series is not None
    shown = page.count("#figure-training .scatterlayer .point")
    known = np.count_nonzero(np.isfinite(found.series.energy_j))
    assert known > 0
    assert shown == len(found.series.stretches) + 2 * known, "time, and energy and power where they are known"


def test_pointing_at_a_bar_tells_its_values(page: Shown, found: Findings) -> None:
    label = page.hover(f"#figure-timeline .xy .barlayer .trace:nth-child(2) .point:nth-child({MICROBATCHES + 1})")
    block = found.lanes[0].blocks[MICROBATCHES]
    assert f"{block.instruction.kind} {block.instruction.microbatch}, stage {block.instruction.stage}" in label
    assert f"{block.clock_mhz} MHz" in label


def test_pointing_at_a_plan_of_the_frontier_tells_its_values(page: Shown, found: Findings) -> None:
    assert found.frontier is not None
    label = page.hover("#figure-frontier .subplot.xy .scatterlayer .trace:nth-child(2) .point:last-child")
    assert f"{found.frontier.samples[-1].energy_j:.1f} J" in label.replace(",", "").replace("−", "-")


def test_labels_stay_apart(page: Shown) -> None:
    """No two titles or labels of what happened lie on each other at a width of 1,280 pixels."""
    script = """() => [...document.querySelectorAll('.plotly-graph-div')].map(d =>
        [...d.querySelectorAll('.annotation-text-g text, .g-xtitle text, .g-ytitle text, .legendtext')].map(t => {
            const b = t.getBoundingClientRect();
            return [t.textContent, b.left, b.top, b.right, b.bottom];
        }))"""
    for labels in page.page.evaluate(script):
        for at, (text, left, top, right, bottom) in enumerate(labels):
            for other, left2, top2, right2, bottom2 in labels[at + 1 :]:
                apart = right <= left2 + 1 or right2 <= left + 1 or bottom <= top2 + 1 or bottom2 <= top + 1
                assert apart, f"{text!r} lies on {other!r}"


def test_in_a_narrow_window_no_caption_and_no_label_is_cut(shown: Shown, tmp_path: Path) -> None:
    report(Job(tmp_path / "out").planned().finished().folder, tmp_path / "report.html")
    script = """() => [...document.querySelectorAll('.plotly-graph-div')].flatMap(d => {
        const whole = d.querySelector('.main-svg').getBoundingClientRect();
        return [...d.querySelectorAll('.annotation-text-g text, .g-xtitle text, .g-ytitle text, .legendtext')]
            .map(t => [t, t.getBoundingClientRect()])
            .filter(([t, b]) => b.width)
            .map(([t, b]) => [t.textContent, b.left - whole.left, whole.right - b.right]);
    })"""
    wide = dict(shown.page.viewport_size)
    shown.page.set_viewport_size({"width": 500, "height": 900})
    try:
        shown.open(tmp_path / "report.html")
        labels = shown.page.evaluate(script)
    finally:
        shown.page.set_viewport_size(wide)
    assert any(text.startswith("Plan, as predicted") for text, _, _ in labels)
    assert [text for text, left, right in labels if min(left, right) < 0] == []


@pytest.fixture
def narrow(page: Shown) -> Iterator[Shown]:
    """The page in a window of 500 pixels."""
    for_width = "[...document.querySelectorAll('.plotly-graph-div')].every(d => d._fullLayout.width === d.clientWidth)"
    wide = page.page.viewport_size
    page.page.set_viewport_size({"width": 500, "height": 900})
    page.page.wait_for_function(for_width, timeout=60_000)
    yield page
    page.page.set_viewport_size(wide)
    page.page.wait_for_function(for_width, timeout=60_000)


def test_a_narrow_window_shows_all_of_it(narrow: Shown) -> None:
    assert narrow.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is beside it"
    assert narrow.count(_CAPTIONS) > 20
    assert narrow.page.evaluate(_CUT, _CAPTIONS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_what_is_behind_it(page: Shown, scheme: str) -> None:
    page.page.emulate_media(color_scheme=scheme)
    try:
        contrasts = page.page.evaluate(_CONTRASTS, _CAPTIONS)
        paper = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    finally:
        page.page.emulate_media(color_scheme="light")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 3 * 64) == (scheme == "dark"), paper
    assert len(contrasts) > 100
    assert [one for one in contrasts if one[1] < _LEGIBLE] == []


def test_eight_stages_and_96_microbatches_open(shown: Shown, tmp_path: Path) -> None:
    folder = Job(tmp_path / "out", stages=8, microbatches=96).planned().finished().folder
    report(folder, tmp_path / "report.html")
    shown.complaints.clear()
    shown.open(tmp_path / "report.html")
    assert shown.complaints == []
    lanes = find(load_folder(folder), Options(frontier=False)).lanes
    assert [len(lane.blocks) for lane in lanes] == [8 * 96 * 2] * 3
    expected = sum(len(lane.blocks) + len(lane.waits) for lane in lanes)
    assert shown.count("#figure-timeline .barlayer .point") == expected
    assert (tmp_path / "report.html").stat().st_size < 12e6


def test_a_page_that_follows_a_job_keeps_what_was_zoomed_and_where_its_reader_is(shown: Shown, tmp_path: Path) -> None:
    job = Job(tmp_path / "out").profiled()
    written(job)
    server = Server(Followed(job.folder, Options(frontier=False)), 0)
    server.start("test")
    try:
        shown.complaints.clear()
        shown.fetched.clear()
        shown.page.goto(server.url, timeout=120_000)
        shown.page.wait_for_function(_DRAWN, timeout=120_000)
        assert shown.count("#figure-clocks") == 0, "there is no plan yet"
        shown.zoom("training")
        points = shown.count("#figure-training .scatterlayer .point")
        before = shown.range("training"), shown.top("training")
        written(job.planned(iterations=40))
        shown.page.wait_for_selector("#figure-clocks .main-svg", timeout=120_000)
        shown.page.wait_for_function(_DRAWN, timeout=120_000)
        assert shown.count("#figure-training .scatterlayer .point") > points
        assert shown.range("training") == before[0]
        assert shown.top("training") == pytest.approx(before[1], abs=2), "what is new is above"
        assert shown.complaints == []
        assert {url.removeprefix(server.url) for url in shown.fetched if not url.startswith("data:")} <= {
            "",
            "plotly.js",
        }
    finally:
        server.stop()
    shown.page.wait_for_function("document.getElementById('followed').innerText.startsWith('no longer')")
