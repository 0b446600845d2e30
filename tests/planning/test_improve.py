"""The search in windows: exact where the window holds everything, never worse, never late."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.improve import NORMAL, improve
from perseus_plugin.planning.options import build_problem
from perseus_plugin.planning.relaxation import Relaxation
from perseus_plugin.planning.rounding import round_to_deadline, use_up_slack
from perseus_plugin.planning.window import WindowLimits, regrets, solve_window
from perseus_plugin.planning.work import Work

from .jobs import Job, brute_force, bundled_profile, jobs


@settings(max_examples=20)
@given(jobs(max_stages=2, max_microbatches=1, max_clocks=3), st.floats(0, 1))
def test_a_window_with_everything_finds_the_optimum(job: Job, share: float) -> None:
    problem = build_problem(build_graph(job.streams, latency_s=job.latency_s), job.profile, list(job.blocking_w))
    assume(len(problem.instruction_nodes) <= 6)
    deadline = problem.shortest_s + (0.001 + share) * (problem.longest_s - problem.shortest_s)
    relaxed = Relaxation(problem).solve(deadline)
    start = np.zeros(len(problem.graph), dtype=np.int64)
    found, proven = solve_window(
        problem,
        start,
        deadline,
        np.arange(len(problem.graph)),
        regrets(problem, relaxed.instruction_price_w),
        WindowLimits(1.0, np.inf),
        Work(600.0),
    )
    assert proven
    end = problem.graph.iteration_time_s(problem.durations(found))
    assert end <= deadline + 1e-6
    waiting = Job(job.streams, job.profile, job.blocking_w, job.latency_s)
    at_most = brute_force(waiting, deadline - 1e-6) if deadline - 1e-6 >= problem.shortest_s else np.inf
    # Effective energy is what a window minimises: without the blocking power until the end it cannot be larger.
    assert problem.effective_energy_j(found) <= at_most + 1e-4 * problem.mean_energy_j


@pytest.mark.parametrize("slowdown", [0.0, 0.03])
def test_never_worse_and_never_late(slowdown: float) -> None:
    problem = build_problem(build_graph(one_f_one_b(4, 16)), bundled_profile(4), 60.0)
    deadline = problem.full_clock_time_s * (1 + slowdown)
    relaxed = Relaxation(problem).solve(deadline)
    first = round_to_deadline(problem, relaxed.earliest_finish_s, deadline)
    better = improve(problem, relaxed, first, NORMAL, Work(600.0), 3.0)
    assert problem.effective_energy_j(better) < problem.effective_energy_j(first)
    assert problem.graph.iteration_time_s(problem.durations(better)) <= deadline
    assert problem.effective_energy_j(better) + problem.total_blocking_w * deadline >= relaxed.bound_j


def test_without_work_the_plan_stays() -> None:
    problem = build_problem(build_graph(one_f_one_b(2, 4)), bundled_profile(2), 60.0)
    relaxed = Relaxation(problem).solve(problem.full_clock_time_s)
    first = round_to_deadline(problem, relaxed.latest_finish_s, problem.full_clock_time_s)
    work = Work(600.0)
    assert (improve(problem, relaxed, first, NORMAL, work, 0.0) == first).all()
    assert not work.cut_short


@settings(max_examples=30)
@given(jobs(), st.floats(0, 0.8))
def test_slack_is_used_up_without_being_late(job: Job, share: float) -> None:
    problem = build_problem(build_graph(job.streams, latency_s=job.latency_s), job.profile, list(job.blocking_w))
    deadline = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
    fastest = np.zeros(len(problem.graph), dtype=np.int64)
    used = use_up_slack(problem, fastest, deadline)
    assert problem.graph.iteration_time_s(problem.durations(used)) <= deadline
    times, _ = problem.option_table
    for node in problem.instruction_nodes:
        options = problem.classes[problem.class_of[node]]
        if used[node] + 1 < len(options.time_s):
            slower = used.copy()
            slower[node] += 1
            assert problem.graph.iteration_time_s(problem.durations(slower)) > deadline * (1 - 2e-9)
    assert times.shape[0] == len(problem.classes) + 1
