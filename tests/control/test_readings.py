from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.control.readings import FROZEN_S, STILL_S, CheckedEnergy, EnergyCheck, energy_between_j

LIMIT_W = 300.0
TICK_S = 0.1


def run(values_j: list[float], every_s: float = TICK_S, limit_w: float = LIMIT_W) -> list[CheckedEnergy]:
    check = EnergyCheck(limit_w)
    return [check.check(100 + i * every_s, value) for i, value in enumerate(values_j)]


def known_j(readings: list[CheckedEnergy], every_s: float = TICK_S) -> list[float | None]:
    return [energy_between_j(a, b, every_s) for a, b in pairwise(readings)]


def test_a_counter_that_counts_is_believed() -> None:
    assert known_j(run([1000, 1020, 1040, 1040, 1080])) == [20, 20, 0, 40]


@pytest.mark.parametrize("value", [0.0, -5.0, math.nan, math.inf])
def test_values_that_no_counter_has_make_both_neighbours_unknown(value: float) -> None:
    assert known_j(run([1000, 1020, value, 1040, 1060])) == [20, None, None, 20]


def test_a_counter_that_went_back_begins_anew() -> None:
    readings = run([1000, 1020, 30, 50, 70])
    assert known_j(readings) == [20, None, 20, 20]
    assert energy_between_j(readings[0], readings[-1], 4 * TICK_S) is None, "across it nothing is known"


def test_a_counter_that_went_back_and_overtook_itself_is_unknown_across() -> None:
    readings = run([10, 30, 1, 21, 41, 61])
    assert energy_between_j(readings[1], readings[5], 4 * TICK_S) is None


def test_more_than_the_card_can_draw_is_unknown() -> None:
    assert known_j(run([1000, 1020, 9000, 9020])) == [20, None, 20]
    assert known_j(run([1000, 1020, 2020, 2040], limit_w=math.nan)) == [20, None, 20], "no GPU draws 10,000 W"


def test_a_late_tick_is_no_jump() -> None:
    """As long as it is not frozen, a tick brings the energy since the last one."""
    assert known_j(run([1000.0] * 15 + [1300.0]))[-1] == 300.0


def test_a_frozen_counter_is_unknown_until_it_moves() -> None:
    still = round(FROZEN_S / TICK_S)
    readings = run([1000.0] * (still + 5) + [1010.0, 1030.0])
    assert math.isnan(readings[still + 3].energy_j)
    assert known_j(readings)[-2:] == [None, 20.0], "from the reading on at which it moved again"
    assert energy_between_j(readings[0], readings[5], STILL_S) == 0.0, "it may lie between two ticks"
    assert energy_between_j(readings[0], readings[6], STILL_S + 0.1) is None, "in so long a time it may not"


def test_a_freeze_amid_a_stretch_is_unknown_across() -> None:
    still = round(FROZEN_S / TICK_S)
    readings = run([1000.0, 1030.0, *[1060.0] * (still + 5), 1090.0, 1120.0])
    assert energy_between_j(readings[0], readings[-1], 3.0) is None


def test_a_counter_that_runs_too_fast_all_the_time_is_not_believed() -> None:
    readings = run([1000.0 + 5 * LIMIT_W * TICK_S * i for i in range(30)])
    known = [energy_j for energy_j in known_j(readings) if energy_j is not None]
    assert sum(known) <= 1.25 * LIMIT_W * 30 * TICK_S
    assert energy_between_j(readings[0], readings[-1], 3.0) is None


@given(
    steps_j=st.lists(st.floats(0.1, SMALL := 30.0), min_size=2, max_size=50),
    at=st.integers(0, 48),
    wrong=st.one_of(st.floats(-1e9, 0), st.just(math.nan), st.floats(1e7, 1e12)),
)
def test_one_wrong_reading_never_becomes_a_number(steps_j: list[float], at: int, wrong: float) -> None:
    values_j = [5000.0]
    for step_j in steps_j:
        values_j.append(values_j[-1] + step_j)
    at = 1 + at % (len(values_j) - 1)
    values_j[at] = wrong
    for position, energy_j in enumerate(known_j(run(values_j))):
        true_j = steps_j[position]
        assert energy_j is None or energy_j == pytest.approx(true_j, abs=1e-6)
