"""Plans for power budgets: kept, never slower than one clock for all, and a bound that nothing beats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.few_changes.limits import violated
from perseus_plugin.planning.plan import Plan, plan_from_json, plan_to_json
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.power.budget import GroupBudget, NodeOverhead, Peaks, PowerBudget
from perseus_plugin.planning.power.fastest import uniform_within
from perseus_plugin.planning.power.trace import PowerTrace, peak_w, traces_of
from perseus_plugin.planning.targets import ChangeLimits, Effort, Target
from perseus_plugin.profiling.profile import Measurement
from tests.examples import examples
from tests.planning.jobs import Job, bundled_profile, jobs, replay, simulate
from tests.planning.test_planner import planner_of, small

_CLOSE = 1 + 1e-6


def run_at(job: Job, chosen: dict[tuple[int, Compute], Measurement]) -> tuple[float, list[float]]:
    """Iteration time and power of each stage's GPU, without any of the package's graph."""
    end_s = simulate(job.streams, lambda stage, op: chosen[stage, op].time_s, latency_s=job.latency_s)
    energy_j = [watts * end_s for watts in job.blocking_w]
    for (stage, _), row in chosen.items():
        energy_j[stage] += row.energy_j - job.blocking_w[stage] * row.time_s
    return end_s, [joules / end_s for joules in energy_j]


def instructions(job: Job) -> list[tuple[int, Compute]]:
    return [(s, op) for s, stream in enumerate(job.streams) for op in stream if isinstance(op, Compute)]


def every_choice(job: Job, max_changes: int | None = None) -> Iterator[tuple[float, list[float]]]:
    """What each choice of clocks takes, of those in which no stage changes its clock more often."""
    todo = instructions(job)
    for rows in itertools.product(*(job.profile.table[s, op.kind] for s, op in todo)):
        if max_changes is not None:
            clocks = [
                [row.frequency_mhz for (s, _), row in zip(todo, rows, strict=True) if s == stage]
                for stage in range(len(job.streams))
            ]
            if max(sum(a != b for a, b in zip(own, own[1:] + own[:1], strict=True)) for own in clocks) > max_changes:
                continue
        yield run_at(job, dict(zip(todo, rows, strict=True)))


def uniform(job: Job) -> list[tuple[float, list[float]]]:
    """What one clock for all takes, for each clock that everything has been measured at."""
    todo = instructions(job)
    clocks = set.intersection(*({m.frequency_mhz for m in rows} for rows in job.profile.table.values()))
    runs = []
    for clock in clocks:
        rows = {(s, op): next(m for m in job.profile.table[s, op.kind] if m.frequency_mhz == clock) for s, op in todo}
        runs.append(run_at(job, rows))
    return runs


def budget_of(stage_w: Sequence[float], shares: Sequence[float]) -> PowerBudget:
    """The job, the first stage, and all others, each at a share of some power."""
    sides = [sum(stage_w), stage_w[0], sum(stage_w[1:])]
    assume(min(sides[: len(shares)]) > 1e-3)
    watts = [share * of for share, of in zip(shares, sides, strict=False)]
    groups = [GroupBudget("first", "0", watts[1])] if len(watts) > 1 else []
    if len(watts) > 2:
        groups.append(GroupBudget("others", f"1-{len(stage_w) - 1}", watts[2]))
    return PowerBudget(watts[0], tuple(groups))


def keeps(budget: PowerBudget, stage_w: Sequence[float], slack: float = _CLOSE) -> bool:
    return all(np.dot(one.gpus, stage_w) <= one.watts * slack for one in budget.limits(len(stage_w)))


@pytest.mark.many
@examples(20)
@given(jobs(), st.floats(0.5, 1.05), st.integers(1, 3), st.floats(0.8, 1.2), st.floats(0.8, 1.2))
def test_budgets_are_kept_and_one_clock_for_all_is_never_faster(
    job: Job, share: float, count: int, first: float, others: float
) -> None:
    assume(len(job.streams) > 1 or count == 1)
    planner = planner_of(job)
    _, full_w = run_at(job, {(s, op): job.profile.table[s, op.kind][0] for s, op in instructions(job)})
    budget = budget_of(full_w, (share, share * first, share * others)[:count])
    fit = [time_s for time_s, stage_w in uniform(job) if keeps(budget, stage_w, 1 - 1e-9)]
    try:
        plan = planner.plan(Target.power_budget(budget))
    except PlanError:
        assert not fit
        return
    end_s, energy_j = replay(job, plan)
    assert plan.iteration_time_s == pytest.approx(end_s)
    assert plan.energy_j == pytest.approx(energy_j)
    clocks = {p.instruction: p.frequency_mhz for stage in plan.stages for p in stage}
    rows = {
        (s, op): next(
            m
            for m in job.profile.table[s, op.kind]
            if m.frequency_mhz
            == next(
                mhz
                for i, mhz in clocks.items()
                if (i.stage, i.kind, i.microbatch, i.chunk) == (s, op.kind, op.microbatch, op.chunk)
            )
        )
        for s, op in instructions(job)
    }
    assert keeps(budget, run_at(job, rows)[1])
    assert not fit or plan.iteration_time_s <= min(fit) * _CLOSE
    assert plan.power is not None
    assert plan.power.time_lower_bound_s <= plan.iteration_time_s
    assert plan.power.converged


@settings(max_examples=40)
@given(
    jobs(max_stages=2, max_microbatches=2, max_clocks=3),
    st.floats(0.4, 1.0),
    st.integers(1, 3),
    st.floats(0.85, 1.1),
)
def test_no_choice_of_clocks_that_keeps_the_budgets_beats_the_bound(
    job: Job, share: float, count: int, first: float
) -> None:
    assume(len(job.streams) > 1 or count == 1)
    assume(len(instructions(job)) <= 8)
    runs = list(every_choice(job))
    budget = budget_of(max(runs, key=lambda run: sum(run[1]))[1], (share, share * first, share)[:count])
    fit = [time_s for time_s, stage_w in runs if keeps(budget, stage_w, 1.0)]
    try:
        plan = planner_of(job).plan(Target.power_budget(budget))
    except PlanError:
        return  # of choices next to the lowest power not every one is looked at
    assert plan.power is not None
    assert fit
    assert plan.power.time_lower_bound_s <= min(fit) * _CLOSE
    assert min(fit) <= plan.iteration_time_s * _CLOSE


def steady(share: float, **more: object) -> Plan:
    planner = small()
    full = planner.plan(Target.full())
    return planner.plan(Target.power_budget(PowerBudget(share * full.power_w, **more)))  # type: ignore[arg-type]


@pytest.mark.many
@examples(15)
@given(
    jobs(max_stages=2, max_microbatches=2, max_clocks=3),
    st.lists(st.floats(0.01, 1.1), min_size=1, max_size=2),
    st.sampled_from([None, 0, 2]),
    st.sampled_from(["quick", "normal"]),
)
def test_a_power_budget_of_a_small_job_is_at_its_optimum(
    job: Job, shares: list[float], most: int | None, effort: Effort
) -> None:
    planner, limits = planner_of(job), ChangeLimits(most)
    assume(len(planner.problem.instruction_nodes) <= 6)
    choices = list(every_choice(job, most))
    least = min(sum(stage_w) for _, stage_w in choices)
    _, fastest_w = min(choices)
    budget_w = least + shares[0] * (sum(fastest_w) - least) + 1e-3 * least
    groups = [GroupBudget("first", "0", share * fastest_w[0]) for share in shares[1:] if share * fastest_w[0] > 1]
    budget = PowerBudget(budget_w, tuple(groups))
    best_s = min((end_s for end_s, stage_w in choices if keeps(budget, stage_w, 1.0)), default=None)
    assume(best_s is not None)
    found = planner.solve(Target.power_budget(budget), limits, effort)
    assert violated(planner.problem, found.assignment, limits) == []
    assert best_s * (1 - 1e-9) <= found.iteration_time_s <= best_s * (1 + 1e-3)


def test_a_plan_is_faster_than_one_clock_for_all_at_the_same_power_and_close_to_its_bound() -> None:
    planner = small(4, 8)
    job = Job(one_f_one_b(4, 8), bundled_profile(4), (60.0,) * 4)
    gains = []
    for time_s, stage_w in sorted(uniform(job))[1:4]:
        plan = planner.plan(Target.power_budget(sum(stage_w)))
        assert plan.power is not None
        assert plan.iteration_time_s <= plan.power.time_lower_bound_s * 1.01
        gains.append(time_s / plan.iteration_time_s - 1)
    assert gains[0] > 0.03
    assert gains[-1] > 0.01


def test_less_power_takes_longer_down_to_a_lowest_budget_that_is_named() -> None:
    planner = small()
    full_w = planner.plan(Target.full()).power_w
    times_s = [
        planner.plan(Target.power_budget(share * full_w)).iteration_time_s for share in (1.0, 0.8, 0.6, 0.5, 0.45)
    ]
    assert times_s == sorted(times_s)
    with pytest.raises(
        PlanError, match=r"got \d+\.\d W for the job; the lowest plan found draws (\d+\.\d) W"
    ) as refused:
        planner.plan(Target.power_budget(0.3 * full_w))
    lowest_w = float(str(refused.value).split("draws ")[1].split(" W")[0])
    assert planner.plan(Target.power_budget(lowest_w + 0.1)).power_w <= lowest_w + 0.1


def test_with_several_budgets_it_is_said_by_how_much_they_are_too_low() -> None:
    budget = PowerBudget(400.0, (GroupBudget("last", "2", 120.0),))
    with pytest.raises(PlanError, match=r"those of the job, last all; they would have to be \d+\.\d % higher"):
        small().plan(Target.power_budget(budget))


def test_an_overhead_that_takes_the_budget_is_named() -> None:
    with pytest.raises(PlanError, match="the job: the overhead of its nodes alone"):
        small().plan(Target.power_budget(PowerBudget(100.0, node=NodeOverhead(800.0))))


@pytest.mark.parametrize(
    ("budget", "exceeded"),
    [
        (PowerBudget(50.0, or_nearest=True), "the job draws"),
        (PowerBudget(100.0, node=NodeOverhead(800.0), or_nearest=True), "the job draws"),
        (PowerBudget(groups=(GroupBudget("last", "2", 20.0),), or_nearest=True), "last draws"),
        (PowerBudget(peaks=Peaks(0.05, gpu_w=50.0), or_nearest=True), "a GPU draws"),
        (PowerBudget(50.0, peaks=Peaks(0.05, gpu_w=50.0), or_nearest=True), "the job draws"),
    ],
)
def test_what_comes_nearest_to_a_budget_that_nothing_keeps(budget: PowerBudget, exceeded: str) -> None:
    planner = small()
    plan = planner.plan(Target.power_budget(budget))
    assert plan.power is not None
    assert plan.power.exceeded(budget.peaks).startswith(exceeded)
    slowest = planner.plan_of(uniform_within(planner, budget, ChangeLimits()))
    if not budget.peaks.limited:
        assert plan.power_w <= slowest.power_w * _CLOSE
    assert {clock for stage in range(3) for clock in slowest.clocks_mhz(stage)} == {600}
    with pytest.raises(PlanError):
        planner.plan(Target.power_budget(replace(budget, or_nearest=False)))


def test_a_budget_that_can_be_kept_is_planned_for_alike_whether_or_not_it_has_to_be() -> None:
    plan, strict = steady(0.7, or_nearest=True), steady(0.7)
    assert plan == strict
    assert plan.power is not None
    assert plan.power.exceeded(Peaks()) == ""


def test_pipelines_share_the_jobs_budget_and_nodes_their_overhead() -> None:
    planner = small()
    alone = planner.plan(Target.power_budget(700.0))
    both = PowerBudget(2 * 700.0 * 1.1 + 6 * 50.0, node=NodeOverhead(400.0, 0.1), gpus_per_node=8)
    together = planner.plan(Target.power_budget(both.placed([0, 1, 2, 0, 1, 2])))
    assert together.iteration_time_s == pytest.approx(alone.iteration_time_s)
    assert together.power is not None
    assert together.power.job_w == pytest.approx(2 * alone.power_w * 1.1 + 300.0)


def test_limits_on_clock_changes_are_kept_within_a_budget() -> None:
    planner = small(3, 3)
    plan = planner.plan(Target.power_budget(700.0), ChangeLimits(max_changes=2))
    assert max(plan.clock_changes(stage) for stage in range(3)) <= 2
    assert plan.power_w <= 700.0 * _CLOSE


def test_what_a_plan_says_of_power_passes_through_its_file() -> None:
    plan = steady(0.8, groups=(GroupBudget("last", "2", 300.0),))
    assert plan.power is not None
    assert [one.name for one in plan.power.budgets] == ["the job", "last"]
    assert plan_from_json(plan_to_json(plan)) == plan


def test_more_effort_is_never_slower() -> None:
    planner = small(3, 4)
    quick, normal = (planner.plan(Target.power_budget(650.0), effort=effort) for effort in ("quick", "normal"))  # type: ignore[arg-type]
    assert normal.iteration_time_s <= quick.iteration_time_s * _CLOSE


# Peaks.


@given(
    st.lists(
        st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 500.0)), min_size=1, max_size=6), min_size=1, max_size=3
    ),
    st.floats(0.05, 5.0),
)
def test_a_peak_is_the_highest_average_of_all_windows(parts: list[list[tuple[float, float]]], window_s: float) -> None:
    traces = []
    for pieces in parts:
        until_s = np.cumsum([seconds for seconds, _ in pieces])
        traces.append(PowerTrace(until_s / until_s[-1], np.array([watts for _, watts in pieces])))
    highest_w = peak_w(traces, [1] * len(traces), window_s)
    begins_s = np.linspace(0, 1, 400)
    sums_j = sum((trace.energy_j(begins_s + window_s) - trace.energy_j(begins_s)) for trace in traces)
    assert float(np.max(sums_j)) / window_s <= highest_w * (1 + 1e-9) + 1e-9
    steep_w = sum(float(trace.watts.max()) for trace in traces)
    assert highest_w <= float(np.max(sums_j)) / window_s + steep_w / 400 / window_s + 1e-9


@settings(max_examples=40)
@given(jobs(), st.floats(0.5, 1.0))
def test_the_trace_of_a_plan_holds_its_energy(job: Job, share: float) -> None:
    planner = planner_of(job)
    solution = planner.solve(Target.slowdown(share), search=False)
    traces = traces_of(planner.problem, solution)
    energy_j = sum(float(trace.energy_j(np.array([solution.iteration_time_s]))[0]) for trace in traces)
    assert energy_j == pytest.approx(solution.energy_j, rel=1e-6)


def test_a_limit_on_peaks_is_kept_or_refused_with_what_is_drawn() -> None:
    free = steady(0.8)
    assert free.power is not None
    for peaks in (
        Peaks(0.2, job_w=0.9 * free.power.peaks.job_w),
        Peaks(0.05, gpu_w=0.9 * free.power.peaks.gpu_w),
        Peaks(5.0, node_w=0.95 * free.power.peaks.node_w),
    ):
        plan = steady(0.8, peaks=peaks)
        assert plan.power is not None
        for planned_w, allowed_w in (
            (plan.power.peaks.job_w, peaks.job_w),
            (plan.power.peaks.node_w, peaks.node_w),
            (plan.power.peaks.gpu_w, peaks.gpu_w),
        ):
            assert allowed_w is None or planned_w <= allowed_w * _CLOSE
    with pytest.raises(PlanError, match=r"a GPU draws \d+\.\d W over 0\.05 s, and may draw 100\.0 W"):
        steady(0.8, peaks=Peaks(0.05, gpu_w=100.0))


def test_wide_graphs_of_several_groups_converge() -> None:
    graph = build_graph(one_f_one_b(6, 12))
    planner = Planner(graph, bundled_profile(6), blocking_power_w=60.0)
    full = planner.plan(Target.full())
    groups = tuple(GroupBudget(f"g{stage}", str(stage), (0.7 + 0.03 * stage) * full.power_w / 6) for stage in range(6))
    plan = planner.plan(Target.power_budget(PowerBudget(0.8 * full.power_w, groups)))
    assert plan.power is not None
    assert plan.power.converged
    assert plan.iteration_time_s <= plan.power.time_lower_bound_s * 1.02


def test_what_is_drawn_less_by_all_lets_no_group_draw_more() -> None:
    budget = PowerBudget(900.0, (GroupBudget("a", "0", 300.0),), peaks=Peaks(gpu_w=350.0)).placed([0, 1])
    more, less = budget.tightened(1.25), budget.tightened(0.9)
    assert (more.job_w, more.groups[0].watts, more.peaks.gpu_w) == pytest.approx((720.0, 240.0, 280.0))
    assert (less.job_w, less.groups[0].watts, less.peaks.gpu_w) == pytest.approx((1000.0, 300.0, 350.0))
