from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.iteration.references import is_reference
from perseus_plugin.iteration.timetable import (
    REFERENCE,
    Directive,
    Follow,
    FullClock,
    Round,
    Sweep,
    Timetable,
    nearest_clocks,
    paired_clocks,
)
from perseus_plugin.iteration.timetable import WARM_UP as WARMING_UP

CLOCKS = st.lists(st.integers(1, 3000), min_size=1, max_size=30, unique=True)
TABLE = Timetable(Round(3, (1410, 810, 1410)), settle_steps=1, steps_per_clock=2)


def test_warm_up_then_the_sweep_then_full_clocks() -> None:
    assert [TABLE.at(i) for i in range(3)] == [WARMING_UP] * 3
    assert [TABLE.at(i) for i in range(3, 12)] == [
        Sweep(block, clock, kept) for block, clock in enumerate((1410, 810, 1410)) for kept in (False, True, True)
    ]
    assert TABLE.sweep_end == 12
    assert [TABLE.at(i) for i in (12, 13, 10**6)] == [FullClock("planning")] * 3


def test_revisits_of_a_clock_are_blocks_of_their_own() -> None:
    assert TABLE.at(4).identity != TABLE.at(10).identity
    assert TABLE.at(4).identity == TABLE.at(5).identity


def test_without_a_sweep_there_is_only_full_clock() -> None:
    table = Timetable(Round(2, ()), 1, 5)
    assert table.sweep_end == 2
    assert [table.at(i) for i in range(4)] == [WARMING_UP] * 2 + [FullClock("planning")] * 2


def test_full_clock_iterations_run_alike_whatever_the_reason() -> None:
    assert WARMING_UP.identity == FullClock("planning").identity
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


def test_references_stand_amid_iterations_under_a_plan() -> None:
    table = replace(TABLE, reference_share=0.1).switched(20, Follow(1, since=20))
    taken = [i for i in range(20, 220) if table.at(i) == REFERENCE]
    assert taken == [20 + offset for offset in range(200) if is_reference(offset, 0.1)]
    assert len(taken) > 10
    assert all(table.at(i) == Follow(1, since=20) for i in range(20, 220) if i not in taken)
    assert REFERENCE.identity == FullClock("planning").identity
    # Another set of plans on the same measurements goes on where the first one was.
    enlarged = table.switched(60, Follow(2, since=20))
    assert [i for i in range(20, 220) if enlarged.at(i) == REFERENCE] == taken
    assert replace(table, reference_share=0.0).at(taken[0]) == Follow(1, since=20)


def test_at_a_stragglers_pace_and_outside_plans_there_are_no_references() -> None:
    table = replace(TABLE, reference_share=0.2)
    assert REFERENCE not in [table.at(i) for i in range(200)]
    assert REFERENCE not in [table.switched(20, Follow(1, True, since=20)).at(i) for i in range(20, 220)]
    assert REFERENCE not in [table.switched(20, FullClock("trouble")).at(i) for i in range(20, 220)]


def test_another_round_of_the_sweep_replaces_the_first() -> None:
    table = TABLE.swept_again(20, (1410, 600))
    assert [table.at(i) for i in (12, 19)] == [FullClock("planning")] * 2, "full clocks until it begins"
    assert [table.at(i) for i in range(20, 26)] == [
        Sweep(block, clock, kept, round=1) for block, clock in enumerate((1410, 600)) for kept in (False, True, True)
    ]
    assert table.sweep_end == 26
    assert table.at(26) == FullClock("planning")
    assert table.at(20).identity != TABLE.at(3).identity, "the same clock in another round is another run"
    third = table.swept_again(40, (1410,))
    assert third.sweep.number == 2
    assert third.at(22) == FullClock("planning")


def test_in_a_paired_round_every_clock_is_tried_by_half_of_the_stages_at_a_time() -> None:
    tables = [TABLE.swept_again(20, paired_clocks((810, 600), 1410, stage), paired=True) for stage in range(3)]
    assert [table.sweep.clocks_mhz for table in tables] == [
        (810, 1410, 600, 1410),
        (1410, 810, 1410, 600),
        (810, 1410, 600, 1410),
    ]
    directive = tables[1].at(22)
    assert directive == Sweep(0, 1410, True, round=1, paired=True)
    assert isinstance(directive, Sweep)
    assert not directive.is_full(1410), "other stages run slower"
    assert Sweep(0, 1410, True).is_full(1410)
    assert not Sweep(0, 810, True).is_full(1410)
    assert not TABLE.swept_again(20, (1410,)).sweep.paired


def test_a_switch_supersedes_a_round_and_a_round_a_switch() -> None:
    assert TABLE.swept_again(20, (1410,)).switched(21, FullClock("trouble")).at(22) == FullClock("trouble")
    assert TABLE.switched(15, Follow(1)).swept_again(20, (1410,)).at(20) == Sweep(0, 1410, False, round=1)


@given(CLOCKS, st.lists(st.integers(0, 4000), max_size=8))
def test_every_wanted_clock_gets_the_nearest_supported_one_in_its_place(
    supported: list[int], wanted: list[int]
) -> None:
    clocks = nearest_clocks(supported, wanted)
    assert len(clocks) == len(wanted), "ranks with other GPUs must make as many steps"
    assert set(clocks) <= set(supported)
    for clock, mhz in zip(clocks, wanted, strict=True):
        assert abs(clock - mhz) == min(abs(other - mhz) for other in supported)


def test_clocks_that_a_gpu_has_are_taken_as_they_are() -> None:
    assert nearest_clocks((1410, 1005, 705), [700, 1400, 1000, 1001]) == (705, 1410, 1005, 1005)
    assert nearest_clocks((1410, 1005), [5, 9000]) == (1005, 1410)
