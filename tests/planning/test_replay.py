from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import FloatArray, IntArray, build_graph
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.options import PlanningProblem, build_problem
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.replay import CatchUp, Replay, by_node, clocks_of, finishes, latest_starts
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.profile import Measurement, Profile

from .jobs import Job, bundled_profile, jobs, replay, simulate

BLOCKING_W = 80.0


def problem_of(job: Job) -> PlanningProblem:
    graph = build_graph(job.streams, latency_s=job.latency_s)
    return build_problem(graph, job.profile, job.blocking_w)


def plan_of(problem: PlanningProblem, slowdown: float = 0.0) -> Plan:
    """Any plan can be replayed: clocks are only rounded."""
    planner = Planner.of(problem)
    return planner.to_plan(planner.solve(Target.slowdown(slowdown), search=False))


def as_profiled(problem: PlanningProblem) -> FloatArray:
    return np.array([[problem.full_clock_s]])


@given(job=jobs(), slowdown=st.sampled_from([0.0, 0.1]))
@settings(max_examples=50)
def test_with_durations_as_in_the_profile_a_replay_is_the_plan(job: Job, slowdown: float) -> None:
    problem = problem_of(job)
    plan = plan_of(problem, slowdown)
    outcome = Replay(problem, as_profiled(problem)).under(clocks_of(plan, problem.graph))
    time_s, energy_j = replay(job, plan)
    assert outcome.time_s[0] == pytest.approx(time_s)
    assert outcome.energy_j[0] == pytest.approx(energy_j, rel=1e-9, abs=1e-9)


@given(job=jobs(), data=st.data())
@settings(max_examples=50)
def test_at_full_clocks_instructions_take_what_they_took(job: Job, data: st.DataObject) -> None:
    problem = problem_of(job)
    factors = np.array(
        data.draw(st.lists(st.floats(0.5, 2.0), min_size=len(problem.graph), max_size=len(problem.graph)))
    )
    durations_s = problem.full_clock_s * factors
    outcome = Replay(problem, durations_s[None, None]).at_full_clocks

    def took(stage: int, op: Compute) -> float:
        node = next(
            n
            for n, i in enumerate(problem.graph.instructions)
            if i is not None and (i.stage, i.kind, i.microbatch, i.chunk) == (stage, op.kind, op.microbatch, op.chunk)
        )
        return float(durations_s[node])

    assert outcome.time_s[0] == pytest.approx(simulate(job.streams, took, latency_s=job.latency_s))


@given(job=jobs(), seed=st.integers(0, 100), latency_s=st.sampled_from([0.0, 0.02]))
@settings(max_examples=50)
def test_catching_up_never_makes_an_iteration_longer(job: Job, seed: int, latency_s: float) -> None:
    problem = problem_of(job)
    plan = plan_of(problem)
    clocks = clocks_of(plan, problem.graph)
    factors = np.exp(0.2 * np.random.default_rng(seed).standard_normal((6, 2, len(problem.graph))))
    made = Replay(problem, problem.full_clock_s * factors)
    latest = latest_starts(problem.graph, problem.planned_s(clocks), plan.deadline_s)
    without = made.under(clocks)
    for weight in (0.0, 2.0):
        caught = made.under(clocks, CatchUp(latest, latency_s, weight))
        assert (caught.time_s <= without.time_s + 1e-9).all()
        assert (caught.energy_j <= made.at_full_clocks.energy_j * 2).all()


@given(job=jobs())
@settings(max_examples=50)
def test_nobody_catches_up_who_is_in_plan(job: Job) -> None:
    problem = problem_of(job)
    plan = plan_of(problem)
    clocks = clocks_of(plan, problem.graph)
    made = Replay(problem, as_profiled(problem))
    caught = made.under(clocks, CatchUp(latest_starts(problem.graph, problem.planned_s(clocks), plan.deadline_s)))
    assert caught.raised == 0.0
    assert caught.time_s[0] == pytest.approx(made.under(clocks).time_s[0])


def even_job() -> tuple[PlanningProblem, IntArray]:
    """Three stages, the last the longest, and the clocks of its plan by node."""
    profile = bundled_profile(3)
    problem = build_problem(build_graph(one_f_one_b(3, 6)), profile, BLOCKING_W)
    return problem, clocks_of(plan_of(problem), problem.graph)


def test_a_late_start_is_caught_up_with() -> None:
    """Some long instructions make what follows in the same stage late; at full clocks part of that is made good."""
    problem, clocks = even_job()
    durations_s = problem.full_clock_s.copy()
    durations_s[problem.graph.stage_nodes[1][2:5]] *= 2
    made = Replay(problem, durations_s[None, None])
    latest = latest_starts(problem.graph, problem.planned_s(clocks), problem.full_clock_time_s)
    static, caught = made.under(clocks), made.under(clocks, CatchUp(latest))
    assert static.time_s[0] > made.at_full_clocks.time_s[0] * 1.01
    assert caught.time_s[0] < static.time_s[0]
    assert caught.raised > 0
    slow_gpu = made.under(clocks, CatchUp(latest, latency_s=0.03))
    assert caught.time_s[0] <= slow_gpu.time_s[0] <= static.time_s[0]


@given(job=jobs(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_what_begins_late_does_so_at_any_clock(job: Job, seed: int) -> None:
    problem = problem_of(job)
    graph, full_s = problem.graph, problem.full_clock_s
    gaps_s = np.where(graph.is_constant, 0.0, np.random.default_rng(seed).uniform(0.0, 0.1, len(graph)))
    clocks, never = clocks_of(plan_of(problem, 0.1), graph), CatchUp(np.full(len(graph), np.inf))
    late = Replay(problem, full_s[None, None], gaps_s=gaps_s[:, None])
    took_s = graph.durations(problem.planned_s(clocks))
    assert late.at_full_clocks.time_s == pytest.approx(finishes(graph, (full_s + gaps_s)[:, None]).max())
    for outcome in (late.under(clocks), late.under(clocks, never)):
        assert outcome.time_s == pytest.approx(finishes(graph, (took_s + gaps_s)[:, None]).max())


def test_a_larger_step_is_no_reason_to_catch_up_once_its_size_is_known() -> None:
    problem, clocks = even_job()
    made = Replay(problem, 1.6 * as_profiled(problem))
    latest = latest_starts(problem.graph, problem.planned_s(clocks), problem.full_clock_time_s * 1.01)
    fixed, scaled = made.under(clocks, CatchUp(latest)), made.under(clocks, CatchUp(latest, size_weight=0.5))
    assert scaled.raised < 0.5 * fixed.raised
    saving = 1 - np.array([o.energy_j[0] for o in (made.under(clocks), scaled, fixed)]) / made.at_full_clocks.energy_j
    assert saving[1] > 0.7 * saving[0] > 0
    assert saving[2] < 0.5 * saving[0]
    assert scaled.time_s[0] <= made.at_full_clocks.time_s[0] * (1 + 1e-9)


def test_replicas_wait_for_the_slowest() -> None:
    problem, clocks = even_job()
    base = problem.full_clock_s
    alone = [Replay(problem, (factor * base)[None, None]).under(clocks) for factor in (1.0, 1.5)]
    both = Replay(problem, np.array([[base, 1.5 * base]])).under(clocks)
    assert both.time_s[0] == pytest.approx(alone[1].time_s[0])
    waiting_j = problem.total_blocking_w * (alone[1].time_s[0] - alone[0].time_s[0])
    assert both.energy_j[0] == pytest.approx(alone[0].energy_j[0] + alone[1].energy_j[0] + waiting_j)


def test_what_does_not_fit_is_refused() -> None:
    problem, clocks = even_job()
    with pytest.raises(PlanError, match="durations: got shape"):
        Replay(problem, np.ones((2, 3)))
    with pytest.raises(PlanError, match="negative or not finite"):
        Replay(problem, np.full((1, 1, len(problem.graph)), np.nan))
    with pytest.raises(PlanError, match="77 MHz in stage"):
        Replay(problem, as_profiled(problem)).under(np.full_like(clocks, 77))
    with pytest.raises(PlanError, match="got 11 in stage 1; allowed: one for each of its 12 instructions"):
        by_node(problem.graph, [[1.0] * 12, [1.0] * 11, [1.0] * 12])


def test_ranks_that_see_themselves_late_catch_up_though_the_graph_has_them_in_time() -> None:
    problem, clocks = even_job()
    latest = latest_starts(problem.graph, problem.planned_s(clocks), problem.full_clock_time_s)
    jitter_s = np.abs(np.random.default_rng(0).normal(0, 0.01, (len(problem.graph), 1)))
    quiet = Replay(problem, as_profiled(problem)).under(clocks, CatchUp(latest))
    nervous = Replay(problem, as_profiled(problem), jitter_s).under(clocks, CatchUp(latest))
    assert quiet.raised == 0
    assert nervous.raised > 0.05
    assert nervous.energy_j[0] > quiet.energy_j[0]


def test_a_clock_that_goes_down_does_so_a_latency_late() -> None:
    """One stage, three forwards at 10 and 20 s, 100 and 40 W above waiting, the clock going down at the second."""
    rows = {(0, "forward"): (Measurement(1410, 10.0, 1800.0), Measurement(810, 20.0, 2400.0))}
    problem = build_problem(build_graph([[Compute("forward", m) for m in range(3)]]), Profile(rows), BLOCKING_W)
    clocks = np.array([1410, 810, 810])
    at_once = Replay(problem, as_profiled(problem)).under(clocks)
    assert (at_once.time_s[0], at_once.energy_j[0]) == (50.0, 1800.0 + 2 * 2400.0)
    late = Replay(problem, as_profiled(problem), latency_s=2.0).under(clocks)
    # Two seconds at the high clock do a fifth of it; the rest takes 16 s.
    assert late.time_s[0] == pytest.approx(48.0)
    assert late.energy_j[0] == pytest.approx(1800.0 + 2 * 180.0 + 16 * 120.0 + 2400.0)
    longer = Replay(problem, as_profiled(problem), latency_s=60.0).under(clocks)
    assert longer.time_s[0] == pytest.approx(40.0), "an instruction that is over before the clock goes down"


@given(job=jobs(), slowdown=st.sampled_from([0.0, 0.1]), latency_s=st.floats(0.0, 0.05))
@settings(max_examples=50)
def test_a_latency_makes_nothing_longer_and_full_clocks_no_different(
    job: Job, slowdown: float, latency_s: float
) -> None:
    problem = problem_of(job)
    clocks = clocks_of(plan_of(problem, slowdown), problem.graph)
    at_once = Replay(problem, as_profiled(problem))
    late = Replay(problem, as_profiled(problem), latency_s=latency_s)
    fastest = all(rows[0].time_s <= min(row.time_s for row in rows) for rows in job.profile.table.values())
    if fastest:
        assert late.under(clocks).time_s[0] <= at_once.under(clocks).time_s[0] * (1 + 1e-9)
    assert late.at_full_clocks.time_s[0] == pytest.approx(at_once.at_full_clocks.time_s[0])
    assert late.at_full_clocks.energy_j[0] == pytest.approx(at_once.at_full_clocks.energy_j[0])
