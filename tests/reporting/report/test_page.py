from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_figures
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.record.recorder import record_path
from perseus_plugin.reporting.report import figures
from perseus_plugin.reporting.report.findings import Findings, Happening, Options, find
from perseus_plugin.reporting.report.folder import load_folder
from perseus_plugin.reporting.report.page import page
from perseus_plugin.reporting.report.phrases import payback
from perseus_plugin.reporting.report.reigns import Reign
from perseus_plugin.reporting.report.training import training
from perseus_plugin.reporting.report.worth import PerIteration, Rates, SoFar
from tests.reporting.job import Job

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job") / "out", stages=3, microbatches=5).planned().finished()


@pytest.fixture(scope="module")
def found(job: Job) -> Findings:
    return find(load_folder(job.folder))


class Sections(HTMLParser):
    """Ids of sections, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag == "section" and names.get("id"):
            self.ids.append(str(names["id"]))
        self.fetched += [str(names[name]) for name in ("src", "href") if names.get(name)]


def test_the_page_has_every_part_and_fetches_nothing(found: Findings) -> None:
    text = page(found)
    sections = Sections(text)
    assert sections.ids == ["timeline", "training", "frontier", "profile", "clocks", "worth", "origin"]
    assert [url for url in sections.fetched if not url.startswith(("#", "data:"))] == []
    assert "Emulated GPUs." in text
    assert "Points: as run, emulated." in text


def test_what_is_missing_stands_on_the_page(tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    job.iterate(1)
    for recorder in job.recorders:
        recorder.step()
    sections = Sections(text := page(find(load_folder(job.folder))))
    assert sections.ids == ["missing", "training", "worth", "origin"]
    assert "plan.json is not there" in text


def test_names_from_files_cannot_break_the_page(tmp_path: Path) -> None:
    job = Job(tmp_path / "out").planned().finished()
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    for rank in (0, 1):
        path = record_path(job.folder, rank)
        path.write_text(path.read_text().replace('"state":"full"', '"reason":' + json.dumps(bad) + ',"state":"full"'))
    summary = json.loads((job.folder / "summary.json").read_text())
    (job.folder / "summary.json").write_text(json.dumps({**summary, "gpu": bad}))
    text = page(find(load_folder(job.folder)))
    body = text[text.index("<body>") :]
    assert "onerror" in body
    assert "<img" not in body
    assert "alert(1)</script>" not in body


def bars(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def test_the_timeline_has_a_bar_per_instruction_and_its_wait_behind(found: Findings, job: Job) -> None:
    figure = figures.timeline(found.lanes)
    drawn = bars(figure, "instructions")
    assert [len(trace.x) for trace in drawn] == [30, 30, 30]
    plan = drawn[1]
    flat = [planned for row in job.plan.stages for planned in row]
    assert list(plan.base) == pytest.approx([one.start_s for one in flat], abs=1e-6)
    assert list(plan.x) == pytest.approx([one.finish_s - one.start_s for one in flat], abs=2e-6)
    assert list(plan.y) == [one.instruction.stage for one in flat]
    colours = dict(zip([one.frequency_mhz for one in flat], plan.marker.color, strict=True))
    assert len(set(colours.values())) == len(colours) > 1
    for trace, lane in zip(bars(figure, "waiting"), found.lanes, strict=True):
        assert sum(trace.x) == pytest.approx(lane.waiting_s, abs=1e-3)
    assert sum("critical path" in text for text in plan.hovertext) == sum(b.critical for b in found.lanes[1].blocks)
    assert "F0" in plan.text


def test_a_large_pipeline_carries_no_labels(tmp_path: Path) -> None:
    found = find(load_folder(Job(tmp_path / "out", stages=4, microbatches=40).planned().finished().folder))
    assert all(trace.text is None for trace in bars(figures.timeline(found.lanes), "instructions"))


def test_the_frontier_has_its_points_and_the_chosen_one(found: Findings, job: Job) -> None:
    assert found.frontier is not None
    figure = figures.frontier(found.frontier, job.plan, found.per)
    bound, plans, full, chosen, ran = figure.data[::2]
    assert len(bound.x) == len(plans.x) == len(found.frontier.samples)
    assert all(b <= p for b, p in zip(bound.y, plans.y, strict=True))
    assert (full.x[0], full.y[0]) == (job.plan.baseline_time_s, job.plan.baseline_energy_j)
    assert (chosen.x[0], chosen.y[0]) == (job.plan.iteration_time_s, job.plan.energy_j)
    assert ran.y[0] == pytest.approx(job.plan.energy_j, rel=0.02)
    for energies, powers in zip(figure.data[::2], figure.data[1::2], strict=True):
        assert list(powers.y) == pytest.approx([e / s for e, s in zip(energies.y, energies.x, strict=True)])


def test_what_costs_least_is_marked(job: Job) -> None:
    found = find(load_folder(job.folder), Options(Rates(price=0.2, gpu_hour=0.0)))
    assert found.frontier is not None
    assert found.least_cost is not None
    figure = figures.frontier(found.frontier, job.plan, found.per, found.least_cost)
    (mark,) = [trace for trace in figure.data[::2] if trace.name == "least cost"]
    assert (mark.x[0], mark.y[0]) == (found.least_cost.iteration_time_s, found.least_cost.energy_j)


def test_curves_carry_error_bars_of_two_standard_errors(found: Findings, job: Job) -> None:
    figure = figures.curves(job.profile)
    assert len(figure.data) == 2 * 3 * 2
    rows = job.profile.table[0, "backward"]
    energy = next(t for t in figure.data if t.name == "stage 0" and list(t.y) == [m.energy_j for m in rows])
    assert list(energy.error_y.array) == pytest.approx([2 * m.energy_se_j for m in rows])


def test_a_stage_is_named_once_whatever_it_runs(job: Job) -> None:
    """As where the first stage computes no gradient of its input."""
    without = Profile({key: rows for key, rows in job.profile.table.items() if key != (0, "backward")})
    figure = figures.curves(without)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["stage 0", "stage 1", "stage 2"]


def test_training_shows_every_state_in_its_colour(found: Findings, job: Job) -> None:
    assert found.series is not None
    figure = training(found.series, found.marks, found.per)
    shown = {trace.name: len(trace.x) for trace in figure.data if trace.yaxis == "y"}
    assert shown == {"warm-up": 2, "profiling": 9, "full clocks": 3, "plan": 12}
    assert [note.text for note in figure.layout.annotations] == ["profiling", "profiled", "plan 1"]


def test_a_run_shows_power_beside_budget_and_what_was_predicted(found: Findings) -> None:
    assert found.series is not None
    assert found.per is not None
    rulers = [Reign(13, "slowdown 0 %", power_ratio=0.8), Reign(20, "slowdown 0 %, within 700 W", 700.0)]
    data = {trace.name: trace for trace in training(found.series, [], found.per, rulers).data if trace.yaxis == "y3"}
    pairs = found.series.of("plan")
    assert list(data["plan"].y) == pytest.approx([energy_j / stretch.time_s for stretch, energy_j in pairs])
    end = found.series.stretches[-1].first + found.series.stretches[-1].count
    assert (data["power budget"].x, data["power budget"].y) == (
        (12.5, 19.5, 19.5, end - 0.5),
        (None, None, 700.0, 700.0),
    )
    full_w = found.per.full_j / found.per.full_s
    assert data["power predicted for the target"].y == (0.8 * full_w, 0.8 * full_w, None, None)
    without = {trace.name for trace in training(found.series, [], None, rulers[:1]).data}
    assert without == {"warm-up", "profiling", "full clocks", "plan"}, "neither is known"


def test_labels_of_what_happened_do_not_lie_on_each_other(found: Findings) -> None:
    assert found.series is not None
    crowd = [Happening(number // 2, f"event number {number}") for number in range(40)]
    figure = training(found.series, crowd, None)
    notes = figure.layout.annotations
    assert 0 < len(notes) < 40
    wide = found.series.stretches[-1].first + 1
    by_level: dict[float, list[tuple[float, float]]] = {}
    for note in notes:
        at, width = (note.x + 0.5) / wide, 0.0075 * len(note.text)
        by_level.setdefault(note.yshift, []).append((at - width, at) if note.xanchor == "right" else (at, at + width))
    for spans in by_level.values():
        assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))


def test_clocks_show_requests_and_readings_per_stage(found: Findings) -> None:
    figure = figures.clocks(found.clocks)
    assert [trace.name for trace in figure.data] == ["asked for", "read back"] * 3
    for stage, sample in enumerate(found.clocks):
        read = figure.data[2 * stage + 1]
        assert list(read.y) == [reading.clock_mhz for reading in sample.readings]


def test_every_figure_hides_the_plotting_librarys_logo(found: Findings) -> None:
    assert len(re.findall(r'"displaylogo": ?false', page(found))) == 5


def test_the_page_links_to_each_of_its_parts_and_says_emulated_on_each_picture(found: Findings) -> None:
    text = page(found)
    ids = Sections(text).ids
    assert re.findall(r'<a href="#(\w+)">', text.split("<nav>")[1].split("</nav>")[0]) == ids
    pictures = [name for name in ids if f'id="figure-{name}"' in text]
    assert len(pictures) == 5
    assert text.count('<span class="tag">emulated GPUs</span>') == len(pictures)


@pytest.mark.parametrize(
    ("profiling_j", "name", "value"),
    [
        (-500.0, "profiling", "12 s longer"),
        (6000.0, "profiling paid for itself in", "60 s"),
        (600_000.0, "profiling paid for itself in", "100 min"),
    ],
)
def test_when_profiling_has_paid_for_itself(found: Findings, profiling_j: float, name: str, value: str) -> None:
    run = SoFar(90, 0.1, 9e5, 1e5, 0, profiling_j, 12.0)
    paid = payback(replace(found, per=PerIteration(1000.0, 2.0, 800.0, 2.0, False), so_far=run))
    assert paid is not None
    assert paid[:2] == (name, value)
    assert "saves 0.1 kWh an hour" in paid[2]


def test_the_readmes_table_and_pictures_are_made_of_one_run(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(readme_figures, "screenshot", lambda *_: b"of a browser")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    before = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(before)
    readme_figures.write(job.folder, tmp_path)
    table, after = capsys.readouterr().out, (tmp_path / "README.md").read_text()
    energy_j = json.loads((job.folder / "summary.json").read_text())["energy_j"]["full_clock"]
    assert f"| energy | {energy_j:,.1f} J |" in table
    (was,), (now,) = (readme_figures.TABLE.findall(text) for text in (before, after))
    assert now == table
    assert after.replace(now, was) == before, "nothing else has changed"
    assert [row.split("|")[1] for row in was.splitlines()] == [row.split("|")[1] for row in now.splitlines()]
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == {"timeline.png", *readme_figures.SHOTS}


def test_without_a_saving_nothing_is_said_of_paying_back(found: Findings) -> None:
    run = SoFar(90, 0.1, 9e5, 1e5, 0, 600.0, 12.0)
    assert payback(replace(found, per=PerIteration(800.0, 2.0, 800.0, 2.0, False), so_far=run)) is None


def test_the_frontiers_axes_are_in_percent_of_full_clocks_as_well(found: Findings) -> None:
    assert found.frontier is not None
    assert found.folder.plan is not None
    drawn = figures.frontier(found.frontier, found.folder.plan, found.per).to_dict()["layout"]
    plan = found.folder.plan
    for axis, full in (("yaxis", plan.baseline_energy_j), ("xaxis2", plan.baseline_time_s)):
        ticks = dict(zip(drawn[axis]["ticktext"], drawn[axis]["tickvals"], strict=True))
        assert 2 <= len(ticks) <= 8
        for text, value in ticks.items():
            percent = re.search(r"<br>(?:([+-][\d.]+) %|full clocks)$", text)
            assert percent is not None, text
            assert 100 * (value / full - 1) == pytest.approx(float(percent.group(1) or 0), abs=0.06)
