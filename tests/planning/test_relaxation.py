"""The relaxation: a true lower bound, tight where clocks are continuous, convex and monotone in the deadline."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.relaxation import Relaxation
from perseus_plugin.profiling.profile import Profile

from .jobs import Job, brute_force, bundled_profile, jobs


def problem_of(job: Job) -> PlanningProblem:
    return build_problem(build_graph(job.streams, latency_s=job.latency_s), job.profile, list(job.blocking_w))


@settings(max_examples=60)
@given(jobs(max_stages=2, max_microbatches=1, max_clocks=3), st.floats(0, 1))
def test_the_bound_is_never_above_the_brute_force_optimum(job: Job, share: float) -> None:
    problem = problem_of(job)
    if len(problem.instruction_nodes) > 6:
        return
    deadline = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
    relaxed = Relaxation(problem).solve(deadline)
    best = brute_force(job, deadline)
    waiting = problem.total_blocking_w * deadline
    # The bound counts waiting until the deadline; a plan may end earlier where that saves.
    cheapest = Relaxation(problem).cheapest()
    bound = relaxed.bound_j if relaxed.price_w >= problem.total_blocking_w else cheapest.bound_j
    assert bound <= best * (1 + 1e-9) + 1e-9
    assert relaxed.bound_j <= (best + waiting) * (1 + 1e-9) + 1e-9


@settings(max_examples=40)
@given(jobs(), st.lists(st.floats(0, 1), min_size=3, max_size=6, unique=True))
def test_the_bound_is_convex_falling_and_has_its_price_as_slope(job: Job, shares: list[float]) -> None:
    problem = problem_of(job)
    relaxation = Relaxation(problem)
    span = problem.longest_s - problem.shortest_s
    found = [relaxation.solve(problem.shortest_s + share * span) for share in sorted(shares)]
    effective = [r.bound_j - problem.total_blocking_w * r.deadline_s for r in found]
    # The bound lies below the optimum by what the integer units leave.
    loose = 1e-4 * problem.mean_energy_j * len(problem.graph)
    assert (np.diff(effective) <= loose).all()
    for here, value in zip(found, effective, strict=True):
        for other, there in zip(found, effective, strict=True):
            if math.isfinite(here.price_w):
                tangent = value - here.price_w * (other.deadline_s - here.deadline_s)
                assert tangent <= there + loose


@settings(max_examples=40)
@given(jobs(), st.floats(0, 1))
def test_event_times_can_be_run(job: Job, share: float) -> None:
    problem = problem_of(job)
    deadline = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
    relaxation = Relaxation(problem)
    relaxed = relaxation.solve(deadline)
    graph = problem.graph
    tolerance = (2 + len(graph)) * relaxation.time_unit_s
    for finish in (relaxed.earliest_finish_s, relaxed.latest_finish_s):
        assert finish.max() <= deadline + tolerance
        ready = np.zeros(len(graph))
        np.maximum.at(ready, graph.edge_target, finish[graph.edge_source] + graph.edge_latency_s)
        assert (finish - ready >= problem.fastest_s - tolerance).all()
    assert (relaxed.earliest_finish_s <= relaxed.latest_finish_s + tolerance).all()


class LittleRoom(Relaxation):
    """Has less than it takes, at first."""

    @property
    def room(self) -> int:
        return max(1, self.blocking_units)


class AllRoom(Relaxation):
    """Has all that can be of use."""

    @property
    def room(self) -> int:
        return int(self.capacity.max())


@settings(max_examples=40)
@given(jobs(), st.floats(0, 1))
def test_little_room_at_first_changes_no_optimum(job: Job, share: float) -> None:
    problem = problem_of(job)
    deadline = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
    relaxation, narrow = AllRoom(problem), LittleRoom(problem)
    loose = 1e-9 * problem.mean_energy_j * len(problem.graph)
    for wide_found, found in (
        (relaxation.solve(deadline), narrow.solve(deadline)),
        (relaxation.cheapest(), narrow.cheapest()),
    ):
        assert found.bound_j == pytest.approx(wide_found.bound_j, rel=1e-9, abs=loose)
        assert (found.earliest_finish_s == wide_found.earliest_finish_s).all()
        assert (found.latest_finish_s == wide_found.latest_finish_s).all()


@pytest.mark.parametrize("slowdown", [0.0, 0.002, 0.05, 0.2])
def test_the_bound_is_the_energy_of_its_own_schedule(slowdown: float) -> None:
    """Strong duality: the durations of the optimal event times, priced on the hulls, cost just the bound."""
    problem = build_problem(build_graph(one_f_one_b(4, 12)), bundled_profile(4), 60.0)
    deadline = problem.full_clock_time_s * (1 + slowdown)
    relaxed = Relaxation(problem).solve(deadline)
    finish, graph = relaxed.earliest_finish_s, problem.graph
    ready = np.zeros(len(graph))
    np.maximum.at(ready, graph.edge_target, finish[graph.edge_source])
    energy = 0.0
    for node, duration in enumerate(finish - ready):
        options = problem.classes[problem.class_of[node]]
        energy += float(np.interp(duration, options.time_s[options.hull], options.energy_j[options.hull]))
    total = energy + problem.total_blocking_w * deadline
    assert total == pytest.approx(relaxed.bound_j, rel=2e-4)


def test_beyond_the_longest_iteration_every_instruction_runs_at_its_least_energy() -> None:
    problem = build_problem(build_graph(one_f_one_b(3, 4)), bundled_profile(3), 60.0)
    relaxed = Relaxation(problem).solve(2 * problem.longest_s)
    least = float(problem.per_node([c.energy_j[-1] for c in problem.classes]).sum())
    assert relaxed.bound_j == pytest.approx(least + problem.total_blocking_w * 2 * problem.longest_s)
    assert relaxed.price_w == 0


@settings(max_examples=30)
@given(jobs(), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_the_energy_minimum_is_below_every_deadline(job: Job, shares: list[float]) -> None:
    problem = problem_of(job)
    relaxation = Relaxation(problem)
    cheapest = relaxation.cheapest()
    assert relaxation.shortest_s <= cheapest.deadline_s <= problem.longest_s * (1 + 1e-9)
    loose = 1e-4 * problem.mean_energy_j * len(problem.graph)
    for share in shares:
        deadline = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
        assert cheapest.bound_j <= relaxation.solve(deadline).bound_j + loose


def test_two_clocks_of_nearly_the_same_duration_do_not_spoil_the_units() -> None:
    table = dict(bundled_profile(3).table)
    for key, rows in bundled_profile(3).table.items():
        twin = replace(
            rows[0], frequency_mhz=1399, time_s=rows[0].time_s * (1 + 1e-9), energy_j=rows[0].energy_j * 0.99
        )
        table[key] = (*rows, twin)
    graph = build_graph(one_f_one_b(3, 6))
    plain = build_problem(graph, bundled_profile(3), 60.0)
    steep = build_problem(graph, Profile(table), 60.0)
    deadline = plain.full_clock_time_s * 1.1
    loss = Relaxation(plain).solve(deadline).bound_j - Relaxation(steep).solve(deadline).bound_j
    assert 0 <= loss < 0.01 * plain.full_clock_energy_j


@pytest.mark.parametrize("deadline_s", [1e3, 1e12])
def test_far_deadlines_can_be_solved(deadline_s: float) -> None:
    problem = build_problem(build_graph(one_f_one_b(3, 4)), bundled_profile(3), 60.0)
    assert Relaxation(problem).solve(deadline_s).price_w == 0


def test_a_deadline_that_cannot_be_met_is_refused_with_the_shortest_one() -> None:
    problem = build_problem(build_graph(one_f_one_b(2, 3)), bundled_profile(2), 60.0)
    with pytest.raises(PlanError, match=rf"got 0\.100000 s; the shortest.*{problem.shortest_s:.6f} s"):
        Relaxation(problem).solve(0.1)
