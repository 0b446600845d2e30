"""summary.json: what is written is what is read, old files are read, and its figures are numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from perseus_plugin.errors import ReportError
from perseus_plugin.reporting.record.summary import Columns, load_summary
from tests.reporting.live.test_summary import PLAN, RANKS, made

# As the first runs that wrote version 1 left it: no references, no catching up, no confidence.
OLD = {
    "schema": "perseus-summary",
    "version": 1,
    "state": "finished",
    "emulated": False,
    "gpu": "A100",
    "backend": "nvml",
    "ranks": 2,
    "ranks_reporting": 2,
    "stages": 2,
    "iteration_time_s": {"full_clock": 1.0, "predicted": 1.0, "measured": None},
    "energy_j": {"full_clock": 900.0, "predicted": 720.0, "measured": None},
    "saving_percent": {"predicted": 20.0, "measured": None},
    "slowdown_percent": {"predicted": 0.0, "measured": None},
    "plan": {"saving_percent": 20.0, "gap_percent": 0.1, "planning_time_s": 0.3, "dropped_plans": 0},
    "profiling": {"extra_time_s": 4.0, "extra_energy_j": -10.0},
    "iterations": {"full_clock": 4, "profiling": 10, "plan": 0},
    "overhead": {"hook_time_percent": 0.01},
}


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    for summary in (made(RANKS), made([], None), made(RANKS, PLAN, stragglers={"iterations": 1, "energy_saved_j": 2})):
        (tmp_path / "summary.json").write_text(summary.to_json())
        assert load_summary(tmp_path / "summary.json") == summary


def test_a_file_of_an_older_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(OLD))
    summary = load_summary(tmp_path / "summary.json")
    assert summary.energy_j.full_clock == 900
    assert (summary.references.saving_percent, summary.stragglers, summary.catching_up.iterations) == (None, None, 0)
    assert summary.plan is not None
    assert summary.plan.confidence is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: got 2; allowed: 1"),
        ({"state": "asleep"}, "state: got \"asleep\"; allowed: 'running', 'finished' or 'crashed'"),
        ({"energy_j": {"full_clock": "many"}}, 'energy_j.full_clock: got "many"; allowed: a valid number'),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**OLD, **change}))
    with pytest.raises(ReportError) as error:
        load_summary(tmp_path / "summary.json")
    assert str(error.value).startswith(f"{tmp_path / 'summary.json'}: {message}")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_not_known(value: float) -> None:
    assert Columns(full_clock=value).full_clock is None
