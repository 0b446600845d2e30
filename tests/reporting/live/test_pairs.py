"""The comparison of plans with references, on jobs as they vary."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.references import block_near
from perseus_plugin.reporting.live.pairs import (
    Effect,
    Row,
    blocks_of,
    effect_on_energy,
    effect_on_time,
    student_quantile,
)

SHARE = 0.02
Sizes = Callable[[int, random.Random], float]

SIZES: dict[str, Sizes] = {
    "even": lambda number, random: 1.0,
    "buckets": lambda number, random: random.choice([1.0, 1.3, 1.6]),
    "log-normal": lambda number, random: math.exp(random.gauss(0, 0.2)),
    "curriculum": lambda number, random: 1 + min(1.0, number / 300),
}


def rows_of(
    sizes: Sizes,
    seed: int,
    *,
    slower: float = 0.0,
    saving: float = 0.1,
    count: int = 300,
    stall_every: int = 0,
    known: bool = True,
    noise: float = 0.005,
    around_s: float = 0.1,
) -> list[Row]:
    """Rows of a job under a plan that is `slower` in what it computes."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        size = sizes(number, chance)
        block = block_near(number, SHARE)
        assert block is not None
        reference = block.first <= number < block.end
        time_s = (size * (1 if reference else 1 + slower) + around_s) * (1 + chance.gauss(0, noise))
        energy_j = 100 * size * (1 if reference else 1 - saving) * (1 + chance.gauss(0, noise))
        if stall_every and number % stall_every == 0:
            time_s += 0.4
        if block.window_first <= number < block.window_end and number not in (block.first, block.end):
            rows.append(Row(block.number, reference, time_s, energy_j, size if known else math.nan))
    return rows


def on_time(rows: list[Row]) -> Effect:
    effect = effect_on_time(blocks_of(rows))
    assert effect is not None
    return effect


def on_energy(rows: list[Row]) -> Effect:
    effect = effect_on_energy(blocks_of(rows))
    assert effect is not None
    return effect


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("stall_every", [0, 3])
def test_what_varies_is_not_put_on_the_plan(name: str, stall_every: int) -> None:
    for seed in range(8):
        rows = rows_of(SIZES[name], seed, stall_every=stall_every)
        time, energy = on_time(rows), on_energy(rows)
        assert abs(time.share) < (0.03 if stall_every else 0.008)
        low, high = time.interval
        assert low <= time.share <= high
        assert low < 0.003
        assert energy.share == pytest.approx(-0.1, abs=0.01)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("stall_every", [0, 3])
@pytest.mark.parametrize("known", [True, False])
def test_a_plan_that_holds_is_never_beyond_doubt_too_slow(name: str, stall_every: int, known: bool) -> None:
    for seed in range(8):
        rows = rows_of(SIZES[name], seed, stall_every=stall_every, known=known)
        for blocks in (3, 4, 6):
            time = on_time([row for row in rows if row.block < blocks])
            assert min(time.at_least(0.999), time.interval[0]) <= 0.01


@pytest.mark.parametrize("name", SIZES)
def test_a_plan_that_is_a_tenth_slower_is_beyond_doubt_after_three_blocks(name: str) -> None:
    for seed in range(8):
        rows = [row for row in rows_of(SIZES[name], seed, slower=0.1) if row.block < 3]
        time = on_time(rows)
        assert min(time.at_least(0.999), time.interval[0]) > 0.02
        assert time.share == pytest.approx(0.1 / 1.1, abs=0.02)


@pytest.mark.parametrize("name", SIZES)
def test_the_interval_holds_the_truth_in_nineteen_of_twenty_jobs(name: str) -> None:
    """What surrounds the schedule is in the measured time, so that the truth is a little less than 0.03."""
    within = 0
    for seed in range(40):
        low, high = on_time(rows_of(SIZES[name], seed, slower=0.03)).interval
        within += low <= 0.03 and high >= 0.02
    assert within >= 38


@settings(max_examples=20)
@given(st.floats(0.01, 100.0), st.floats(-0.2, 0.5), st.sampled_from(sorted(SIZES)), st.integers(0, 1000))
def test_an_exact_job_is_known_exactly_in_any_unit(unit: float, slower: float, name: str, seed: int) -> None:
    rows = [
        Row(row.block, row.reference, unit * row.time_s, row.energy_j, row.work / unit)
        for row in rows_of(SIZES[name], seed, slower=slower, noise=0.0, around_s=0.0)
    ]
    time = on_time(rows)
    assert time.share == pytest.approx(slower, abs=1e-6)
    assert time.interval == pytest.approx((slower, slower), abs=1e-5)


def test_energies_that_are_not_known_are_left_out() -> None:
    rows = rows_of(SIZES["even"], 1)
    some = [
        Row(row.block, row.reference, row.time_s, math.nan if row.block == 2 else row.energy_j, row.work)
        for row in rows
    ]
    assert on_energy(some) == on_energy([row for row in rows if row.block != 2])
    none = [Row(row.block, row.reference, row.time_s, math.nan, row.work) for row in rows]
    assert effect_on_energy(blocks_of(none)) is None
    assert effect_on_time(blocks_of(none)) == effect_on_time(blocks_of(rows))


def test_too_few_say_nothing() -> None:
    rows = rows_of(SIZES["even"], 1)
    assert effect_on_time(blocks_of([])) is None
    assert effect_on_time(blocks_of([row for row in rows if row.block < 2])) is None
    assert effect_on_time(blocks_of([row for row in rows if row.block < 3])) is not None
    assert effect_on_time(blocks_of([row for row in rows if row.reference])) is None
    assert effect_on_time(blocks_of([row for row in rows if not row.reference])) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799), (10**6, 1.9600)],
)
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=2e-4)
