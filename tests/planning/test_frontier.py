"""The frontier: convex, monotone, known to within its tolerance, with plans that keep their word."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.curve import load_curve
from perseus_plugin.planning.frontier import Frontier, frontier_to_json, make_frontier, save_frontier
from perseus_plugin.planning.planner import ChangeLimits, Planner
from perseus_plugin.planning.power.sharing import SpeedCurve
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.profile import Measurement, Profile
from tests.examples import examples

from .jobs import Job, bundled_profile, jobs


def small() -> Planner:
    return Planner(build_graph(one_f_one_b(3, 6)), bundled_profile(3), blocking_power_w=60.0)


@pytest.mark.many
@examples(12)
@given(jobs())
def test_convex_monotone_and_with_plans_above_the_bound(job: Job) -> None:
    graph = build_graph(job.streams, latency_s=job.latency_s)
    planner = Planner(graph, job.profile, blocking_power_w=list(job.blocking_w))
    frontier = make_frontier(planner, tolerance=0.01)
    time = np.array([p.deadline_s for p in frontier.points])
    bound = np.array([p.bound_j for p in frontier.points])
    loose = 1e-3 * bound.max()
    assert (np.diff(time) > 0).all()
    assert (np.diff(bound) <= loose).all()
    for left, middle, right in zip(frontier.points, frontier.points[1:], frontier.points[2:], strict=False):
        share = (middle.deadline_s - left.deadline_s) / (right.deadline_s - left.deadline_s)
        assert middle.bound_j <= (1 - share) * left.bound_j + share * right.bound_j + loose
    for point in frontier.points:
        assert point.plan.iteration_time_s <= point.deadline_s * (1 + 1e-12)
        assert point.plan.energy_j >= point.bound_j
    assert time[0] == pytest.approx(planner.problem.shortest_s)


@pytest.fixture(scope="module")
def fine() -> tuple[Planner, Frontier]:
    planner = small()
    return planner, make_frontier(planner, tolerance=0.002)


@given(share=st.floats(0, 1))
@settings(max_examples=20)
def test_between_samples_the_bound_is_where_chord_and_tangents_say(
    share: float, fine: tuple[Planner, Frontier]
) -> None:
    planner, frontier = fine
    points = frontier.points
    deadline = points[0].deadline_s + share * (points[-1].deadline_s - points[0].deadline_s)
    value = planner.relaxation.solve(deadline).bound_j
    chord = float(np.interp(deadline, [p.deadline_s for p in points], [p.bound_j for p in points]))
    assert chord * (1 - 0.002 - 1e-4) <= value <= chord * (1 + 1e-4)


def test_a_finer_tolerance_takes_more_samples_and_progress_is_told() -> None:
    told: list[tuple[int, float]] = []
    coarse = make_frontier(small(), tolerance=0.02)
    fine = make_frontier(small(), tolerance=0.001, progress=lambda count, error: told.append((count, error)))
    assert len(fine.points) > len(coarse.points)
    assert [count for count, _ in told] == list(range(2, len(fine.points) + 1))
    assert told[-1][1] <= 0.001 < told[0][1]


def test_with_few_changes_the_gap_is_to_what_no_plan_of_so_few_takes_less_than() -> None:
    limits = ChangeLimits(1)
    planner = Planner(build_graph(one_f_one_b(2, 3)), bundled_profile(2), blocking_power_w=60.0)
    free = {point.deadline_s: point for point in make_frontier(planner, tolerance=0.02).points}
    few = make_frontier(planner, tolerance=0.02, limits=limits)
    for point in few.points:
        assert point.bound_j >= free[point.deadline_s].bound_j
        searched = planner.plan(Target.deadline(point.deadline_s), limits)
        assert point.bound_j <= searched.energy_j, "which may end in any way that a plan can"
    assert max(point.bound_j / free[point.deadline_s].bound_j for point in few.points) > 1.01


def test_the_file_holds_every_sample() -> None:
    frontier = make_frontier(small(), tolerance=0.01)
    content = json.loads(frontier_to_json(frontier))
    assert list(content) == ["schema", "version", "tolerance", "baseline", "points", "slower"]
    assert (content["schema"], content["version"]) == ("perseus-frontier", 1)
    assert list(content["points"][0]) == [
        "deadline_s",
        "iteration_time_s",
        "energy_j",
        "energy_lower_bound_j",
        "gap",
        "slope_w",
        "clocks_mhz",
    ]
    assert len(content["points"]) == len(frontier.points)
    assert content["points"][0]["slope_w"] is None
    assert content["points"][-1]["slope_w"] == 0
    assert content["points"][0]["clocks_mhz"][0] == frontier.points[0].plan.clocks_mhz(0)


def test_beyond_the_cheapest_there_are_plans_that_draw_less(tmp_path: Path) -> None:
    frontier = make_frontier(small(), tolerance=0.01)
    plans = [frontier.points[-1].plan, *frontier.slower]
    assert len(plans) == 3
    for faster, slower in pairwise(plans):
        assert slower.energy_j / slower.iteration_time_s < faster.energy_j / faster.iteration_time_s
        assert slower.iteration_time_s > faster.iteration_time_s
    save_frontier(frontier, tmp_path / "frontier.json")
    assert load_curve(tmp_path / "frontier.json") == frontier.curve()
    lowest = frontier.slower[-1]
    curve = SpeedCurve.from_frontier(frontier.curve(), pipelines=2)
    assert curve.lowest_w == pytest.approx(2 * lowest.energy_j / lowest.iteration_time_s)
    assert curve.most_w <= curve.full_w


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, float("nan")])
def test_a_tolerance_out_of_range_is_refused(tolerance: float) -> None:
    with pytest.raises(PlanError, match="tolerance"):
        make_frontier(small(), tolerance=tolerance)


def test_samples_without_a_plan_that_keeps_the_limits_are_left_out() -> None:
    """Forward is fastest below the top clock, backward at it: the shortest iteration needs a change between any two."""
    rows = {
        "forward": [(710, 1.0, 200.0), (700, 0.9, 150.0)],
        "backward": [(710, 1.0, 200.0), (700, 1.2, 130.0)],
    }
    measured = Profile({(0, kind): tuple(Measurement(*row) for row in options) for kind, options in rows.items()})
    planner = Planner(build_graph(one_f_one_b(1, 2)), measured, blocking_power_w=1.0)
    free, limited = make_frontier(planner), make_frontier(planner, limits=ChangeLimits(0))
    assert 0 < len(limited.points) < len(free.points)
    assert all(point.plan.clock_changes(0) == 0 for point in limited.points)
