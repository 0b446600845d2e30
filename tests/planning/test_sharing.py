"""One power budget for several jobs: never exceeded, and no other division trains more."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.planning.curve import CurveSample, FrontierCurve
from perseus_plugin.planning.power.sharing import Holding, SharingJob, SpeedCurve, divide, next_budgets

POINTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=6)


@st.composite
def some_jobs(draw: st.DrawFn) -> list[SharingJob]:
    made = []
    for number in range(draw(st.integers(1, 3))):
        curve = SpeedCurve.of([(float(w), s / 30) for w, s in draw(POINTS)], full_w=14.0)
        made.append(SharingJob(f"job {number}", curve, draw(st.sampled_from([0.5, 1.0, 3.0]))))
    return made


def trained(jobs: list[SharingJob], watts: dict[str, float]) -> float:
    return math.fsum(job.value * job.curve.speed_at(watts[job.name]) for job in jobs)


@given(some_jobs(), st.integers(1, 40))
def test_no_division_trains_more_and_none_is_above_the_budget(jobs: list[SharingJob], budget_w: int) -> None:
    made = divide(jobs, float(budget_w))
    lowest_w = sum(job.curve.lowest_w for job in jobs)
    assert made.lowest_w == pytest.approx(lowest_w)
    assert math.fsum(made.watts.values()) <= max(budget_w, lowest_w) + 1e-9
    for job in jobs:
        assert job.curve.lowest_w <= made.watts[job.name] <= job.curve.most_w + 1e-9
    # Corners are at whole watts, and so is the budget: one of the best divisions is in whole watts.
    ranges = [range(round(job.curve.lowest_w), round(job.curve.most_w) + 1) for job in jobs]
    others = [
        trained(jobs, {job.name: float(watts) for job, watts in zip(jobs, of, strict=True)})
        for of in itertools.product(*ranges)
        if sum(of) <= budget_w
    ]
    if others:
        assert trained(jobs, dict(made.watts)) == pytest.approx(max(others))
    else:
        assert dict(made.watts) == {job.name: job.curve.lowest_w for job in jobs}


@given(POINTS, st.floats(0, 20))
def test_a_curve_is_above_its_points_and_gains_ever_less(points: list[tuple[int, int]], at_w: float) -> None:
    curve = SpeedCurve.of([(float(w), float(s)) for w, s in points], full_w=1.0)
    for watts, speed in points:
        assert curve.speed_at(watts) >= speed - 1e-9
    rises = [
        (high - low) / (high_w - low_w)
        for (low_w, low), (high_w, high) in itertools.pairwise(zip(curve.power_w, curve.speed, strict=True))
    ]
    assert all(rise > 0 for rise in rises)
    assert all(later < before for before, later in itertools.pairwise(rises))
    assert curve.speed[0] <= curve.speed_at(at_w) <= curve.speed[-1]
    assert curve.full_w >= curve.most_w


@given(POINTS, st.floats(0, 20), st.floats(0, 20))
def test_a_curve_above_a_power_is_the_same_there(points: list[tuple[int, int]], low_w: float, at_w: float) -> None:
    curve = SpeedCurve.of([(float(w), float(s)) for w, s in points], full_w=1.0)
    above = curve.above(low_w)
    assert above.lowest_w == pytest.approx(min(max(low_w, curve.lowest_w), curve.most_w))
    assert above.most_w == curve.most_w
    assert above.speed_at(max(at_w, low_w)) == pytest.approx(curve.speed_at(max(at_w, low_w)))


def test_nothing_is_no_curve() -> None:
    with pytest.raises(PlanError, match="at least one"):
        SpeedCurve.of([], 1.0)


def test_a_frontier_is_of_one_pipeline() -> None:
    samples = (CurveSample(1.0, 1.0, 1.0, 800.0), CurveSample(1.25, 1.0, 1.25, 750.0))
    curve = SpeedCurve.from_frontier(FrontierCurve(samples, 1.0, 1000.0), pipelines=2)
    assert curve.power_w == (1200.0, 1600.0)
    assert curve.speed == (0.8, 1.0)
    assert curve.full_w == 2000.0


def test_what_is_worth_more_gets_more() -> None:
    curve = SpeedCurve.of([(1.0, 0.5), (2.0, 1.0)], 2.0)
    made = divide([SharingJob("a", curve), SharingJob("b", curve, 2.0)], 3.2)
    assert made.watts == {"a": pytest.approx(1.2), "b": 2.0}
    assert made.marginal == pytest.approx(0.5)


@st.composite
def on_the_way(draw: st.DrawFn) -> tuple[list[Holding], float]:
    holdings = []
    for job in draw(some_jobs()):
        held_w = draw(st.floats(job.curve.lowest_w, 14.0))
        holdings.append(Holding(job.name, job if draw(st.booleans()) else None, held_w))
    return holdings, draw(st.floats(1.0, 50.0))


@given(on_the_way(), st.data())
def test_on_the_way_all_together_stay_below_what_they_were_or_the_budget(
    given_: tuple[list[Holding], float], data: st.DataObject
) -> None:
    """Whichever of the jobs have done what they were told, and whichever have not yet."""
    holdings, budget_w = given_
    before_w = sum(one.held_w for one in holdings)
    for _ in range(3):
        told, _ = next_budgets(holdings, budget_w)
        assert set(told) == {one.name for one in holdings if one.job is not None}
        most_w = sum(max(one.held_w, told.get(one.name, 0.0)) for one in holdings)
        assert most_w <= max(budget_w, before_w) + 1e-9
        holdings = [
            Holding(one.name, one.job, told[one.name] if data.draw(st.booleans()) else max(one.held_w, told[one.name]))
            if one.name in told
            else one
            for one in holdings
        ]
        before_w = sum(one.held_w for one in holdings)


@given(on_the_way())
def test_the_end_of_the_way_is_the_best_division(given_: tuple[list[Holding], float]) -> None:
    holdings, budget_w = given_
    for _ in range(2):
        told, division = next_budgets(holdings, budget_w)
        holdings = [Holding(one.name, one.job, told.get(one.name, one.held_w)) for one in holdings]
    assert told == pytest.approx(dict(division.watts))
