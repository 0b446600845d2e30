from __future__ import annotations

import json
from pathlib import Path

import pytest

from perseus_plugin.errors import ReportError
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Round, Sweep, Timetable
from perseus_plugin.reporting.record.iterations import Sort
from perseus_plugin.reporting.record.samples import (
    ClockRequest,
    Reading,
    Sample,
    Samples,
    asked_clocks_mhz,
    is_sampled,
    load_samples,
    next_sampled,
    sample_of,
)
from tests.factories import record

TABLE = Timetable(Round(2, (1410, 810, 1410)), settle_steps=1, steps_per_clock=2)


def sampled(table: Timetable, count: int) -> list[int]:
    return [number for number in range(count) if is_sampled(table, number)]


def test_the_last_iteration_of_each_block_at_the_highest_clock_is_kept_whole() -> None:
    assert sampled(TABLE, TABLE.sweep_end) == [4, 10]


def test_under_a_plan_ever_fewer_are_kept_but_never_none() -> None:
    table = TABLE.switched(20, Follow(1))
    numbers = [number - 20 for number in sampled(table, 20 + 5000) if number >= 20]
    assert numbers == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096]


def test_a_new_plan_begins_anew() -> None:
    table = TABLE.switched(20, Follow(1)).switched(50, Follow(2, straggler=True))
    assert [n for n in sampled(table, 60) if n >= 20] == [22, 24, 28, 36, 52, 54, 58]


def test_a_job_that_only_observes_keeps_some_too() -> None:
    table = Timetable(Round(5, ()), settle_steps=1, steps_per_clock=2)
    assert sampled(table, 40) == [7, 9, 13, 21, 37]


def test_the_next_one_that_is_kept_is_known_beforehand() -> None:
    observing = Timetable(Round(5, ()), settle_steps=1, steps_per_clock=2)
    for table in (TABLE, observing, TABLE.switched(20, Follow(1)).switched(50, FullClock("dropped"))):
        begun = max(first for first, _ in [(table.sweep_end, None), *table.switches])
        kept = [number for number in sampled(table, begun + 4000) if number >= begun]
        for number in range(begun, kept[-1] + 1):
            assert next_sampled(table, number) == next(one for one in kept if one >= number)
    coming = TABLE.switched(20, Follow(1)).switched(33, Follow(2))
    assert [next_sampled(coming, number) for number in (24, 29, 35)] == [24, 35, 35]


def test_the_clock_asked_for_is_the_plans_or_the_sweeps_or_none() -> None:
    seen = record(0)
    assert asked_clocks_mhz(Follow(1), seen, (1110, 810)) == [0, 1110, 810, 0]
    assert asked_clocks_mhz(Follow(1), seen, ()) == [0, 0, 0, 0]
    assert asked_clocks_mhz(Sweep(0, 810, kept=True), seen, ()) == [810] * 4


def made(number: int = 3, directive: Directive | None = None) -> Sample:
    seen = record(number, begin_s=50.0)
    sort = Sort.of(directive or Follow(1))
    requests = [ClockRequest(49.0, 1410), ClockRequest(49.9, 1110), ClockRequest(50.011, 810), ClockRequest(51.0, 1410)]
    readings = [Reading(40.0, 1, 1.0), *(Reading(50.0 + 0.01 * k, 1110, 500.0 + 3 * k) for k in range(4))]
    return sample_of(sort, seen, [0, 1110, 810, 0], 1000.0, requests, readings)


def test_a_sample_holds_every_operation_from_the_iterations_beginning() -> None:
    sample = made()
    assert (sample.number, sample.state, sample.plan) == (3, "plan", 1)
    assert sample.begin_s == 1050.0
    assert sample.time_s == pytest.approx(0.036)
    assert [(one.name, one.microbatch, one.asked_mhz) for one in sample.operations] == [
        ("load_microbatch", -1, 0),
        ("forward", 0, 1110),
        ("backward", 0, 810),
        ("optimizer_step", -1, 0),
    ]
    assert [one.start_s for one in sample.operations] == pytest.approx([0.0, 0.001, 0.011, 0.031])
    assert [one.finish_s for one in sample.operations] == pytest.approx([0.001, 0.011, 0.031, 0.036])
    assert [one.name for one in sample.instructions] == ["forward", "backward"]


def test_requests_shortly_before_and_readings_around_it_belong_to_it() -> None:
    sample = made()
    assert sample.requests == (ClockRequest(pytest.approx(-0.1), 1110), ClockRequest(pytest.approx(0.011), 810))
    assert [one.energy_j for one in sample.readings] == [0.0, 3.0, 6.0, 9.0]
    assert [watts for _, _, watts in sample.powers()] == pytest.approx([300.0] * 3)


def test_a_profiled_iteration_at_the_highest_clock_counts_as_full_clock() -> None:
    assert made(directive=Sweep(0, 1410, kept=True)).state == "full"


def test_a_counter_that_ticks_fast_is_thinned_out() -> None:
    seen = record(0, begin_s=0.0)
    readings = [Reading(1e-5 * k, 1110, float(k)) for k in range(3500)]
    sample = sample_of(Sort.of(Follow(1)), seen, [0] * 4, 0.0, (), readings)
    assert 500 < len(sample.readings) <= 1000
    assert sample.powers()[0][2] == pytest.approx(1e5)


def test_only_the_newest_of_each_state_are_kept(tmp_path: Path) -> None:
    kept = Samples()
    for number in range(10):
        kept.add(made(number))
    kept.add(made(20, FullClock("planning")))
    kept.add(made(21, FullClock("planning")))
    path = tmp_path / "samples.json"
    path.write_text(kept.to_json(rank=3))
    assert json.loads(path.read_text())["rank"] == 3
    back = load_samples(path)
    assert [one.number for one in back] == [6, 7, 8, 9, 21]
    assert back[0] == made(6)


@pytest.mark.parametrize("text", ["", "{}", '{"schema":"perseus-samples","version":2,"rank":0,"samples":[]}'])
def test_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "samples.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"samples\.json: (rank: missing|version: got 2; allowed: 1|not valid JSON)"):
        load_samples(path)
