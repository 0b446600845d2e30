from __future__ import annotations

import logging

import pytest

from perseus_plugin.iteration.timetable import Follow, Round, Timetable
from perseus_plugin.reporting.live.progress import Progress
from tests.factories import record


def lines(caplog: pytest.LogCaptureFixture, table: Timetable, iterations: int) -> list[str]:
    caplog.set_level(logging.INFO, "perseus_plugin")
    progress = Progress(table)
    for number in range(iterations):
        progress.iteration(table.at(number), record(number, durations_s=(0.5, 0.5, 0.5, 0.5)))
    return [entry.getMessage() for entry in caplog.records]


def test_one_line_before_the_sweep_and_one_per_clock(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, Timetable(Round(2, (1410, 810, 1410)), 1, 2), 14) == [
        "warming up for 2 iterations, then profiling for 9 in 3 blocks at 2 clocks; training goes on all the while",
        "profiling block 1 of 3: 1410 MHz (iteration 1 of 9)",
        "profiling block 2 of 3: 810 MHz (iteration 4 of 9, about 12 s left)",
        "profiling block 3 of 3: 1410 MHz (iteration 7 of 9, about 6 s left)",
    ]


def test_a_paired_round_says_what_this_stage_does(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, Timetable(Round(0, (810, 1410), 1, paired=True), 1, 1), 4) == [
        "profiling stages in turn, block 1 of 2: 810 MHz on this one (iteration 1 of 4)",
        "profiling stages in turn, block 2 of 2: 1410 MHz on this one (iteration 3 of 4, about 4 s left)",
    ]


def test_without_warm_up_the_sweep_is_told_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, Timetable(Round(0, (1410,)), 1, 1), 2) == [
        "profiling block 1 of 1: 1410 MHz (iteration 1 of 2)"
    ]


def test_nothing_is_said_without_a_sweep_or_under_a_plan(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, Timetable(Round(2, ()), 1, 2), 5) == []
    assert lines(caplog, Timetable(Round(0, ()), 1, 2).switched(0, Follow(1)), 5) == []
