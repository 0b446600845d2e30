"""Whole plans: what they promise holds in a simulation that shares no code with the planner."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Constant
from perseus_plugin.iteration.schedules import SCHEDULES, one_f_one_b
from perseus_plugin.planning.few_changes.limits import violated
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import ChangeLimits, Effort, Planner, Target, make_plan
from perseus_plugin.planning.targets import Prices
from perseus_plugin.profiling.derived import with_rows_for
from perseus_plugin.profiling.profile import Measurement, Profile
from tests.examples import examples

from .jobs import Job, brute_force, bundled_profile, every_choice, jobs, replay


def planner_of(job: Job) -> Planner:
    graph = build_graph(job.streams, latency_s=job.latency_s)
    return Planner(graph, job.profile, blocking_power_w=list(job.blocking_w))


def small(stages: int = 3, microbatches: int = 6) -> Planner:
    return Planner(build_graph(one_f_one_b(stages, microbatches)), bundled_profile(stages), blocking_power_w=60.0)


@pytest.mark.many
@examples(25)
@given(jobs(), st.floats(0, 0.6))
def test_promises_hold_in_an_independent_simulation(job: Job, slowdown: float) -> None:
    planner = planner_of(job)
    found = planner.solve(Target.slowdown(slowdown))
    plan = planner.to_plan(found)
    end, energy = replay(job, plan)
    assert end == pytest.approx(plan.iteration_time_s, rel=1e-9)
    assert end <= plan.deadline_s * (1 + 1e-12)
    assert energy == pytest.approx(plan.energy_j, rel=1e-9)
    # A plan's own bound is cut off at what it takes.
    assert found.relaxed.bound_j <= plan.energy_j * (1 + 1e-9)
    assert plan.energy_j <= plan.baseline_energy_j
    for stage in plan.stages:
        for before, after in itertools.pairwise(stage):
            assert before.finish_s <= after.start_s + 1e-12


@pytest.mark.many
@examples(25)
@given(jobs(max_stages=2, max_microbatches=1, max_clocks=3), st.floats(0, 0.6))
def test_the_brute_force_optimum_lies_between_bound_and_plan(job: Job, slowdown: float) -> None:
    planner = planner_of(job)
    assume(len(planner.problem.instruction_nodes) <= 6)
    found = planner.solve(Target.slowdown(slowdown), effort="normal")
    best = brute_force(job, found.allowed_s)
    assert found.relaxed.bound_j <= best * (1 + 1e-9) + 1e-9
    assert best <= found.energy_j * (1 + 1e-9)
    # A window holds the whole of so small a job, so the search is exact up to its time unit.
    assert found.energy_j <= best * (1 + 1e-4) + 1e-9


PRICES = Prices(per_kwh=0.1, per_gpu_hour=2.0)


@pytest.mark.many
@examples(12)
@given(
    jobs(max_stages=2, max_microbatches=1, max_clocks=3),
    st.floats(0, 0.6),
    st.floats(0.01, 1),
    st.sampled_from(["quick", "normal"]),
)
def test_every_target_of_a_small_job_is_at_its_optimum(job: Job, slowdown: float, share: float, effort: Effort) -> None:
    problem = planner_of(job).problem
    assume(len(problem.instruction_nodes) <= 6)
    choices = every_choice(job)

    def plan(target: Target) -> Plan:
        return planner_of(job).plan(target, effort=effort)

    until_s = problem.full_clock_time_s * (1 + slowdown)
    waiting_w = problem.total_blocking_w
    in_time = [(end, energy) for end, energy in choices if end <= until_s * (1 + 1e-12)]
    least = min(energy for _, energy in choices)
    budget = least + share * (min(choices)[1] - least) + 1e-6
    cost_w = PRICES.gpu_w * problem.graph.stages
    bought = plan(Target.money(PRICES))
    for got, best in (
        (plan(Target.deadline(until_s)).energy_j, min(energy for _, energy in in_time)),
        (
            plan(Target.straggler(until_s)).energy_j,
            min(energy + waiting_w * (until_s - end) for end, energy in in_time),
        ),
        (plan(Target.cheapest()).energy_j, least),
        (
            plan(Target.energy_budget(budget)).iteration_time_s,
            min(end for end, energy in choices if energy <= budget),
        ),
        (
            bought.energy_j + cost_w * bought.iteration_time_s,
            min(energy + cost_w * end for end, energy in choices),
        ),
    ):
        # Times count in whole units of 0.1 us, and costs in steps.
        assert best * (1 - 1e-9) - 1e-9 <= got <= best * (1 + 1e-3) + 1e-9


def test_an_energy_budget_is_kept_by_the_shortest_of_choices_that_hardly_differ() -> None:
    """CP-SAT calls another choice the best, 1.4 % longer, where energy counts in 1e11 steps or more."""
    table = {
        (0, "forward"): (
            Measurement(1455, 0.5933177, 83.46766298),
            Measurement(1185, 0.7095184, 69.18436366),
            Measurement(1110, 0.76315139, 64.91432528),
            Measurement(645, 1.28482334, 66.68360718),
        ),
        (1, "forward"): (
            Measurement(1200, 0.31979851, 64.23289769),
            Measurement(990, 0.36789587, 48.73668908),
            Measurement(960, 0.37263976, 48.09336671),
            Measurement(915, 0.38696372, 46.81647123),
        ),
        (1, "backward"): (
            Measurement(1200, 0.60555433, 150.04655219),
            Measurement(990, 0.660042, 113.60737138),
            Measurement(960, 0.67412579, 105.35385963),
            Measurement(915, 0.69795357, 105.67790732),
        ),
        (0, "backward"): (
            Measurement(1455, 1.61699609, 251.82301407),
            Measurement(1185, 1.80386856, 193.54815799),
            Measurement(1110, 1.79027013, 172.36139536),
            Measurement(645, 2.42131101, 135.92218612),
        ),
    }
    job = Job(one_f_one_b(2, 1), Profile(table), (88.05745333, 14.34817188))
    budget_j = 607.3149556
    best_s = min(end_s for end_s, energy_j in every_choice(job) if energy_j <= budget_j)
    assert planner_of(job).plan(Target.energy_budget(budget_j)).iteration_time_s == pytest.approx(best_s, rel=1e-6)


@pytest.mark.many
@examples(15)
@given(jobs(max_stages=3, max_microbatches=3), st.floats(0, 0.3), st.floats(0, 0.3))
def test_more_time_is_no_worse_for_another_planner(job: Job, slowdown: float, more: float) -> None:
    shorter, longer, cheapest = (
        planner_of(job).plan(target)
        for target in (Target.slowdown(slowdown), Target.slowdown(slowdown + more), Target.cheapest())
    )
    assert cheapest.energy_j <= longer.energy_j * (1 + 1e-4) + 1e-9
    assert longer.energy_j <= shorter.energy_j * (1 + 1e-4) + 1e-9


@pytest.mark.many
@examples(6)
@given(jobs(max_stages=3, max_microbatches=4), st.floats(0, 0.3), st.sampled_from([None, 0, 2, 3]))
def test_more_clocks_and_more_changes_are_no_worse(job: Job, slowdown: float, most: int | None) -> None:
    planner = planner_of(job)
    deadline = Target.deadline(planner.problem.full_clock_time_s * (1 + slowdown))
    # The highest clock is what full clocks are, and so what the deadline is.
    fewer = replace(job, profile=Profile({key: (rows[0], *rows[1::2]) for key, rows in job.profile.table.items()}))
    free = planner.plan(deadline)
    assert free.energy_j <= planner_of(fewer).plan(deadline).energy_j * (1 + 1e-4) + 1e-9
    assert free.energy_j <= planner_of(job).plan(deadline, ChangeLimits(most)).energy_j * (1 + 1e-4) + 1e-9


@settings(max_examples=6)
@given(
    jobs(max_stages=3, max_microbatches=3, max_clocks=3),
    st.sampled_from([Target.slowdown(0.02), Target.cheapest(), Target.money(PRICES)]),
    st.sampled_from([None, 0, 3]),
)
def test_a_higher_effort_is_never_worse(job: Job, target: Target, most: int | None) -> None:
    quick, normal = (planner_of(job).plan(target, ChangeLimits(most), effort) for effort in ("quick", "normal"))
    besides_w = 0.0 if target.prices is None else target.prices.gpu_w * len(job.streams)
    costs = [plan.energy_j + besides_w * plan.iteration_time_s for plan in (normal, quick)]
    assert costs[0] <= costs[1]


@pytest.mark.many
@examples(20)
@given(jobs(), st.floats(1.0, 3.0))
def test_a_straggler_is_waited_for(job: Job, stretch: float) -> None:
    planner = planner_of(job)
    until = planner.problem.full_clock_time_s * stretch
    found = planner.solve(Target.straggler(until))
    plan = planner.to_plan(found)
    end, energy = replay(job, plan)
    assert end <= until * (1 + 1e-12)
    assert plan.energy_j == pytest.approx(energy + sum(job.blocking_w) * (until - end), rel=1e-9)
    assert found.relaxed.bound_j <= plan.energy_j * (1 + 1e-9)
    assert plan.energy_j <= plan.baseline_energy_j


@pytest.mark.many
@examples(8)
@given(jobs())
def test_cheapest_takes_no_more_than_any_deadline(job: Job) -> None:
    planner = planner_of(job)
    cheapest = planner.plan(Target.cheapest())
    for slowdown in (0.0, 0.1, 0.5):
        assert cheapest.energy_lower_bound_j <= planner.plan(Target.slowdown(slowdown)).energy_j * (1 + 1e-9)


def test_more_effort_is_never_worse() -> None:
    planner = small(4, 10)
    quick, normal = (planner.plan(Target.slowdown(), effort=effort) for effort in ("quick", "normal"))
    assert normal.energy_lower_bound_j == quick.energy_lower_bound_j
    assert normal.energy_j <= quick.energy_j
    assert normal.iteration_time_s <= normal.deadline_s


@pytest.mark.many
@examples(10)
@given(
    jobs(max_stages=3, max_microbatches=4, max_clocks=3),
    st.lists(st.floats(0, 0.4), min_size=2, max_size=5),
    st.sampled_from([None, None, None, 0, 3]),
    st.booleans(),
)
def test_more_time_never_makes_a_planners_next_plan_worse(
    job: Job, slowdowns: list[float], most: int | None, straggler: bool
) -> None:
    planner, limits = planner_of(job), ChangeLimits(most)
    full_s, before = planner.problem.full_clock_time_s, list[tuple[float, float]]()
    for slowdown in slowdowns:
        until_s = full_s * (1 + slowdown)
        plan = planner.plan(Target.straggler(until_s) if straggler else Target.deadline(until_s), limits)
        # Those that wait for a straggler all wait until the same moment here, as blocking power counts until then.
        energy_j = plan.energy_j - (planner.problem.total_blocking_w * until_s if straggler else 0.0)
        assert all(energy_j <= other_j * (1 + 1e-9) + 1e-9 for shorter_s, other_j in before if shorter_s <= until_s)
        before.append((until_s, energy_j))


def coarse(profile: Profile) -> Profile:
    return Profile({key: rows[::2] for key, rows in profile.table.items()})


@pytest.mark.parametrize("slowdown", [0.0005, 0.001, 0.01, 0.05])
def test_a_little_more_time_is_no_worse_than_none(slowdown: float) -> None:
    graph, profile = build_graph(one_f_one_b(4, 12)), coarse(bundled_profile(4))
    at_once, later = (
        Planner(graph, profile, blocking_power_w=60.0).plan(Target.slowdown(share)) for share in (0.0, slowdown)
    )
    assert later.energy_j <= max(at_once.energy_j, later.energy_lower_bound_j * 1.005)


def test_zero_slowdown_saves_energy_at_the_time_of_full_clocks() -> None:
    plan = small(4, 12).plan(Target.slowdown())
    assert plan.iteration_time_s <= plan.baseline_time_s
    assert plan.saving > 0.01
    assert plan.gap < 0.03
    # The last stage is the bottleneck, so it has to stay at full clock in the steady state.
    assert set(plan.clocks_mhz(3)) == {1400}


def test_a_long_deadline_is_not_used_where_waiting_costs_energy() -> None:
    planner = small()
    cheapest = planner.plan(Target.cheapest())
    relaxed = planner.plan(Target.deadline(100.0))
    assert relaxed.deadline_s == 100.0
    assert relaxed.iteration_time_s == cheapest.iteration_time_s < 100.0


def test_an_energy_budget_gives_a_fast_plan_within_it() -> None:
    planner = small()
    full, cheapest = planner.plan(Target.slowdown()), planner.plan(Target.cheapest())
    budget = (full.energy_j + cheapest.energy_j) / 2
    plan = planner.plan(Target.energy_budget(budget))
    assert plan.energy_j <= budget
    assert full.iteration_time_s < plan.iteration_time_s < cheapest.iteration_time_s
    assert planner.plan(Target.energy_budget(10 * budget)).iteration_time_s <= full.iteration_time_s
    with pytest.raises(PlanError, match=r"energy budget: got 1\.000 J; the cheapest plan found takes"):
        planner.plan(Target.energy_budget(1.0))


def test_unresolved_kinds_stay_at_full_clock() -> None:
    plan = make_plan(
        build_graph(one_f_one_b(3, 6)),
        bundled_profile(3),
        blocking_power_w=60.0,
        target=Target.slowdown(0.2),
        full_clock_only={(0, "backward"), (1, "forward")},
    )
    held = [p for stage in plan.stages for p in stage]
    held = [p for p in held if (p.instruction.stage, p.instruction.kind) in {(0, "backward"), (1, "forward")}]
    assert {p.frequency_mhz for p in held} == {1400}
    assert plan.saving > 0


def test_the_fastest_clock_need_not_be_the_highest() -> None:
    rows = (Measurement(1400, 0.11, 40.0), Measurement(1300, 0.10, 36.0), Measurement(1000, 0.14, 30.0))
    profile = Profile({(0, "forward"): rows, (0, "backward"): rows})
    planner = Planner(build_graph(one_f_one_b(1, 2)), profile, blocking_power_w=50.0)
    plan = planner.plan(Target.deadline(0.40))
    assert plan.iteration_time_s == pytest.approx(0.40)
    assert set(plan.clocks_mhz(0)) == {1300}
    assert plan.baseline_time_s == pytest.approx(0.44)


def test_constant_time_nodes_count_as_blocking() -> None:
    streams = [[Constant("load"), *one_f_one_b(1, 2)[0], Constant("step")]]
    profile = bundled_profile(1)
    plan = make_plan(
        build_graph(streams, {(0, "load"): 0.5, (0, "step"): 0.25}),
        profile,
        blocking_power_w=60.0,
        target=Target.slowdown(),
    )
    rows = [profile.table[0, kind][0] for kind in ("forward", "backward")]
    busy = 2 * sum(m.time_s for m in rows)
    assert plan.baseline_time_s == pytest.approx(busy + 0.75)
    assert plan.baseline_energy_j == pytest.approx(2 * sum(m.energy_j for m in rows) + 60.0 * 0.75)
    assert plan.stages[0][0].start_s == pytest.approx(0.5)


def test_stages_may_have_different_clocks() -> None:
    table = dict(bundled_profile(2).table)
    for kind in ("forward", "backward"):
        table[1, kind] = bundled_profile(2, clocks=(1980, 1500, 990)).table[1, kind]
    plan = Planner(build_graph(one_f_one_b(2, 6)), Profile(table), blocking_power_w=[60.0, 90.0]).plan(
        Target.slowdown(0.1)
    )
    assert set(plan.clocks_mhz(0)) <= {1400, 1200, 1000, 800, 600}
    assert set(plan.clocks_mhz(1)) <= {1980, 1500, 990}
    assert plan.saving > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_textbook_schedule_can_be_planned(name: str) -> None:
    profile = bundled_profile(4)
    table = dict(profile.table)
    if "recomputation" in name:
        table |= {(s, "recompute"): rows for (s, kind), rows in profile.table.items() if kind == "forward"}
    streams = SCHEDULES[name](4, 8)
    full = with_rows_for(Profile(table), streams)
    plan = Planner(build_graph(streams), full, blocking_power_w=60.0).plan(Target.slowdown())
    assert plan.microbatches == 8
    assert plan.iteration_time_s <= plan.baseline_time_s
    assert plan.energy_j < plan.baseline_energy_j


@pytest.mark.parametrize(
    "make",
    [
        lambda: Target.slowdown(-0.1),
        lambda: Target.slowdown(math.nan),
        lambda: Target.deadline(0.0),
        lambda: Target.straggler(math.inf),
        lambda: Target.energy_budget(-1.0),
    ],
)
def test_targets_out_of_range_are_refused(make) -> None:
    with pytest.raises(PlanError, match=r"got .*; allowed: a finite number"):
        make()


def test_an_impossible_deadline_names_the_shortest_iteration() -> None:
    planner = small()
    with pytest.raises(PlanError, match=f"{planner.problem.shortest_s:.6f} s"):
        planner.plan(Target.deadline(0.01))


@pytest.mark.parametrize("of", [Target.deadline, Target.straggler])
def test_a_deadline_that_is_the_shortest_iteration_but_for_rounding_is_met(of: Callable[[float], Target]) -> None:
    for planner in (small(), small(2, 3)):
        shortest_s = planner.problem.shortest_s
        plan = planner.plan(of(shortest_s * (1 - 1e-15)))
        assert plan.iteration_time_s == shortest_s
        with pytest.raises(PlanError, match=f"{shortest_s:.6f} s"):
            planner.plan(of(shortest_s * (1 - 1e-6)))


def test_what_was_found_for_fewer_changes_is_a_plan_for_any_number() -> None:
    planner = Planner(build_graph(one_f_one_b(3, 8)), bundled_profile(3), blocking_power_w=60.0)
    rounded = planner.solve(Target.slowdown(0.01), search=False)
    fresh = Planner(build_graph(one_f_one_b(3, 8)), bundled_profile(3), blocking_power_w=60.0)
    limited = fresh.solve(Target.slowdown(0.01), ChangeLimits(max_changes=100))
    assert limited.energy_j < rounded.energy_j, "as it was searched for"
    assert fresh.solve(Target.slowdown(0.01), search=False).energy_j <= limited.energy_j
    few = fresh.solve(Target.slowdown(0.01), ChangeLimits(max_changes=2), search=False)
    assert violated(fresh.problem, few.assignment, ChangeLimits(max_changes=2)) == []
