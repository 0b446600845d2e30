from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.gpus.emulated.device import model_tables
from perseus_plugin.gpus.emulated.dynamics import MAX_PENDING, Dynamics, Tables
from perseus_plugin.gpus.emulated.physics import A100, BACKWARD_LIKE, FORWARD_LIKE, H100, WAITING

TABLES = model_tables(A100, 0.020, 0.020, 0.0)
H100_LIKE = model_tables(A100, 0.100, 0.025, 0.0)
CLOCKS = A100.clocks_mhz()


def fresh(tables: Tables = TABLES) -> Dynamics:
    return Dynamics(
        at_s=10.0,
        clock_mhz=CLOCKS[0],
        static_w=tables.static_w,
        dynamic_w=tables.dynamic_w[WAITING],
        ticks=int(10.0 / tables.tick_period_s),
    )


def begin(d: Dynamics, load: int, work_s: float, backdated_s: float = 0.0, tables: Tables = TABLES) -> None:
    d.begin_work(tables, load, work_s, tables.dynamic_w[load], backdated_s)


def test_work_at_full_clock_takes_its_time_and_draws_its_power() -> None:
    d = fresh()
    begin(d, FORWARD_LIKE, 0.05)
    assert d.completes_s(TABLES) == pytest.approx(10.05)
    d.advance(TABLES, 11.0)
    assert d.finished_s == pytest.approx(10.05)
    assert d.load == WAITING
    expected_j = 0.05 * A100.power_w(FORWARD_LIKE, 1410) + 0.95 * A100.blocking_w
    assert d.energy_j == pytest.approx(expected_j)


def test_a_clock_change_within_work_is_integrated_exactly() -> None:
    d = fresh()
    begin(d, BACKWARD_LIKE, 0.1)
    d.change_clock(1005, 1005, 10.04)
    stretch = A100.stretch(BACKWARD_LIKE, 1005)
    expected_s = 10.04 + 0.06 * stretch
    assert d.completes_s(TABLES) == pytest.approx(expected_s)
    d.advance(TABLES, 10.2)
    assert d.finished_s == pytest.approx(expected_s)
    assert d.energy_j == pytest.approx(
        0.04 * A100.power_w(BACKWARD_LIKE, 1410)
        + 0.06 * stretch * A100.power_w(BACKWARD_LIKE, 1005)
        + (10.2 - expected_s) * A100.power_w(WAITING, 1005)
    )


def test_waiting_draws_what_it_does_at_the_clock_in_effect() -> None:
    d = fresh()
    d.change_clock(705, 705, 10.04)
    d.advance(TABLES, 10.1)
    assert d.energy_j == pytest.approx(0.04 * A100.blocking_w + 0.06 * A100.power_w(WAITING, 705))
    begin(d, FORWARD_LIKE, 0.01)
    done_s = d.completes_s(TABLES)
    d.advance(TABLES, done_s)
    before_j = d.energy_j
    d.change_clock(CLOCKS[0], 0, done_s + 0.02)
    d.advance(TABLES, done_s + 0.05)
    assert d.energy_j - before_j == pytest.approx(0.02 * A100.power_w(WAITING, 705) + 0.03 * A100.blocking_w)


def test_slowdown_stretches_the_running_work_from_now_on() -> None:
    d = fresh()
    begin(d, FORWARD_LIKE, 0.1)
    d.advance(TABLES, 10.05)
    d.slowdown[FORWARD_LIKE] = 2.0
    assert d.completes_s(TABLES) == pytest.approx(10.15)


def test_a_cap_holds_the_clock_down_and_is_counted() -> None:
    d = fresh()
    d.cap_mhz = 1000
    assert d.effective_mhz(TABLES) == 990
    d.advance(TABLES, 10.5)
    assert d.capped_s == pytest.approx(0.5)
    d.cap_mhz = 0
    d.advance(TABLES, 11.0)
    assert d.capped_s == pytest.approx(0.5)


def test_backdated_work_ends_as_if_it_had_begun_then() -> None:
    early, late = fresh(), fresh()
    begin(early, FORWARD_LIKE, 0.05)
    late.advance(TABLES, 10.002)
    begin(late, FORWARD_LIKE, 0.05, backdated_s=0.002)
    for d in (early, late):
        d.advance(TABLES, 10.1)
    assert late.started_s == pytest.approx(10.0)
    assert late.finished_s == pytest.approx(early.finished_s)
    assert late.energy_j == pytest.approx(early.energy_j)


def test_clock_changes_take_effect_in_order_and_a_full_queue_replaces_its_last() -> None:
    d = fresh()
    for i in range(MAX_PENDING + 3):
        d.change_clock(CLOCKS[i + 1], CLOCKS[i + 1], 10.01 - 0.001 * i)
    assert [at_s for at_s, _ in d.pending] == [10.01] * MAX_PENDING
    d.advance(TABLES, 10.02)
    assert d.clock_mhz == CLOCKS[MAX_PENDING + 3]
    assert d.pending == []


def test_time_does_not_run_backwards() -> None:
    d = fresh()
    d.advance(TABLES, 10.5)
    before = copy.deepcopy(d)
    d.advance(TABLES, 10.2)
    assert d == before


@pytest.mark.parametrize("tables", [TABLES, H100_LIKE], ids=["every 20 ms", "25 of 100 ms"])
def test_a_steady_load_is_counted_right_by_every_counter(tables: Tables) -> None:
    d = fresh(tables)
    d.advance(tables, 20.0 + 1e-9)
    assert d.counter_j == pytest.approx(10.0 * A100.blocking_w)
    assert d.counter_j == pytest.approx(d.energy_j)


def test_a_sampling_counter_misses_what_happens_outside_its_window() -> None:
    d = fresh(H100_LIKE)
    d.advance(H100_LIKE, 10.01)
    begin(d, FORWARD_LIKE, 0.05, tables=H100_LIKE)  # ends at 10.06, before the window 10.075..10.1
    d.advance(H100_LIKE, 10.1001)
    assert d.counter_j == pytest.approx(0.1 * A100.blocking_w)


events = st.lists(
    st.tuples(
        st.floats(0.0001, 0.05),
        st.sampled_from(["clock", "forward", "backward", "cap", "nothing"]),
        st.integers(0, len(CLOCKS) - 1),
    ),
    max_size=12,
)


def play(d: Dynamics, tables: Tables, history: list[tuple[float, str, int]], steps: int) -> None:
    """Apply a history; between its events advance in `steps` parts."""
    for pause_s, what, index in history:
        begin_s = d.at_s
        for step in range(1, steps + 1):
            d.advance(tables, begin_s + pause_s * step / steps)
        if what == "clock":
            d.change_clock(CLOCKS[index], CLOCKS[index], d.at_s + 0.005)
        elif what == "cap":
            d.cap_mhz = CLOCKS[index]
        elif what != "nothing":
            begin(d, FORWARD_LIKE if what == "forward" else BACKWARD_LIKE, 0.001 * (index + 1), tables=tables)


@given(events, st.integers(2, 7), st.sampled_from([TABLES, H100_LIKE]))
def test_how_often_somebody_looks_changes_nothing(
    history: list[tuple[float, str, int]], steps: int, tables: Tables
) -> None:
    seldom, often = fresh(tables), fresh(tables)
    play(seldom, tables, history, 1)
    play(often, tables, history, steps)
    end_s = seldom.at_s + 0.3
    seldom.advance(tables, end_s)
    often.advance(tables, end_s)
    assert often.energy_j == pytest.approx(seldom.energy_j, rel=1e-9)
    assert often.finished_s == pytest.approx(seldom.finished_s, abs=1e-6)
    assert often.capped_s == pytest.approx(seldom.capped_s, abs=1e-6)
    # A boundary that falls on an event may be seen a tick earlier or later.
    assert often.counter_j == pytest.approx(seldom.counter_j, abs=0.11 * A100.power_w(FORWARD_LIKE, 1410))


@given(events)
def test_the_full_window_counter_is_the_energy_of_the_last_tick(history: list[tuple[float, str, int]]) -> None:
    d = fresh()
    play(d, TABLES, history, 1)
    # Reached in one go, the next boundary shows all energy up to it.
    d.advance(TABLES, TABLES.tick_origin_s + (d.ticks + 1) * TABLES.tick_period_s)
    assert d.counter_j + d.window_j == pytest.approx(d.energy_j, rel=1e-9)


@given(events)
def test_projected_completion_is_when_it_completes(history: list[tuple[float, str, int]]) -> None:
    d = fresh()
    play(d, TABLES, history, 1)
    begin(d, FORWARD_LIKE, 0.02)
    projected_s = d.completes_s(TABLES)
    d.advance(TABLES, projected_s + 1.0)
    assert d.finished_s == pytest.approx(projected_s, abs=1e-9)


def test_random_numbers_are_spread_over_the_unit_interval() -> None:
    d = fresh()
    draws = [d.draw() for _ in range(1000)]
    assert 0.45 < sum(draws) / 1000 < 0.55
    assert 0.0 <= min(draws) < 0.05
    assert 0.95 < max(draws) < 1.0


H100_TABLES = model_tables(H100, 0.100, 0.100, 0.0)
WITHOUT_BURSTS = replace(H100_TABLES, burst_j=0.0)
FORWARD_HELD_MHZ = H100.held_mhz(FORWARD_LIKE, H100.max_clock_mhz)


def at_limit(tables: Tables = WITHOUT_BURSTS, limit_w: float = H100.limit_w) -> Dynamics:
    d = fresh(tables)
    d.clock_mhz, d.limit_w, d.spare_j = H100.max_clock_mhz, limit_w, tables.burst_j
    return d


def test_work_at_the_limit_runs_below_the_clock_asked_for_and_only_work_counts_as_capped() -> None:
    d, tables = at_limit(), WITHOUT_BURSTS
    d.advance(tables, 10.5)
    assert d.effective_mhz(tables) == H100.max_clock_mhz
    assert d.capped_s == 0.0
    begin(d, FORWARD_LIKE, 0.1, tables=tables)
    assert d.effective_mhz(tables) == FORWARD_HELD_MHZ < H100.max_clock_mhz
    taken_s = 0.1 * H100.stretch(FORWARD_LIKE, FORWARD_HELD_MHZ)
    assert d.completes_s(tables) == pytest.approx(10.5 + taken_s)
    d.advance(tables, 12.0)
    assert d.finished_s == pytest.approx(10.5 + taken_s)
    assert d.capped_s == pytest.approx(taken_s)
    working_j = taken_s * H100.power_w(FORWARD_LIKE, FORWARD_HELD_MHZ)
    assert d.energy_j == pytest.approx(working_j + (2.0 - taken_s) * H100.blocking_w)


def test_locks_above_the_clock_that_the_limit_allows_are_one_point() -> None:
    taken = {}
    for clock in (1980, 1890, FORWARD_HELD_MHZ, 1605):
        d = at_limit()
        d.clock_mhz = clock
        begin(d, FORWARD_LIKE, 0.1, tables=WITHOUT_BURSTS)
        energy_j, until_s = d.energy_j, d.completes_s(WITHOUT_BURSTS)
        d.advance(WITHOUT_BURSTS, until_s)
        taken[clock] = (until_s - 10.0, d.energy_j - energy_j, d.capped_s > 0)
    assert taken[1980][:2] == taken[1890][:2] == taken[FORWARD_HELD_MHZ][:2]
    assert [taken[clock][2] for clock in taken] == [True, True, False, False]
    assert taken[1605][0] > taken[1980][0]
    assert taken[1605][1] < taken[1980][1]


def test_after_a_wait_more_than_the_limit_is_drawn_for_a_moment() -> None:
    tables = H100_TABLES
    d = at_limit(tables)
    begin(d, BACKWARD_LIKE, 0.3, tables=tables)
    demand_w = H100.power_w(BACKWARD_LIKE, H100.max_clock_mhz)
    assert d.power_w(tables) == demand_w
    burst_s = H100.burst_j / (demand_w - H100.limit_w)
    d.advance(tables, 10.0 + 0.99 * burst_s)
    assert d.power_w(tables) == demand_w
    assert d.capped_s == 0.0
    ends_s = d.completes_s(tables)
    d.advance(tables, 10.0 + 1.01 * burst_s)
    assert d.power_w(tables) <= H100.limit_w
    d.advance(tables, 12.0)
    assert d.finished_s == pytest.approx(ends_s)
    assert d.spare_j == H100.burst_j


def test_a_limit_no_clock_keeps_leaves_the_lowest_one() -> None:
    d = at_limit(limit_w=H100.static_w + 1.0)
    begin(d, FORWARD_LIKE, 0.1, tables=WITHOUT_BURSTS)
    assert d.effective_mhz(WITHOUT_BURSTS) == H100.min_clock_mhz


def test_the_counter_shows_a_tick_after_its_lag() -> None:
    tables = H100_TABLES
    d = at_limit(tables)
    d.advance(tables, 10.199)
    before_j = d.shown_j(tables)
    d.advance(tables, 10.2 + 0.9 * H100.tick_lag_s)
    assert d.shown_j(tables) == before_j
    d.advance(tables, 10.2 + 1.1 * H100.tick_lag_s)
    assert d.shown_j(tables) == d.counter_j == pytest.approx(before_j + 0.1 * H100.blocking_w)


@given(
    st.lists(st.tuples(st.floats(0.0, 0.2), st.sampled_from([FORWARD_LIKE, BACKWARD_LIKE, WAITING])), max_size=20),
    st.floats(250.0, 700.0),
)
def test_beyond_the_limit_no_more_is_drawn_than_a_burst(history: list[tuple[float, int]], limit_w: float) -> None:
    tables = H100_TABLES
    d = at_limit(tables, limit_w)
    since: list[tuple[float, float]] = [(d.at_s, d.energy_j)]
    for pause_s, load in history:
        d.advance(tables, d.at_s + pause_s)
        since.append((d.at_s, d.energy_j))
        if load != WAITING:
            begin(d, load, 0.05, tables=tables)
    d.advance(tables, d.at_s + 1.0)
    for begin_s, begin_j in since:
        assert d.energy_j - begin_j <= limit_w * (d.at_s - begin_s) + H100.burst_j + 1e-6
