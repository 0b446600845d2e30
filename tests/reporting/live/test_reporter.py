from __future__ import annotations

import io
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.exchange.messages import Totals
from perseus_plugin.reporting.live import reporter as reporter_module
from perseus_plugin.reporting.live.bill import Bill, Worth
from perseus_plugin.reporting.live.comparison import Compared
from perseus_plugin.reporting.live.pairs import Effect
from perseus_plugin.reporting.live.reporter import Reporter, events_of, print_summary
from perseus_plugin.reporting.live.summary import Predicted
from perseus_plugin.reporting.record.summary import Summary, load_summary
from tests.reporting.live.test_summary import PLAN, RANKS, made, stats

FACTS: dict[str, Any] = {"world_size": 2, "stages": 2, "gpu": "test GPU", "emulated": True, "backend": "emulated"}
OF_PLAN: dict[str, Any] = {"plan": PLAN, "planning_time_s": 0.25, "dropped_plans": 0}


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    return caplog


def printed(summary: Summary) -> str:
    out = io.StringIO()
    print_summary(summary, out)
    return out.getvalue()


def test_the_summary_is_written_and_returned(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, FACTS)
    first = reporter.update(RANKS, "running", **OF_PLAN)
    assert load_summary(tmp_path / "summary.json") == first
    assert first.state == "running"
    last = reporter.finish(RANKS, **OF_PLAN)
    assert load_summary(tmp_path / "summary.json") == last
    assert last.state == "finished"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_summary_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Path, str]] = []
    monkeypatch.setattr(reporter_module, "write_atomically", lambda path, text: written.append((path, text)))
    summary = Reporter(tmp_path, FACTS).update(RANKS, "running", **OF_PLAN)
    assert written == [(tmp_path / "summary.json", summary.to_json())]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, folder: str, heard: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    summary = Reporter(tmp_path / folder, FACTS).finish(RANKS, **OF_PLAN)
    assert summary.energy_j.full_clock == pytest.approx(900)
    assert "cannot write summary.json" in heard.text
    assert "training goes on" in heard.text


def test_a_cpu_too_slow_for_the_emulation_is_a_warning(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(tmp_path, FACTS)
    reporter.finish([stats(0, {}, overran=1, instructions=100)], **OF_PLAN)
    assert heard.text == ""
    reporter.finish([stats(0, {}, overran=2, instructions=100)], **OF_PLAN)
    assert "the CPU was too slow for 2 of 100 emulated instructions" in heard.text


def test_without_figures_no_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(tmp_path, FACTS).finish([stats(0, {})], plan=None, planning_time_s=0.0, dropped_plans=0)
    out = capsys.readouterr()
    assert out.out + out.err == ""
    Reporter(tmp_path, FACTS).finish(RANKS, **OF_PLAN)
    out = capsys.readouterr()
    assert "energy saved" in out.err
    assert out.out == "", "the job's own output stays as it was"


def test_what_rounds_to_nothing_has_no_sign() -> None:
    summary = made(RANKS)
    profiling = summary.profiling.model_copy(update={"extra_time_s": -0.04})
    slowdown = summary.slowdown_percent.model_copy(update={"measured": -0.004})
    text = printed(summary.model_copy(update={"profiling": profiling, "slowdown_percent": slowdown}))
    assert "slowdown" in text
    assert "-0.0" not in text


@pytest.mark.parametrize("extra_s", [-7.5, -0.04, 0.0, 0.04])
def test_profiling_costs_nothing_where_no_cost_shows(extra_s: float) -> None:
    summary = made(RANKS)
    profiling = summary.profiling.model_copy(update={"extra_time_s": extra_s})
    assert "profiling cost no time that shows; " in printed(summary.model_copy(update={"profiling": profiling}))


def test_a_dry_run_says_that_it_is_one() -> None:
    summary = made(RANKS)
    assert "dry run" not in printed(summary)
    assert "a dry run: outside the sweep no clock was set" in printed(summary.model_copy(update={"dry_run": True}))


def test_the_table_shows_time_energy_and_saving() -> None:
    lines = printed(made(RANKS)).splitlines()
    assert "perseus: 2 x test GPU (emulated, no real GPU)" in lines[0]
    cells = {name.strip(): [c.strip() for c in row] for name, *row in (line.split("|") for line in lines[1:-1])}
    assert cells["time"] == ["1.1000 s", "1.0780 s", "1.1220 s"]
    assert cells["energy"] == ["900.0 J", "720.0 J", "710.0 J"]
    assert cells["power"] == ["818.2 W", "667.9 W", "632.8 W"]
    assert cells["slowdown"] == ["", "-2.00 %", "2.00 %"]
    assert cells["energy saved"] == ["", "20.00 %", "21.11 %"]
    assert "profiling cost 4.0 s; " in lines[-1]


def test_iterations_of_all_sorts_add_up() -> None:
    counted = {"every": 90, "profiling": 40, "under_plans": 30, "plan": 20, "reference": 6, "straggler": 3}
    totals = {sort: Totals(iterations=count, time_s=1.0 * count) for sort, count in counted.items()}
    ranks = [one.model_copy(update={"totals": {**one.totals, **totals}}) for one in RANKS]
    assert (
        "90 iterations: 40 while profiling, 30 under plans (20 under the newest), 6 at full clocks in between to "
        "compare with, 3 at a straggler's pace, 11 otherwise at full clocks; "
    ) in printed(made(ranks))


def test_what_is_known_of_a_figure_stands_beside_it() -> None:
    compared = Compared(Effect(0.001, 0.002, 10, 120), Effect(-0.2, 0.01, 10, 120))
    summary = made(RANKS, compared=compared, predicted=Predicted(0.98, 0.8, (0.19, 0.21)))
    lines = [line.split("|") for line in printed(summary).splitlines() if "|" in line]
    cells = {name.strip(): [c.strip() for c in row] for name, *row in lines}
    low, high = compared.energy.interval if compared.energy is not None else (0.0, 0.0)
    assert cells["energy saved"] == [
        "",
        "20.00 % (19.00 to 21.00)",
        f"{100 * (1 - math.exp(-0.2)):.2f} % ({-100 * high:.2f} to {-100 * low:.2f})",
    ]
    assert cells["slowdown"][1] == "-2.00 %"
    assert re.fullmatch(r"0\.10 % \(-\d\.\d\d to \d\.\d\d\)", cells["slowdown"][2])
    told = dict(events_of(summary))
    assert told["Perseus/saving_percent/measured_low"] == pytest.approx(-100 * high)
    assert told["Perseus/slowdown_percent/measured_high"] > 0.1


def test_what_references_cost_is_said() -> None:
    full = RANKS[0].totals["full_clock"]
    references = Totals(iterations=30, time_s=30 * full.time_s / full.iterations)
    ranks = [one.model_copy(update={"totals": {**one.totals, "reference": references}}) for one in RANKS]
    assert "; those to compare with cost 5700 J of saving" in printed(made(ranks))


def test_what_energy_was_worth_by_the_signals_is_said() -> None:
    bill = Bill()
    planned = {"every": Totals(iterations=9, energy_j=6e6), "under_plans": Totals(iterations=5, energy_j=3.6e6)}
    ranks = [one.model_copy(update={"totals": {**one.totals, **planned}}) for one in RANKS]
    bill.add(ranks, [(1.0, Worth(0.1, currency="EUR"))])
    compared = Compared(None, Effect(math.log(0.8), 0.001, blocks=10, iterations=120))
    summary = made(ranks, compared=compared, bill=bill)
    assert summary.worth is not None
    assert summary.energy_j.full_clock == pytest.approx(710 / 0.8)
    money = summary.worth.money
    assert money.full_clocks == pytest.approx(5 * 710 / 0.8 / 3.6e6 * 0.1)
    assert money.full_clocks_between is not None
    assert money.full_clocks_between[0] < money.full_clocks < money.full_clocks_between[1]
    told = dict(events_of(summary))
    assert told["Perseus/worth/money"] == pytest.approx(2 * 6e6 / 3.6e6 * 0.1)
    assert "Perseus/worth/carbon_kg" not in told
    assert "by the signals 0.2 EUR under plans, and 0.000123 (0.000123 to 0.000124) at full clocks" in printed(summary)


def test_the_table_of_a_real_gpu_names_the_backend_and_what_is_unknown_is_a_dash() -> None:
    text = printed(made([stats(0, {"full_clock": (1, 2.0, None)})], None, emulated=False, backend="nvml"))
    assert "(nvml)" in text
    assert "emulated" not in text
    assert "2.0000 s" in text
    assert len(re.findall(r" -(?=\s)", text)) == 12


def test_events_are_the_known_main_figures() -> None:
    assert dict(events_of(made(RANKS))) == pytest.approx(
        {
            "Perseus/iteration_time_s/full_clock": 1.1,
            "Perseus/iteration_time_s/predicted": 1.078,
            "Perseus/iteration_time_s/measured": 1.122,
            "Perseus/energy_j/full_clock": 900.0,
            "Perseus/energy_j/predicted": 720.0,
            "Perseus/energy_j/measured": 710.0,
            "Perseus/power_w/full_clock": 900.0 / 1.1,
            "Perseus/power_w/predicted": 720.0 / 1.078,
            "Perseus/power_w/measured": 710.0 / 1.122,
            "Perseus/saving_percent/predicted": 20.0,
            "Perseus/saving_percent/measured": 100 * 190 / 900,
            "Perseus/slowdown_percent/predicted": -2.0,
            "Perseus/slowdown_percent/measured": 2.0,
            **{f"Perseus/{name}": value for name, value in made(RANKS).metrics.items()},
        }
    )
    assert events_of(made([], None)) == []


def test_every_metric_of_a_section_stands_on_the_page_of_metrics() -> None:
    metrics = made(RANKS).metrics
    assert "overhead/hook_time_percent" in metrics
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    assert [name for name in metrics if f"`Perseus/{name}`" not in page] == []


def test_what_stragglers_brought_is_said() -> None:
    figures = {"iterations": 29, "energy_saved_j": 1232.7}
    assert "about 1233 J were saved by going at a straggler's pace" in printed(made(RANKS, stragglers=figures))
    assert "straggler" not in printed(made(RANKS, stragglers={**figures, "iterations": 0}))
