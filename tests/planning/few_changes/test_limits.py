"""Clock-change limits: kept by the plan's own predicted times, at a cost, and never at the deadline's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import perseus_plugin.planning.discretise as discretise_module
import perseus_plugin.planning.few_changes.limits as limits_module
from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.few_changes.bound import LimitedBound
from perseus_plugin.planning.few_changes.dwelling import dwelling_phases
from perseus_plugin.planning.few_changes.limits import keep_limits, violated
from perseus_plugin.planning.few_changes.phase_lp import PhaseMix, solve_phases
from perseus_plugin.planning.few_changes.phases import Phases, StageClocks, assign, stage_clocks
from perseus_plugin.planning.few_changes.segmentation import Segments, segment
from perseus_plugin.planning.options import Assignment, PlanningProblem
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.planning.targets import EFFORTS, Effort
from perseus_plugin.profiling.profile import Measurement, Profile
from tests.examples import examples
from tests.planning.jobs import Job, bundled_profile, every_choice, jobs, replay
from tests.planning.test_planner import planner_of
from tests.planning.test_waiting import with_power

costs = st.tuples(st.integers(1, 6), st.integers(1, 3)).flatmap(
    lambda shape: arrays.arrays(np.float64, shape, elements=st.floats(0, 100).map(lambda x: round(x, 3)))
)


def spread(found: Segments, count: int) -> list[int]:
    lengths = np.diff([*found.begins, count])
    return np.repeat(found.clocks, lengths).tolist()


def changes(clocks: list[int]) -> int:
    return sum(a != b for a, b in zip(clocks, [*clocks[1:], clocks[0]], strict=True))


@given(costs, st.one_of(st.none(), st.integers(0, 5)))
def test_segmentation_is_as_good_as_trying_everything(cost: np.ndarray, most: int | None) -> None:
    count, clocks = cost.shape
    found = spread(segment(cost, np.arange(count, dtype=float), most, 0.0), count)
    assert most is None or changes(found) <= most
    best = min(
        cost[range(count), choice].sum()
        for choice in itertools.product(range(clocks), repeat=count)
        if most is None or changes(list(choice)) <= most
    )
    assert cost[range(count), found].sum() == pytest.approx(best)


@given(costs, st.integers(1, 4))
def test_segmentation_keeps_the_dwell_between_changes(cost: np.ndarray, dwell: int) -> None:
    count = len(cost)
    found = segment(cost, np.arange(count, dtype=float), None, float(dwell))
    assert all(b - a >= dwell for a, b in zip(found.begins[1:], found.begins[2:], strict=False))


def dwells(plan: Plan, stage: int) -> list[float]:
    planned = plan.stages[stage]
    when = [
        here.start_s
        for before, here in zip((planned[-1], *planned[:-1]), planned, strict=True)
        if before.frequency_mhz != here.frequency_mhz
    ]
    return [b - a for a, b in zip(when, [*when[1:], when[0] + plan.iteration_time_s], strict=True)] if when else []


@pytest.mark.many
@examples(8)
@given(jobs(max_stages=3, max_microbatches=4, max_clocks=4), st.integers(0, 4), st.sampled_from([0.0, 0.2]))
def test_limits_are_kept_and_promises_hold(job: Job, most: int, slowdown: float) -> None:
    graph = build_graph(job.streams, latency_s=job.latency_s)
    planner = Planner(graph, job.profile, blocking_power_w=list(job.blocking_w))
    plan = planner.plan(Target.slowdown(slowdown), ChangeLimits(most))
    assert max(plan.clock_changes(stage) for stage in range(len(plan.stages))) <= most
    end, energy = replay(job, plan)
    assert end <= plan.deadline_s * (1 + 1e-12)
    assert energy == pytest.approx(plan.energy_j, rel=1e-9)
    assert plan.energy_j <= plan.baseline_energy_j


@pytest.mark.many
@examples(8)
@given(jobs(max_stages=3, max_microbatches=4, max_clocks=4), st.floats(0, 0.3), st.sampled_from([0.0, 0.2]))
def test_a_dwell_is_kept_and_promises_hold(job: Job, share: float, slowdown: float) -> None:
    planner = planner_of(job)
    dwell_s = share * planner.problem.full_clock_time_s
    plan = planner.plan(Target.slowdown(slowdown), ChangeLimits(None, dwell_s))
    for stage in range(len(plan.stages)):
        assert min(dwells(plan, stage), default=dwell_s) >= dwell_s * (1 - 1e-9)
    end, energy = replay(job, plan)
    assert end <= plan.deadline_s * (1 + 1e-12)
    assert energy == pytest.approx(plan.energy_j, rel=1e-9)
    assert plan.energy_j <= plan.baseline_energy_j


@pytest.mark.many
@examples(25)
@given(jobs(max_stages=3, max_microbatches=4, max_clocks=4), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.3))
def test_phases_cut_for_a_dwell_meet_the_deadline(job: Job, share: float, aim: float, dwell: float) -> None:
    problem = planner_of(job).problem
    deadline_s = problem.shortest_s + share * (problem.longest_s - problem.shortest_s)
    aim_s = aim * deadline_s * np.ones(len(problem.graph))
    stages = stage_clocks(problem)
    phases = dwelling_phases(problem, stages, aim_s, deadline_s, dwell * deadline_s)
    end_s = problem.graph.iteration_time_s(assign(problem, stages, phases).duration_s)
    assert end_s <= deadline_s * (1 + 1e-11)


def test_instructions_shorter_than_a_dwell_share_clocks_at_little_cost() -> None:
    profile = bundled_profile(3)
    shortest_s = min(row.time_s for rows in profile.table.values() for row in rows)
    planner = Planner(build_graph(interleaved_1f1b(3, 6, 2)), profile, blocking_power_w=60.0)
    free = planner.plan(Target.slowdown())
    kept = planner.plan(Target.slowdown(), ChangeLimits(None, 2 * shortest_s))
    found = [dwell_s for stage in range(3) for dwell_s in dwells(kept, stage)]
    assert len(found) > 8
    assert min(found) >= 2 * shortest_s
    assert kept.saving >= 0.85 * free.saving > 0


def power_limited(stages: int = 2, microbatches: int = 6) -> Planner:
    """At its highest clock a power limit makes every backward a little longer, and much dearer, than one below it."""
    table = {}
    for stage in range(stages):
        longer = 1 + 0.1 * stage
        table[stage, "forward"] = tuple(
            Measurement(clock, longer * seconds, longer * joules)
            for clock, seconds, joules in ((1410, 0.05, 15.0), (1200, 0.056, 13.5), (1000, 0.065, 13.0))
        )
        table[stage, "backward"] = tuple(
            Measurement(clock, longer * seconds, longer * joules)
            for clock, seconds, joules in ((1410, 0.1003, 30.0), (1200, 0.1, 28.0), (1000, 0.115, 26.0))
        )
    return Planner(build_graph(one_f_one_b(stages, microbatches)), Profile(table), blocking_power_w=70.0)


@pytest.mark.parametrize(("stages", "microbatches", "most"), [(2, 6, 0), (2, 6, 2), (3, 12, 2)])
@pytest.mark.parametrize("search", [False, True])
def test_an_energy_budget_of_full_clocks_is_kept_where_the_shortest_iteration_takes_more_changes(
    stages: int, microbatches: int, most: int, search: bool
) -> None:
    planner, limits = power_limited(stages, microbatches), ChangeLimits(most)
    problem = planner.problem
    assert problem.shortest_s < problem.full_clock_time_s
    with pytest.raises(PlanError, match="no plan was found"):
        planner.solve(Target.deadline(problem.shortest_s), limits)
    budget_j = problem.full_clock_energy_j * 1.01
    found = planner.solve(Target.energy_budget(budget_j), limits, search=search)
    assert found.energy_j <= budget_j
    assert found.iteration_time_s <= problem.full_clock_time_s
    assert violated(problem, found.assignment, limits) == []


@pytest.mark.many
@examples(12)
@given(
    jobs(max_stages=2, max_microbatches=2, max_clocks=3),
    st.sampled_from([0, 2, 3]),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.sampled_from(EFFORTS[:2]),
)
def test_few_changes_of_a_small_job_are_at_their_optimum(
    job: Job, most: int, slowdown: float, share: float, effort: Effort
) -> None:
    problem = planner_of(job).problem
    assume(len(problem.instruction_nodes) <= 6)
    choices, limits, waiting_w = every_choice(job, most), ChangeLimits(most), problem.total_blocking_w
    until_s = problem.full_clock_time_s * (1 + slowdown)
    in_time = [(end_s, energy_j) for end_s, energy_j in choices if end_s <= until_s * (1 + 1e-12)]
    for target, best_j in (
        (Target.deadline(until_s), min(energy_j for _, energy_j in in_time)),
        (
            Target.straggler(until_s),
            min(energy_j + waiting_w * (until_s - end_s) for end_s, energy_j in in_time),
        ),
        (Target.cheapest(), min(energy_j for _, energy_j in choices)),
    ):
        found = planner_of(job).solve(target, limits, effort)
        assert violated(problem, found.assignment, limits) == []
        assert best_j * (1 - 1e-9) - 1e-9 <= found.energy_j <= best_j * (1 + 1e-3) + 1e-9
    least_j, soonest_j = min(energy_j for _, energy_j in choices), min(choices)[1]
    budget_j = least_j + share * (soonest_j - least_j) + 1e-4 * abs(least_j)
    best_s = min(end_s for end_s, energy_j in choices if energy_j <= budget_j)
    fastest = planner_of(job).solve(Target.energy_budget(budget_j), limits, effort)
    assert violated(problem, fastest.assignment, limits) == []
    assert fastest.energy_j <= budget_j
    assert best_s * (1 - 1e-9) <= fastest.iteration_time_s <= best_s * (1 + 1e-3)


def one_clock_per_stage(planner: Planner, clocks: Sequence[int]) -> list[tuple[float, float]]:
    """Time and energy of all plans without any change."""
    problem, found = planner.problem, []
    for chosen in itertools.product(clocks, repeat=problem.graph.stages):
        time_s, watts = problem.at_clocks(np.array(chosen)[problem.graph.stage])
        end_s = problem.graph.iteration_time_s(time_s)
        found.append((end_s, float(time_s @ watts) + problem.total_blocking_w * end_s))
    return found


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 5), (3, 6), (4, 8)])
@pytest.mark.parametrize("effort", EFFORTS[:2])
def test_without_a_change_a_job_takes_what_the_best_clock_of_each_stage_does(
    stages: int, microbatches: int, effort: Effort
) -> None:
    clocks = (1400, 1150, 670, 610, 475)
    graph = build_graph(one_f_one_b(stages, microbatches))
    planner = Planner(graph, bundled_profile(stages, clocks), blocking_power_w=70.0)
    choices = one_clock_per_stage(planner, clocks)
    least_j = planner.solve(Target.cheapest(), ChangeLimits(0), effort).energy_j
    assert least_j == pytest.approx(min(energy_j for _, energy_j in choices), rel=1e-6)
    until_s = planner.problem.full_clock_time_s * 1.3
    in_time_j = [energy_j for end_s, energy_j in choices if end_s <= until_s]
    least_j = planner.solve(Target.deadline(until_s), ChangeLimits(0), effort).energy_j
    assert least_j == pytest.approx(min(in_time_j), rel=1e-6)


@pytest.mark.many
@examples(12)
@given(
    jobs(max_stages=2, max_microbatches=2, max_clocks=3),
    st.sampled_from([0, 2, 3]),
    st.floats(0, 0.5),
    st.sampled_from(EFFORTS[:2]),
    st.sampled_from(["deadline", "straggler", "cheapest"]),
)
def test_no_choice_of_clocks_with_so_few_changes_is_below_the_bound(
    job: Job, most: int, slowdown: float, effort: Effort, kind: str
) -> None:
    planner = planner_of(job)
    problem = planner.problem
    # The longer search takes seconds for each of the larger ones.
    assume(len(problem.instruction_nodes) <= (8 if effort == "quick" else 5))
    choices = every_choice(job, most)
    until_s = problem.full_clock_time_s * (1 + slowdown)
    if kind == "cheapest":
        target, energies = Target.cheapest(), [energy for _, energy in choices]
    else:
        in_time = [(end, energy) for end, energy in choices if end <= until_s * (1 + 1e-12)]
        waiting_w = problem.total_blocking_w if kind == "straggler" else 0.0
        target = Target.straggler(until_s) if kind == "straggler" else Target.deadline(until_s)
        energies = [energy + waiting_w * (until_s - end) for end, energy in in_time]
    # The bound of a plan is cut off at what the plan takes, which for such jobs is the least.
    found = planner.solve(target, ChangeLimits(most), effort)
    assert found.relaxed.bound_j <= min(energies) * (1 + 1e-9) + 1e-9
    assert min(energies) <= found.energy_j * (1 + 1e-9)


@pytest.mark.parametrize(
    ("stages", "microbatches", "most"), [(2, 4, 2), pytest.param(3, 6, 4, marks=pytest.mark.repeated)]
)
def test_few_changes_have_a_bound_of_their_own(stages: int, microbatches: int, most: int) -> None:
    planner = Planner(build_graph(one_f_one_b(stages, microbatches)), bundled_profile(stages), blocking_power_w=60.0)
    free, quick = planner.plan(Target.slowdown()), planner.plan(Target.slowdown(), ChangeLimits(most))
    normal = planner.plan(Target.slowdown(), ChangeLimits(most), "normal")
    assert free.energy_lower_bound_j * 1.001 < quick.energy_lower_bound_j < normal.energy_lower_bound_j
    assert normal.energy_lower_bound_j <= normal.energy_j <= quick.energy_j
    longer = planner.solve(Target.slowdown(0.1), ChangeLimits(most))
    assert longer.relaxed.bound_j <= longer.energy_j


def test_few_changes_may_take_longer_than_the_cheapest_iteration() -> None:
    """Forward is fastest and cheapest below the top clock, backward at it: T* needs both, and a change between."""
    rows = {
        "forward": [(710, 1.0, 200.0), (700, 0.9, 150.0)],
        "backward": [(710, 1.0, 200.0), (700, 1.2, 260.0)],
    }
    measured = Profile(
        {(0, kind): tuple(Measurement(f, t, e) for f, t, e in options) for kind, options in rows.items()}
    )
    planner = Planner(build_graph(one_f_one_b(1, 2)), measured, blocking_power_w=1.0)
    free = planner.plan(Target.slowdown())
    limited = planner.plan(Target.slowdown(), ChangeLimits(0))
    assert free.iteration_time_s < limited.iteration_time_s <= free.baseline_time_s
    assert limited.energy_j <= limited.baseline_energy_j
    assert limited.clock_changes(0) == 0


def test_a_bound_is_not_tightened_on_where_every_phase_plan_that_matters_is_mixed() -> None:
    graph = build_graph(one_f_one_b(3, 3))
    planner = Planner(graph, bundled_profile(3), blocking_power_w=60.0)
    # An iteration may be longer than the cheapest, so that no program for that one comes up to its bound.
    relaxed = planner.relaxation.cheapest()
    bound, work = LimitedBound(planner.problem, relaxed, 0, 2 * relaxed.deadline_s, None), planner.work("normal")
    bound.see(relaxed.instruction_price_w, bound.rest_j, work)
    bound.tighten(relaxed.deadline_s, work, until=9.0)
    assert work.done < 0.5
    assert bound.bound_j >= relaxed.bound_j


def test_more_changes_save_more() -> None:
    planner = Planner(build_graph(one_f_one_b(2, 4)), bundled_profile(2), blocking_power_w=60.0)
    free = planner.plan(Target.slowdown())
    two, four = (planner.plan(Target.slowdown(), ChangeLimits(most)) for most in (2, 4))
    assert 0 < two.saving < four.saving <= free.saving
    assert planner.plan(Target.slowdown(), ChangeLimits(1000)) == free


def test_where_a_search_with_more_changes_finds_less_the_plan_of_fewer_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_no_luck(problem: PlanningProblem, *given: Any, **named: Any) -> Assignment:
        limits: ChangeLimits = given[2]
        return problem.full_clocks if limits.max_changes == 3 else keep_limits(problem, *given, **named)

    monkeypatch.setattr(discretise_module, "keep_limits", of_no_luck)
    plans = []
    for most in (2, 3):
        planner = Planner(build_graph(one_f_one_b(3, 4)), bundled_profile(3), blocking_power_w=60.0)
        plans.append(planner.plan(Target.slowdown(), ChangeLimits(most)))
    assert plans[1].energy_j <= plans[0].energy_j < plans[0].baseline_energy_j


@pytest.mark.many
@examples(2)
@given(
    jobs(max_stages=2, max_microbatches=5, max_clocks=6),
    st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda two: two[0] < two[1]),
    st.sampled_from([0.0, 0.05]),
)
def test_more_changes_are_never_worse(job: Job, most: tuple[int, int], slowdown: float) -> None:
    fewer, more = (planner_of(job).solve(Target.slowdown(slowdown), ChangeLimits(one)) for one in most)
    assume(more.limited)
    assert more.energy_j <= fewer.energy_j * (1 + 1e-12)


def test_where_waits_can_be_lowered_no_change_but_for_them_is_tried_too() -> None:
    clocks = (1400, 1150, 670, 475)
    power_w = [dict(zip(clocks, of, strict=True)) for of in ((68, 54, 51, 44), (110, 78, 63, 61), (98, 76, 40, 20))]
    planner = Planner(
        build_graph(one_f_one_b(3, 3)),
        with_power(bundled_profile(3, clocks), power_w),
        blocking_power_w=70.0,
        switch_latency_s=0.01,
    )
    problem, limits = planner.problem, ChangeLimits(2)
    until_s = problem.full_clock_time_s * 1.3
    relaxed, priced_j = planner.relaxation.solve(until_s), []
    for chosen in itertools.product(clocks, repeat=3):
        clocks_mhz = np.array(chosen)[problem.graph.stage]
        time_s, watts = problem.at_clocks(clocks_mhz)
        if problem.graph.iteration_time_s(time_s) <= until_s:
            one = Assignment(clocks_mhz, time_s, float(time_s @ watts))
            priced_j.append(planner.priced(relaxed, one, until_s, limits).energy_j)
    found = planner.solve(Target.deadline(until_s), limits)
    assert found.energy_j <= min(priced_j) * (1 + 1e-9)


@pytest.mark.parametrize("dwell_s", [0.2, 0.5])
def test_the_minimum_dwell_is_kept(dwell_s: float) -> None:
    planner = Planner(build_graph(one_f_one_b(2, 4)), bundled_profile(2), blocking_power_w=60.0)
    plan = planner.plan(Target.slowdown(0.05), ChangeLimits(None, dwell_s))
    assert plan.saving > 0
    assert plan.iteration_time_s <= plan.deadline_s
    assert min((d for stage in range(2) for d in dwells(plan, stage)), default=dwell_s) >= dwell_s - 1e-9


def test_limits_and_unresolved_kinds_together() -> None:
    planner = Planner(
        build_graph(one_f_one_b(3, 3)), bundled_profile(3), blocking_power_w=60.0, full_clock_only={(0, "backward")}
    )
    plan = planner.plan(Target.slowdown(0.1), ChangeLimits(4))
    backward = [p.frequency_mhz for p in plan.stages[0] if p.instruction.kind == "backward"]
    assert set(backward) == {1400}
    assert max(plan.clock_changes(stage) for stage in range(3)) <= 4
    assert plan.saving > 0


def test_without_time_for_the_programs_prices_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "solve_phases", lambda *_: None)
    planner = Planner(build_graph(one_f_one_b(3, 6)), bundled_profile(3), blocking_power_w=60.0)
    plan = planner.plan(Target.slowdown(0.1), ChangeLimits(4))
    assert max(plan.clock_changes(stage) for stage in range(3)) <= 4
    assert plan.iteration_time_s <= plan.deadline_s
    assert plan.saving > 0.02


def test_no_program_is_solved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = list[tuple[object, ...]]()

    def kept(problem: PlanningProblem, stages: tuple[StageClocks, ...], phases: Phases, *given: Any) -> PhaseMix | None:
        solved.append(phases.program)
        return solve_phases(problem, stages, phases, *given)

    monkeypatch.setattr(limits_module, "solve_phases", kept)
    planner = Planner(build_graph(one_f_one_b(2, 3)), bundled_profile(2), blocking_power_w=60.0)
    planner.solve(Target.slowdown(0.1), ChangeLimits(2))
    assert 0 < len(solved) == len(set(solved))


def test_phases_of_one_program_have_the_same_mixture() -> None:
    planner = Planner(build_graph(one_f_one_b(2, 3)), bundled_profile(2), blocking_power_w=60.0)
    problem, deadline_s = planner.problem, 1.1 * planner.problem.full_clock_time_s
    begins = ((0, 2, 5), (0, 3))
    same, alike, other = (
        Phases(begins, clocks) for clocks in (((0, 1, 0), (1, 1)), ((2, 0, 2), (0, 0)), ((0, 1, 2), (0, 0)))
    )
    assert same.program == alike.program != other.program
    mixes = [
        solve_phases(problem, stage_clocks(problem), phases, deadline_s, planner.work("quick"), 9.0)
        for phases in (same, alike, other)
    ]
    first, second, third = (mix for mix in mixes if mix is not None)
    assert (first.phases, first.energy_j) == (second.phases, second.energy_j)
    assert first.price_w.tolist() == second.price_w.tolist()
    assert third.energy_j <= first.energy_j * (1 + 1e-9), "first and last phase are free of each other"


@pytest.mark.parametrize(("most", "dwell"), [(-1, 0.0), (None, -0.1), (None, float("nan"))])
def test_limits_out_of_range_are_refused(most: int | None, dwell: float) -> None:
    with pytest.raises(PlanError, match=r"got .*; allowed"):
        ChangeLimits(most, dwell)
