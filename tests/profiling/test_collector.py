from __future__ import annotations

import math

import numpy as np
import pytest

from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.timetable import Sweep
from perseus_plugin.profiling.collector import SweepCollector
from perseus_plugin.profiling.observations import Activity, Tick
from tests.factories import OPERATIONS, record

LENGTH_S = 0.036 + 4 * 0.24


def collector() -> SweepCollector:
    return SweepCollector(top_mhz=1410)


def test_consecutive_iterations_at_one_clock_are_one_run() -> None:
    collected = collector()
    for number in range(4):
        collected.add(Sweep(0, 1410, kept=number > 0), record(number, begin_s=number, gap_s=0.24))
    for number in range(4, 7):
        collected.add(Sweep(1, 810, kept=number > 4), record(number, begin_s=number, gap_s=0.24))
    first, second = collected.runs()
    assert (first.frequency_mhz, first.begin_s, first.end_s) == (1410, 1.0, pytest.approx(3 + LENGTH_S))
    assert (second.frequency_mhz, second.begin_s, second.end_s) == (810, 5.0, pytest.approx(6 + LENGTH_S))
    kinds = ["load_microbatch", "forward", "backward", "optimizer_step"]
    assert [activity.kind for activity in second.activities] == kinds * 2


def test_activities_are_the_operations_with_their_times() -> None:
    collected = collector()
    seen = record(0, begin_s=5.0, gap_s=0.5)
    collected.add(Sweep(0, 1410, kept=True), seen)
    names = ("load_microbatch", "forward", "backward", "optimizer_step")
    assert collected.runs()[0].activities == tuple(
        Activity(name, start_s, end_s) for name, start_s, end_s in zip(names, seen.starts_s, seen.ends_s, strict=True)
    )
    assert collected.constant_kinds == ("load_microbatch", "optimizer_step")
    assert collected.top_times_s() == pytest.approx({"forward": 0.01, "backward": 0.02})


def test_a_revisit_of_a_clock_is_a_run_of_its_own() -> None:
    collected = collector()
    for block, number in enumerate(range(3)):
        collected.add(Sweep(block, 1410, kept=True), record(number, begin_s=number, gap_s=0.24))
    assert [run.begin_s for run in collected.runs()] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("what", ["settling", "disturbed", "incomplete"])
def test_an_iteration_that_does_not_count_splits_the_run(what: str) -> None:
    collected = collector()
    for number in range(5):
        seen = record(number, begin_s=number, gap_s=0.24, undisturbed=what != "disturbed" or number != 2)
        if what == "incomplete" and number == 2:
            seen.ends_s.pop()
        collected.add(Sweep(0, 1410, kept=what != "settling" or number != 2), seen)
    assert [(run.begin_s, int(run.end_s)) for run in collected.runs()] == [(0.0, 1), (3.0, 4)]


def test_ticks_go_to_the_run_they_fall_into() -> None:
    collected = collector()
    for number in range(2):
        collected.add(Sweep(number, 1410 - 600 * number, kept=True), record(number, begin_s=number, gap_s=0.24))
    ticks = [Tick(t - 0.01, t, 100 * t) for t in (-0.1, 0.0, 0.02, LENGTH_S + 0.002, 1.01, 1.03, 2.0)]
    for tick in ticks:
        collected.add_tick(tick, math.nan)
    first, second = collected.runs()
    assert first.ticks == tuple(ticks[1:3])
    assert second.ticks == tuple(ticks[4:6])


@pytest.mark.parametrize(
    ("capped_s", "held"),
    [
        ((5.0, 5.0, 5.0), False),
        ((5.0, 5.0, 5.0 + 0.9), True),
        ((0.0, 5.0, 5.0), False),
        ((math.nan,) * 3, False),
        ((5.0, 5.0, math.nan), False),
    ],
    ids=["never", "within", "before it", "unknown", "lost"],
)
def test_a_run_under_a_power_limit_is_what_its_clock_comes_to(capped_s: tuple[float, ...], held: bool) -> None:
    collected = collector()
    for number in (1, 2):
        collected.add(Sweep(1, 810, kept=True), record(number, begin_s=number, gap_s=0.24))
    for time_s, so_far_s in zip((0.5, 1.1, 2.0), capped_s, strict=True):
        collected.add_tick(Tick(time_s - 0.01, time_s, 1.0), so_far_s)
    assert (collected.runs()[0].at_limit, collected.runs()[0].capped) == (held, False)
    collected.add_deviation(1.5)
    assert (collected.runs()[0].at_limit, collected.runs()[0].capped) == (held, not held)


@pytest.mark.parametrize(("time_s", "capped"), [(0.99, False), (1.0, True), (2.0, True), (3.5, False)])
def test_a_run_in_which_the_clock_deviated_is_marked(time_s: float, capped: bool) -> None:
    collected = collector()
    for number in (1, 2):
        collected.add(Sweep(1, 810, kept=True), record(number, begin_s=number, gap_s=0.24))
    collected.add_deviation(time_s)
    assert collected.runs()[0].capped is capped


def test_a_limit_at_the_top_clock_belongs_to_what_full_clocks_are() -> None:
    collected = collector()
    collected.add(Sweep(0, 1410, kept=True), record(0, begin_s=0.0))
    collected.add_deviation(0.01)
    assert not collected.runs()[0].capped
    assert collected.runs()[0].at_limit


def test_constant_times_are_those_at_the_top_clock() -> None:
    collected = collector()
    for number, step_s in enumerate((0.005, 0.009, 0.007)):
        seen = record(number, durations_s=(0.001, 0.01, 0.02, step_s), operations=OPERATIONS)
        collected.add(Sweep(0, 1410, kept=True), seen)
    collected.add(Sweep(1, 810, kept=True), record(3, durations_s=(1.0, 1.0, 1.0, 1.0)))
    collected.add(Sweep(2, 1410, kept=False), record(4, durations_s=(1.0, 1.0, 1.0, 1.0)))
    assert collected.constant_times_s() == pytest.approx({"load_microbatch": 0.001, "optimizer_step": 0.007})


def test_loading_of_every_microbatch_counts() -> None:
    load, forward = Constant("load"), Compute("forward", 0)
    operations = (load, forward, load, Compute("forward", 1), load, Compute("forward", 2))
    collected = collector()
    collected.add(
        Sweep(0, 1410, kept=True), record(0, durations_s=(0.1, 1.0, 0.3, 1.0, 0.2, 1.0), operations=operations)
    )
    assert collected.constant_times_s() == pytest.approx({"load": 0.2})


def test_slow_loads_count_a_lone_hiccup_does_not_and_collective_work_has_its_median() -> None:
    rng = np.random.default_rng(0)
    load, step = Constant("load"), Constant("step", collective=True)
    slow = [0.1 if number % 5 == 4 else 0.02 for number in range(60)]
    steps_s = [0.01, 0.5, 0.01, 0.4, 0.01] * 12
    collected = collector()
    for number, (load_s, step_s) in enumerate(zip(slow, steps_s, strict=True)):
        seen = record(number, durations_s=(load_s, 1.0, step_s), operations=(load, Compute("forward", 0), step))
        collected.add(Sweep(0, 1410, kept=True), seen)
    assert collected.constant_times_s() == pytest.approx({"load": 0.036, "step": 0.01})
    jittery = rng.normal(0.02, 0.0005, 60)
    jittery[7] = 3.0
    once = collector()
    for number, load_s in enumerate(jittery):
        seen = record(number, durations_s=(float(load_s), 1.0), operations=(load, Compute("forward", 0)))
        once.add(Sweep(0, 1410, kept=True), seen)
    assert once.constant_times_s()["load"] == pytest.approx(0.02, rel=0.02)


def test_nothing_collected_is_nothing_to_estimate() -> None:
    assert collector().runs() == []
    assert collector().constant_times_s() == {}


def test_a_pause_between_iterations_is_no_part_of_a_run() -> None:
    collected = SweepCollector(1410)
    begin_s = 0.0
    for number in range(4):
        collected.add(Sweep(0, 1410, kept=True), record(number, begin_s=begin_s))
        begin_s += 0.036 + (60.0 if number == 1 else 0.001)  # a checkpoint is written after the second
    runs = collected.runs()
    assert [len(run.activities) for run in runs] == [len(runs[0].activities)] * 2
    assert all(run.end_s - run.begin_s < 0.1 for run in runs)
