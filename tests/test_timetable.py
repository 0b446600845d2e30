from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.timetable import (
    Directive,
    Follow,
    FullClock,
    Sweep,
    Timetable,
    nearest_clocks,
    spread_clocks,
    sweep_order,
)

CLOCKS = st.lists(st.integers(1, 3000), min_size=1, max_size=30, unique=True)
TABLE = Timetable(warmup_steps=3, sweep_mhz=(1410, 810, 1410), settle_steps=1, steps_per_clock=2)


def test_warm_up_then_the_sweep_then_full_clocks() -> None:
    assert [TABLE.at(i) for i in range(3)] == [FullClock("warm-up")] * 3
    assert [TABLE.at(i) for i in range(3, 12)] == [
        Sweep(block, clock, kept) for block, clock in enumerate((1410, 810, 1410)) for kept in (False, True, True)
    ]
    assert TABLE.sweep_end == 12
    assert [TABLE.at(i) for i in (12, 13, 10**6)] == [FullClock("planning")] * 3


def test_revisits_of_a_clock_are_blocks_of_their_own() -> None:
    assert TABLE.at(4).identity != TABLE.at(10).identity
    assert TABLE.at(4).identity == TABLE.at(5).identity


def test_without_a_sweep_there_is_only_full_clock() -> None:
    table = Timetable(2, (), 1, 5)
    assert table.sweep_end == 2
    assert [table.at(i) for i in range(4)] == [FullClock("warm-up")] * 2 + [FullClock("planning")] * 2


def test_full_clock_iterations_run_alike_whatever_the_reason() -> None:
    assert FullClock("warm-up").identity == FullClock("planning").identity
    assert Follow(1).identity != Follow(2).identity
    assert Follow(1).identity != FullClock("").identity
    assert Sweep(0, 1410, False).identity == Sweep(0, 1410, True).identity


def test_a_switch_holds_from_its_iteration_on() -> None:
    table = TABLE.switched(20, Follow(1))
    assert table.at(19) == FullClock("planning")
    assert table.at(20) == table.at(1000) == Follow(1)
    assert TABLE.at(20) == FullClock("planning"), "the old timetable is as it was"


def test_a_late_switch_holds_at_once() -> None:
    """One whose iteration has passed already, even in the sweep."""
    table = TABLE.switched(5, FullClock("trouble"))
    assert table.at(7) == FullClock("trouble")
    assert table.at(4) == Sweep(0, 1410, kept=True)


@pytest.mark.parametrize("first", [28, 30])
def test_a_newer_switch_supersedes_those_that_would_begin_later(first: int) -> None:
    table = TABLE.switched(30, Follow(1)).switched(first, Follow(2))
    assert table.at(first - 1) == FullClock("planning")
    assert table.at(first) == table.at(30) == table.at(31) == Follow(2)


def test_a_plan_in_force_goes_on_until_the_newer_switches_begin() -> None:
    table = TABLE.switched(20, Follow(1)).switched(30, FullClock("")).switched(31, Follow(2))
    assert [table.at(i) for i in (20, 29, 30, 31)] == [Follow(1), Follow(1), FullClock(""), Follow(2)]


def test_a_long_job_with_many_switches_stays_small() -> None:
    table = TABLE
    for i in range(1000):
        table = table.switched(20 + i, Follow(i))
    assert len(table.switches) < 20
    assert table.at(1018) == Follow(998)
    assert table.at(5000) == Follow(999)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6), st.integers(0, 50))
def test_the_newest_switch_that_has_begun_holds(switches: list[tuple[int, int]], iteration: int) -> None:
    table = TABLE
    for first, version in switches:
        table = table.switched(first, Follow(version))
    in_force: dict[int, Directive] = {}  # by beginning
    for first, version in switches:
        in_force = {begin: directive for begin, directive in in_force.items() if begin < first}
        in_force[first] = Follow(version)
    begun = [begin for begin in in_force if begin <= iteration]
    assert table.at(iteration) == (in_force[max(begun)] if begun else TABLE.at(iteration))


@given(CLOCKS, st.integers())
def test_a_sweep_tries_each_clock_and_the_highest_first_and_last(clocks: list[int], seed: int) -> None:
    order = sweep_order(clocks, seed)
    assert order[0] == order[-1] == max(clocks)
    assert sorted(order[:-1]) == sorted(clocks)
    assert order == sweep_order(clocks[::-1], seed), "every rank must get the same order"


def test_the_order_of_a_sweep_depends_on_the_seed() -> None:
    clocks = list(range(200, 1400, 100))
    assert len({sweep_order(clocks, seed) for seed in range(20)}) > 10
    assert any(sweep_order(clocks, seed)[1:-1] != tuple(sorted(clocks[:-1])) for seed in range(3))


@given(CLOCKS, st.integers(2, 64), st.floats(0.01, 0.99))
def test_clocks_are_spread_from_the_highest_down_to_the_lowest_share(
    supported: list[int], count: int, share: float
) -> None:
    clocks = spread_clocks(supported, count, share)
    assert set(clocks) <= set(supported)
    assert clocks == sorted(set(clocks), reverse=True)
    assert len(clocks) <= count
    assert clocks[0] == max(supported)
    assert abs(clocks[-1] - share * max(supported)) == min(abs(c - share * max(supported)) for c in supported)


def test_clocks_that_a_gpu_has_are_taken_as_they_are() -> None:
    assert spread_clocks(range(210, 1411, 15), 4, 0.5) == [1410, 1170, 945, 705]
    assert nearest_clocks((1410, 1005, 705), [700, 1400, 1000, 1001]) == [1410, 1005, 705]
    assert nearest_clocks((1410, 1005), [5, 9000]) == [1410, 1005]
