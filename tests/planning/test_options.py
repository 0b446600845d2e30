"""Pareto filter, hull and the joining of graph and profile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.options import build_problem, clock_options
from perseus_plugin.profiling.profile import Measurement

from .jobs import bundled_profile

rows = st.lists(
    st.tuples(st.floats(0.01, 10), st.floats(1, 1000)), min_size=1, max_size=20, unique_by=lambda r: r[0]
).map(lambda points: [Measurement(100 + i, t, e) for i, (t, e) in enumerate(points)])


@given(rows, st.floats(0, 50))
def test_options_are_the_pareto_front_of_effective_energy(measurements: list[Measurement], watts: float) -> None:
    options = clock_options(measurements, watts)
    assert (np.diff(options.time_s) > 0).all()
    assert (np.diff(options.energy_j) < 0).all()
    kept = set(options.frequency_mhz.tolist())
    for m in measurements:
        energy = m.energy_j - watts * m.time_s
        no_better = (options.time_s <= m.time_s) & (options.energy_j <= energy)
        assert no_better.any()
        if m.frequency_mhz in kept:
            at = options.frequency_mhz.tolist().index(m.frequency_mhz)
            assert options.time_s[at] == m.time_s
            assert options.energy_j[at] == energy


@given(rows, st.floats(0, 50))
def test_the_hull_is_convex_and_below_every_option(measurements: list[Measurement], watts: float) -> None:
    options = clock_options(measurements, watts)
    time, energy = options.time_s[options.hull], options.energy_j[options.hull]
    assert options.hull[0] == 0
    assert options.hull[-1] == len(options.time_s) - 1
    assert (np.diff(options.slope_w) < 1e-9).all()
    below = np.interp(options.time_s, time, energy)
    assert (below <= options.energy_j + 1e-6 * np.abs(options.energy_j)).all()


def test_blocking_power_comes_once_or_per_stage() -> None:
    graph, profile = build_graph(one_f_one_b(2, 2)), bundled_profile(2)
    assert build_problem(graph, profile, [50.0, 70.0]).total_blocking_w == 120.0
    assert build_problem(graph, profile, 50.0).total_blocking_w == 100.0
    with pytest.raises(PlanError, match="got 3 values; allowed: 1, or one for each of 2 stages"):
        build_problem(graph, profile, [1.0, 2.0, 3.0])
    with pytest.raises(PlanError, match="finite numbers from 0"):
        build_problem(graph, profile, [1.0, float("nan")])


def test_a_profile_without_an_instruction_of_the_schedule_is_refused() -> None:
    with pytest.raises(PlanError, match="runs 'forward' in stage 2; the profile has no rows for it"):
        build_problem(build_graph(one_f_one_b(3, 1)), bundled_profile(2), 50.0)


def test_full_clock_only_leaves_the_highest_clock() -> None:
    problem = build_problem(build_graph(one_f_one_b(2, 2)), bundled_profile(2), 50.0, {(1, "backward")})
    held = problem.classes[problem.keys.index((1, "backward"))]
    assert held.frequency_mhz.tolist() == [1400]
    assert len(problem.classes[problem.keys.index((1, "forward"))].frequency_mhz) > 1
