from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.iteration.references import is_reference
from perseus_plugin.iteration.timetable import NOT_OURS, REFERENCE, Directive, Follow, FullClock, Sweep
from perseus_plugin.iteration.timetable import WARM_UP as WARMING_UP
from perseus_plugin.reporting.record.iterations import (
    FULL,
    PLAN,
    PROFILING,
    STRAGGLER,
    UNKNOWN,
    WARM_UP,
    IterationLog,
    Sort,
    Stretch,
)
from perseus_plugin.reporting.record.lines import Row

ON_PLAN = Sort(PLAN, plan=1)
REFERENCES = Sort.of(REFERENCE)


def one(number: int, time_s: float = 1.0, energy_j: float | None = 10.0, sort: Sort = ON_PLAN) -> Stretch:
    return Stretch.single(number, 100.0 + number, time_s, energy_j, sort)


@pytest.mark.parametrize(
    ("directive", "sort"),
    [
        (WARMING_UP, Sort(WARM_UP)),
        (FullClock("planning"), Sort(FULL, reason="planning")),
        (Sweep(0, 810, kept=False), Sort(PROFILING, clock_mhz=810)),
        (Follow(3), Sort(PLAN, plan=3)),
        (Follow(4, straggler=True), Sort(STRAGGLER, plan=4)),
        (NOT_OURS, Sort(UNKNOWN, reason=NOT_OURS.reason)),
    ],
)
def test_what_an_iteration_ran_as(directive: Directive, sort: Sort) -> None:
    assert Sort.of(directive) == sort
    assert Sort.of(directive, "1F1B") == replace(sort, schedule="1F1B")


def test_joined_stretches_hold_means_over_what_is_known() -> None:
    joined = one(0, 1.0, 10.0).joined(one(1, 2.0, None)).joined(one(2, 6.0, 40.0))
    assert (joined.first, joined.count, joined.read, joined.longest_s) == (0, 3, 2, 6.0)
    assert joined.time_s == pytest.approx(3.0)
    assert joined.energy_j == pytest.approx(25.0)
    assert math.isnan(one(0, energy_j=None).joined(one(1, energy_j=None)).energy_j)


def test_a_short_run_is_kept_iteration_by_iteration() -> None:
    log = IterationLog(limit=10)
    assert not any(log.add(one(number)) for number in range(10))
    assert [(s.first, s.count) for s in log.stretches] == [(number, 1) for number in range(10)]
    assert log.closed == log.stretches


def test_a_change_of_sort_stays_where_it_was() -> None:
    log = IterationLog(limit=8)
    for number in range(100):
        log.add(one(number, sort=Sort(PROFILING, clock_mhz=810) if number < 37 else ON_PLAN))
    assert [s.sort.state for s in log.stretches if s.first < 37] == [PROFILING] * sum(
        s.first < 37 for s in log.stretches
    )
    assert 37 in {s.first for s in log.stretches}


@given(
    st.integers(2, 40),
    st.lists(st.tuples(st.floats(0.01, 10), st.one_of(st.none(), st.floats(0, 1e4))), min_size=1, max_size=400),
)
def test_joining_loses_no_iteration_no_time_and_no_energy(limit: int, seen: list[tuple[float, float | None]]) -> None:
    log = IterationLog(limit)
    for number, (time_s, energy_j) in enumerate(seen):
        log.add(one(number, time_s, energy_j))
        assert len(log.stretches) <= limit
        assert len(log.stretches) - len(log.closed) <= 1
    assert all(a.first + a.count == b.first for a, b in pairwise(log.stretches))
    assert log.stretches[0].first == 0
    assert sum(s.count for s in log.stretches) == len(seen)
    assert sum(s.count * s.time_s for s in log.stretches) == pytest.approx(sum(t for t, _ in seen))
    known = [e for _, e in seen if e is not None]
    assert sum(s.read for s in log.stretches) == len(known)
    assert sum(s.read * s.energy_j for s in log.stretches if s.read) == pytest.approx(sum(known))
    assert max(s.longest_s for s in log.stretches) == max(t for t, _ in seen)


def test_a_run_that_changes_all_the_time_stays_bounded_and_keeps_its_end() -> None:
    log = IterationLog(limit=10)
    for number in range(1000):
        log.add(one(number, sort=Sort(PLAN, plan=number)))
        assert len(log.stretches) <= 10
    assert log.stretches[-1].first == 999


def test_references_that_come_and_go_do_not_push_out_the_begin_of_a_long_run() -> None:
    log = IterationLog(limit=50)
    count = 40_000
    for number in range(count):
        reference = is_reference(number, 0.02)
        log.add(one(number, energy_j=20.0 if reference else 10.0, sort=REFERENCES if reference else ON_PLAN))
        assert len(log.stretches) <= 50
    assert log.stretches[0].first == 0
    assert sum(s.count for s in log.stretches) == count
    saved_j = sum(s.count * (20.0 - s.energy_j) for s in log.stretches if s.sort.state == PLAN)
    assert saved_j == pytest.approx(10.0 * sum(not is_reference(number, 0.02) for number in range(count)))


def test_schedules_that_take_turns_do_not_push_out_the_begin_of_a_long_run() -> None:
    log = IterationLog(limit=50)
    for number in range(5000):
        log.add(one(number, energy_j=float(number % 7), sort=replace(ON_PLAN, schedule=str(number % 7))))
        assert len(log.stretches) <= 50
    assert log.stretches[0].first == 0
    assert {s.sort for s in log.stretches[:-8]} == {replace(ON_PLAN, schedule="")}
    assert sum(s.count for s in log.stretches) == 5000
    assert sum(s.count * s.energy_j for s in log.stretches) == pytest.approx(sum(n % 7 for n in range(5000)))


def test_in_a_short_run_references_stand_apart() -> None:
    log = IterationLog(limit=50)
    for number in range(40):
        log.add(one(number, sort=REFERENCES if is_reference(number, 0.02) else ON_PLAN))
    assert [s.first for s in log.stretches if s.sort.state == FULL] == [n for n in range(40) if is_reference(n, 0.02)]


def written(stretch: Stretch) -> dict[str, Any]:
    line = Row.of(stretch).to_line()
    assert Row.model_validate_json(line).stretch() == stretch or math.isnan(stretch.energy_j)
    content: dict[str, Any] = json.loads(line)
    return content


def test_what_is_usual_is_left_out_of_a_line() -> None:
    assert written(one(7, 1.5, 2.5)) == {
        "first": 7,
        "begin_s": 107.0,
        "time_s": 1.5,
        "energy_j": 2.5,
        "state": "plan",
        "plan": 1,
    }
    joined = written(one(7, 1.0, None).joined(one(8, 3.0, 2.0)))
    assert (joined["count"], joined["read"], joined["longest_s"], joined["energy_j"]) == (2, 1, 3.0, 2.0)
    assert written(one(0, energy_j=None))["energy_j"] is None
