from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.readings import STILL_S
from perseus_plugin.control.wire import Mark
from perseus_plugin.exchange.messages import Totals
from perseus_plugin.reporting.live.account import FULL_CLOCK, PLAN, PROFILING, Account, begin_tag, end_tag


def begun(number: int, energy_j: float, epoch: int = 0, late_s: float = 0.0) -> Mark:
    """The reading at an iteration's begin."""
    return Mark(begin_tag(number), 1000.0 * number + late_s, energy_j, 1410, math.nan, epoch)


def ended(number: int, energy_j: float, time_s: float, epoch: int = 0) -> Mark:
    """The reading at its end, `time_s` later."""
    return Mark(end_tag(number), 1000.0 * number + time_s, energy_j, 1410, math.nan, epoch)


SORTS = [(), (FULL_CLOCK,), (PROFILING,), (PROFILING, FULL_CLOCK), (PLAN,)]
ENERGY = st.floats(0, 1e9)


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[tuple[tuple[str, ...], float, float, float]], list[tuple[str, int]]]:
    """Iterations (sorts, time, energy at begin and end), and their additions and readings in any order."""
    iterations = draw(
        st.lists(st.tuples(st.sampled_from(SORTS), st.floats(0.001, 100), ENERGY, ENERGY), min_size=1, max_size=6)
    )
    what = [(name, number) for number in range(len(iterations)) for name in ("add", "begin", "end")]
    return iterations, draw(st.permutations(what))


@given(lives(), st.integers(0, 17))
def test_every_order_of_readings_gives_the_same_sums(
    life: tuple[list[tuple[tuple[str, ...], float, float, float]], list[tuple[str, int]]], asked_after: int
) -> None:
    iterations, events = life
    account = Account(measures_energy=True)
    told: dict[int, set[str]] = {number: set() for number in range(len(iterations))}
    for at, (name, number) in enumerate(events):
        sorts, time_s, begin_j, end_j = iterations[number]
        if name == "add":
            account.add(number, sorts, time_s)
        else:
            account.add_reading(begun(number, begin_j) if name == "begin" else ended(number, end_j, time_s))
        told[number].add(name)
        if at == asked_after or at == len(events) - 1:
            complete = [row for number, row in enumerate(iterations) if len(told[number]) == 3]
            assert account.totals.keys() == {sort for sorts, *_ in complete for sort in sorts}
            for sort, totals in account.totals.items():
                rows = [row for row in complete if sort in row[0]]
                assert totals.iterations == len(rows)
                assert totals.time_s == pytest.approx(math.fsum(row[1] for row in rows))
                known = [row[3] - row[2] for row in rows if row[3] > row[2] or (row[3] == row[2] and row[1] <= STILL_S)]
                assert totals.energy_j == pytest.approx(math.fsum(known), abs=1e-3)
                assert totals.unread == len(rows) - len(known)


@given(st.lists(st.tuples(st.sampled_from(SORTS), st.floats(0.001, 100)), max_size=8))
def test_without_a_counter_iterations_count_at_once_and_have_no_energy(
    rows: list[tuple[tuple[str, ...], float]],
) -> None:
    account = Account(measures_energy=False)
    for number, (sorts, time_s) in enumerate(rows):
        account.add(number, sorts, time_s)
    for sort, totals in account.totals.items():
        times = [time_s for sorts, time_s in rows if sort in sorts]
        assert (totals.iterations, totals.energy_j) == (len(times), None)
        assert totals.time_s == pytest.approx(sum(times))
    assert account.totals.keys() == {sort for sorts, _ in rows for sort in sorts}


def test_tags_are_unique_and_fit_the_wire() -> None:
    tags = [tag(number) for number in range(100) for tag in (begin_tag, end_tag)]
    assert sorted(tags) == list(range(200))
    assert end_tag(2_000_000_000) < 2**32


def test_an_iteration_without_a_reading_never_counts() -> None:
    account = Account(measures_energy=True)
    account.add(0, [PLAN], 1.0)
    account.add_reading(begun(0, 5.0))
    assert account.totals == {}


def test_what_was_forgotten_stays_out() -> None:
    account = Account(measures_energy=True)
    account.add(0, [PLAN], 1.0)
    account.add_reading(begun(0, 5.0))
    account.add(1, [PLAN], 2.0)
    account.add_reading(begun(1, 6.0))
    account.forget_before(1)
    account.add_reading(ended(0, 9.0, 1.0))
    account.add_reading(ended(1, 9.0, 2.0))
    assert account.totals == {PLAN: Totals(iterations=1, time_s=2.0, energy_j=3.0)}


def test_forgetting_bounds_what_is_kept() -> None:
    account = Account(measures_energy=True)
    for number in range(1000):
        account.add(number, [PLAN], 1.0)  # no reading ever comes
        account.add_reading(begun(number, 1.0))
        account.forget_before(number - 16)
    assert sum(len(kept) for kept in (account._open, account._begun, account._ended)) <= 34


def test_clearing_a_sort_leaves_the_others() -> None:
    account = Account(measures_energy=False)
    for sorts in ([PLAN], [FULL_CLOCK]):
        account.add(0, sorts, 1.0)
    account.clear(PLAN)
    account.clear("never seen")
    assert account.totals.keys() == {FULL_CLOCK}
    account.add(1, [PLAN], 3.0)
    assert account.totals[PLAN] == Totals(iterations=1, time_s=3.0, energy_j=None)


def test_totals_are_a_copy() -> None:
    account = Account(measures_energy=False)
    account.add(0, [PLAN], 1.0)
    account.totals.clear()
    assert account.totals.keys() == {PLAN}


def test_an_iterations_energy_is_told_as_soon_as_it_is_known() -> None:
    told: list[tuple[int, float]] = []
    account = Account(measures_energy=True, on_energy=lambda number, energy_j: told.append((number, energy_j)))
    account.add_reading(begun(7, 100.0))
    account.add(7, (), 1.0)
    assert told == []
    account.add_reading(ended(7, 130.0, 1.0))
    assert told == [(7, 30.0)]


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (begun(1, math.nan), ended(1, 50.0, 1.0)),
        (begun(1, 10.0), ended(1, math.nan, 1.0)),
        (begun(1, 1100.0), ended(1, 0.3, 1.0)),
        (begun(1, 10.0), ended(1, 50.0, 1.0, epoch=1)),
        (begun(1, 10.0, late_s=0.9), ended(1, 50.0, 1.0)),
        (begun(1, 10.0), ended(1, 50.0, 1.5)),
    ],
    ids=["begin unknown", "end unknown", "went back", "began anew", "read too late", "read long after"],
)
def test_what_readings_do_not_tell_is_no_number(begin: Mark, end: Mark) -> None:
    told: list[int] = []
    account = Account(measures_energy=True, on_energy=lambda number, energy_j: told.append(number))
    account.add(0, [PLAN], 1.0)
    account.add_reading(begun(0, 100.0))
    account.add_reading(ended(0, 130.0, 1.0))
    account.add(1, [PLAN], 1.0)
    account.add_reading(begin)
    account.add_reading(end)
    totals = account.totals[PLAN]
    assert totals == Totals(iterations=2, time_s=2.0, energy_j=30.0, unread=1)
    assert totals.mean_energy_j == 30.0
    assert told == [0]


def test_how_long_the_power_limit_held_the_gpu_is_counted_where_it_tells() -> None:
    account = Account(measures_energy=True)
    for number, (before_s, after_s) in enumerate(
        [(5.0, 5.6), (5.6, 5.6), (5.6, 7.0), (math.nan, math.nan), (9.0, 1.0)]
    ):
        account.add(number, (FULL_CLOCK,), 1.0)
        account.add_reading(replace(begun(number, 100.0 * number), capped_s=before_s))
        account.add_reading(replace(ended(number, 100.0 * number + 50, 1.0), capped_s=after_s))
    totals = account.totals[FULL_CLOCK]
    assert (totals.held_s, totals.told_s) == (pytest.approx(0.6 + 0.0 + 1.0), 3.0)


def test_every_figure_is_counted_and_what_was_told_before_stays_as_it_was() -> None:
    account = Account(measures_energy=True)
    for number, (before_j, after_j) in enumerate([(100.0, 150.0), (math.nan, 250.0)]):
        account.add(number, (PLAN,), 1.0)
        account.add_reading(replace(begun(number, before_j), capped_s=2.0))
        account.add_reading(replace(ended(number, after_j, 1.0), capped_s=2.5))
    told = account.totals[PLAN]
    assert {field.name: getattr(told, field.name) for field in fields(Totals)} == {
        "iterations": 2,
        "time_s": 2.0,
        "energy_j": 50.0,
        "unread": 1,
        "held_s": 1.0,
        "told_s": 2.0,
    }
    account.add(2, (PLAN,), 1.0)
    account.add_reading(begun(2, 1.0))
    account.add_reading(ended(2, 3.0, 1.0))
    assert (told.iterations, account.totals[PLAN].iterations) == (2, 3)


def test_a_sum_of_nothing_is_no_energy() -> None:
    account = Account(measures_energy=True)
    for number in range(3):
        account.add(number, [PLAN], 0.1)
        account.add_reading(begun(number, 5.0))
        account.add_reading(ended(number, 5.0, 0.1))
    assert account.totals[PLAN].mean_energy_j is None
