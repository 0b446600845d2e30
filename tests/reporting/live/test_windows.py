from __future__ import annotations

import math
from dataclasses import replace

import pytest

from perseus_plugin.exchange.messages import PlanPart, RankWindow, RankWindows, Seen, receive, windows_key
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.references import block_near
from perseus_plugin.iteration.timetable import REFERENCE, Directive, Follow, FullClock
from perseus_plugin.reporting.live.windows import Windows, by_iteration, step_size, work_seen
from tests.factories import placement, record

SHARE = 0.02
SINCE = 100
TOP_MHZ = 1410
OPERATIONS = (
    Constant("load_microbatch"),
    *(Compute(kind, microbatch) for microbatch in range(2) for kind in ("forward", "backward")),
)
PART = PlanPart(version=1, schedule="1F1B", clocks_mhz=(1410, 1410, 810, 1410), times_s=(0.010, 0.020, 0.015, 0.020))
PARTS = {(1, "1F1B"): PART}
BLOCK = block_near(0, SHARE)
assert BLOCK is not None
FIRST, END = SINCE + BLOCK.first, SINCE + BLOCK.end


def seen(number: int, size: float = 1.0, **more: object) -> IterationRecord:
    durations_s = (0.001, *(size * time_s for time_s in PART.times_s))
    made = record(number, begin_s=float(number), durations_s=durations_s, operations=OPERATIONS)
    return replace(made, **more)


def directive_of(number: int) -> Directive:
    return REFERENCE if FIRST <= number < END else Follow(1, since=SINCE)


class Rank:
    def __init__(self) -> None:
        self.exchange = LocalExchange()
        self.windows = Windows(self.exchange, placement(3, 4), SHARE, TOP_MHZ)

    def run(self, numbers: range, energy_j: float | None = 5.0) -> None:
        for number in numbers:
            undisturbed = number not in (SINCE, FIRST, END)
            self.windows.saw(directive_of(number), seen(number, undisturbed=undisturbed), PARTS)
            if energy_j is not None:
                self.windows.energy(number, energy_j)

    @property
    def told(self) -> tuple[RankWindow, ...]:
        value = self.exchange.fetch(windows_key(3))
        return () if value is None else receive(RankWindows, value).windows


def test_a_window_holds_references_and_the_iterations_beside_them() -> None:
    rank = Rank()
    assert BLOCK is not None
    end = SINCE + BLOCK.window_end
    rank.run(range(SINCE, end - 1))
    assert rank.told == ()
    rank.run(range(end - 1, SINCE + 28))
    (window,) = rank.told
    assert (window.since, window.block) == (SINCE, 0)
    numbers = [one.iteration for one in window.seen]
    assert numbers == [n for n in range(SINCE + BLOCK.window_first, end) if n not in (SINCE, FIRST, END)]
    assert [one.iteration for one in window.seen if one.reference] == [FIRST + 1, FIRST + 2]
    for one in window.seen:
        assert one.energy_j == 5.0
        assert one.time_s == pytest.approx(0.066)
        assert (one.spent_s, one.usual_s) == pytest.approx((0.030, 0.030))


@pytest.mark.parametrize("energy_j", [None, math.nan])
def test_energies_that_do_not_come_are_not_waited_for_for_ever(energy_j: float | None) -> None:
    rank = Rank()
    assert BLOCK is not None
    rank.run(range(SINCE, SINCE + BLOCK.window_end + 17), energy_j)
    (window,) = rank.told
    assert {one.energy_j for one in window.seen} == {None}


def test_an_energy_that_was_passed_over_is_not_waited_for() -> None:
    rank = Rank()
    assert BLOCK is not None
    end = SINCE + BLOCK.window_end
    for number in range(SINCE, end + 2):
        rank.windows.saw(directive_of(number), seen(number, undisturbed=number not in (FIRST, END)), PARTS)
        if number != FIRST + 1:
            rank.windows.energy(number, 5.0)
    (window,) = rank.told
    assert {one.iteration: one.energy_j for one in window.seen}[FIRST + 1] is None
    assert [one.energy_j for one in window.seen].count(5.0) == len(window.seen) - 1


def test_a_change_of_plans_within_a_window_ends_it() -> None:
    for change in (Follow(1, straggler=True, since=SINCE), Follow(2, since=FIRST + 4), FullClock("too slow")):
        rank = Rank()
        rank.run(range(SINCE, END))
        for number in range(END, END + 20):
            rank.windows.saw(change, seen(number), PARTS)
        assert [window for window in rank.told if window.since == SINCE] == []


def test_iterations_of_a_schedule_without_a_plan_are_left_out() -> None:
    rank = Rank()
    for number in range(SINCE, SINCE + 40):
        schedule = "other" if number % 2 else "1F1B"
        rank.windows.saw(directive_of(number), seen(number, schedule=schedule, undisturbed=True), PARTS)
        rank.windows.energy(number, 1.0)
    assert {one.schedule for window in rank.told for one in window.seen} == {"1F1B"}


@pytest.mark.parametrize("size", [0.5, 1.0, 1.6])
def test_the_size_of_a_step_is_read_off_what_runs_at_full_clocks(size: float) -> None:
    # Of four instructions the third is slowed, and within the fourth the clock may still rise.
    assert work_seen(seen(7, size), PART, TOP_MHZ) == pytest.approx((size * 0.030, 0.030))
    assert step_size(seen(7, size), PART, TOP_MHZ) == pytest.approx(size)


def test_a_plan_that_is_slower_than_the_profile_says_is_no_larger_step() -> None:
    slowed = seen(7)
    slowed.ends_s[3] += 0.010
    assert step_size(slowed, PART, TOP_MHZ) == pytest.approx(1.0)


def test_where_nothing_runs_at_full_clocks_sizes_are_not_known() -> None:
    slow = PART.model_copy(update={"clocks_mhz": (810, 1410, 810, 1410)})
    assert math.isnan(step_size(seen(7), slow, TOP_MHZ))
    assert math.isnan(step_size(seen(7), PART.model_copy(update={"clocks_mhz": (1410,)}), TOP_MHZ))
    cut = seen(7)
    cut.ends_s.pop()
    assert math.isnan(step_size(cut, PART, TOP_MHZ))


def test_only_iterations_that_all_ranks_have_seen_are_joined() -> None:
    def window(*numbers: int) -> RankWindow:
        rows = (Seen(iteration=number, reference=False, schedule="A", time_s=1.0) for number in numbers)
        return RankWindow(since=0, block=0, seen=tuple(rows))

    assert {number: len(of) for number, of in by_iteration([window(1, 2, 3), window(2, 3, 4)]).items()} == {2: 2, 3: 2}
