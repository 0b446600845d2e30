"""What waits take, and at which clock they are spent, held against clocks followed through time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp
from perseus_plugin.iteration.replayed import InForce, Samples
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.plan import Plan, PlannedInstruction, PlannedWait, plan_from_json, plan_to_json
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.planning.process import answer_to, planner_for
from perseus_plugin.planning.replay import Replay, clocks_of
from perseus_plugin.planning.request import PaceRequest, PlanAnswer, PlanRequest
from perseus_plugin.profiling.profile import Measurement, Profile
from tests.examples import examples

from .jobs import Job, bundled_profile, jobs, made_again, simulate

LATENCIES_S = st.sampled_from([0.0, 0.002, 0.02])


def with_power(profile: Profile, power_w: Sequence[dict[int, float]]) -> Profile:
    return Profile.from_rows(
        (stage, kind, replace(row, blocking_power_w=power_w[stage][row.frequency_mhz]))
        for stage, kind, row in profile.rows()
    )


@st.composite
def waiting_jobs(draw: st.DrawFn, max_stages: int = 4, max_microbatches: int = 5, max_clocks: int = 5) -> Job:
    """A random job whose GPUs draw more at higher clocks while they wait."""
    job = draw(jobs(max_stages, max_microbatches, max_clocks))
    power_w = []
    for stage in range(len(job.streams)):
        clocks = sorted({row.frequency_mhz for its, _, row in job.profile.rows() if its == stage})
        watts = sorted(draw(st.lists(st.floats(20.0, 95.0), min_size=len(clocks), max_size=len(clocks))))
        power_w.append(dict(zip(clocks, watts, strict=True)))
    return replace(job, profile=with_power(job.profile, power_w))


def planner_of(job: Job, latency_s: float | None) -> Planner:
    graph = build_graph(job.streams, latency_s=job.latency_s)
    return Planner(graph, job.profile, blocking_power_w=list(job.blocking_w), switch_latency_s=latency_s)


def rounded(planner: Planner, slowdown: float) -> Plan:
    """A plan whose clocks are not searched for, for what holds of any."""
    return planner.to_plan(planner.solve(Target.slowdown(slowdown), search=False))


def waiting_w(job: Job, stage: int) -> dict[int, float]:
    return {row.frequency_mhz: row.blocking_power_w for its, _, row in job.profile.rows() if its == stage}


def spent_waiting_j(
    planned: Sequence[PlannedInstruction],
    waits: Sequence[PlannedWait],
    power_w: dict[int, float],
    end_s: float,
    latency_s: float,
) -> float:
    """What one stage takes outside of its instructions, following its clock through time."""
    full = max(power_w)
    own = {wait.after: wait for wait in waits}
    spent = 0.0
    for after in range(-1, len(planned)):
        begin = planned[after].finish_s if after >= 0 else 0.0
        end = planned[after + 1].start_s if after + 1 < len(planned) else end_s
        before_mhz = planned[after].frequency_mhz if after >= 0 else full
        next_mhz = planned[after + 1].frequency_mhz if after + 1 < len(planned) else full
        if after not in own:
            spent += power_w[max(before_mhz, next_mhz)] * (end - begin)
            continue
        wait = own[after]
        assert begin - 1e-9 <= wait.start_s <= wait.finish_s <= end + 1e-9
        low_from = wait.start_s if wait.frequency_mhz == before_mhz else wait.start_s + latency_s
        assert low_from < wait.finish_s
        spent += power_w[before_mhz] * (low_from - begin)
        spent += power_w[wait.frequency_mhz] * (wait.finish_s - low_from)
        spent += power_w[next_mhz] * (end - wait.finish_s)
    return spent


def energy_of(job: Job, plan: Plan, end_s: float, latency_s: float) -> float:
    """A plan's energy from the profile alone, its instructions at the times that it gives."""
    table = {(stage, kind, row.frequency_mhz): row.energy_j for stage, kind, row in job.profile.rows()}
    total = 0.0
    for stage, planned in enumerate(plan.stages):
        total += sum(table[stage, one.instruction.kind, one.frequency_mhz] for one in planned)
        total += spent_waiting_j(planned, plan.waits_of(stage), waiting_w(job, stage), end_s, latency_s)
    return total


@pytest.mark.many
@examples(40)
@given(waiting_jobs(), st.floats(0, 0.6), LATENCIES_S)
def test_a_plan_takes_what_its_clocks_take_followed_through_time(job: Job, slowdown: float, latency_s: float) -> None:
    planner = planner_of(job, latency_s)
    solution = planner.solve(Target.slowdown(slowdown))
    plan = planner.to_plan(solution)
    assert plan.energy_j == pytest.approx(energy_of(job, plan, plan.iteration_time_s, latency_s), rel=1e-9)
    assert solution.relaxed.bound_j * (1 - 1e-9) <= plan.energy_j <= plan.baseline_energy_j * (1 + 1e-12)
    assert plan_from_json(plan_to_json(plan)) == plan


@pytest.mark.many
@examples(25)
@given(waiting_jobs(), st.floats(1.0, 3.0), LATENCIES_S)
def test_who_waits_for_a_straggler_waits_at_a_low_clock(job: Job, stretch: float, latency_s: float) -> None:
    planner = planner_of(job, latency_s)
    until_s = planner.problem.full_clock_time_s * stretch
    solution = planner.solve(Target.straggler(until_s))
    plan = planner.to_plan(solution)
    assert plan.energy_j == pytest.approx(energy_of(job, plan, until_s, latency_s), rel=1e-9)
    assert solution.relaxed.bound_j * (1 - 1e-9) <= plan.energy_j <= plan.baseline_energy_j * (1 + 1e-12)


@settings(max_examples=30)
@given(waiting_jobs(), st.floats(0, 0.3), LATENCIES_S, st.sampled_from([0.001, 0.1]), st.booleans(), st.booleans())
def test_no_clock_is_lowered_in_work_that_is_no_wait(
    job: Job, slowdown: float, latency_s: float, load_s: float, ends_together: bool, loads_late: bool
) -> None:
    def loading(stage: int, op: StreamOp) -> list[StreamOp]:
        loads = isinstance(op, Compute) and op.kind == "forward" and stage in (0, len(job.streams) - 1)
        return ([op, Constant("load")] if loads_late else [Constant("load"), op]) if loads else [op]

    streams = [
        [*(one for op in stream for one in loading(stage, op)), Constant("tidy"), Constant("step", ends_together)]
        for stage, stream in enumerate(job.streams)
    ]
    constants = {(s, name): load_s for s in range(len(streams)) for name in ("load", "tidy", "step")}
    graph = build_graph(streams, constants, job.latency_s)
    planner = Planner(graph, job.profile, blocking_power_w=0.0, switch_latency_s=latency_s)
    plan = planner.plan(Target.slowdown(slowdown))
    assert plan.energy_j == pytest.approx(energy_of(job, plan, plan.iteration_time_s, latency_s), rel=1e-9)
    start, finish = graph.times(planner.problem.planned_s(clocks_of(plan, graph)))
    for stage, nodes in enumerate(graph.stage_nodes):
        step = int(nodes[-1])
        if ends_together:  # it begins when the last stage is there
            start[step], finish[step] = plan.iteration_time_s - load_s, plan.iteration_time_s
        for wait in plan.waits_of(stage):
            for node in nodes[graph.is_constant[nodes]].tolist():
                assert finish[node] <= wait.start_s + 1e-9 or wait.finish_s <= start[node] + 1e-9


@pytest.mark.many
@examples(25)
@given(waiting_jobs(), st.floats(0, 0.6), LATENCIES_S)
def test_lowering_clocks_in_waits_never_makes_a_plan_dearer(job: Job, slowdown: float, latency_s: float) -> None:
    without = planner_of(job, None).plan(Target.slowdown(slowdown))
    plan = planner_of(job, latency_s).plan(Target.slowdown(slowdown))
    assert without.waits == ()
    assert plan.baseline_energy_j == without.baseline_energy_j
    assert plan.energy_j <= without.energy_j * (1 + 1e-12)
    assert plan.iteration_time_s <= plan.deadline_s * (1 + 1e-12)


def test_no_plan_takes_more_than_full_clocks_with_their_waits_at_lower_ones() -> None:
    rows = [Measurement(1400, 1.0, 200.0, blocking_power_w=100.0), Measurement(1200, 1.1, 198.0, blocking_power_w=70.0)]
    profile = Profile({(stage, kind): tuple(rows) for stage in range(2) for kind in ("forward", "backward")})
    planner = Planner(build_graph(one_f_one_b(2, 2)), profile, blocking_power_w=0.0, switch_latency_s=0.01)
    found = planner.solve(Target.slowdown(0.5))
    full = planner.full_clocks(found)
    seen = []
    for slower in range(len(planner.problem.graph)):
        choice = np.eye(len(planner.problem.graph), dtype=np.int64)[slower]
        one = planner.priced(found.relaxed, planner.problem.assignment(choice), found.allowed_s, found.limits)
        seen.append(one.energy_j)
        assert planner.to_plan(one).energy_j == min(one.energy_j, full.energy_j)
    assert any(full.energy_j < energy_j < planner.problem.full_clock_energy_j for energy_j in seen)


def least_energy_j(job: Job, deadline_s: float) -> float:
    """Of all choices of clocks, every moment of waiting at the clock that takes least then."""
    instructions = [(s, op) for s, stream in enumerate(job.streams) for op in stream if isinstance(op, Compute)]
    least_w = [min(waiting_w(job, stage).values()) for stage in range(len(job.streams))]
    best = float("inf")
    for rows in itertools.product(*(job.profile.table[s, op.kind] for s, op in instructions)):
        chosen = dict(zip(instructions, rows, strict=True))
        end = simulate(job.streams, lambda s, op, chosen=chosen: chosen[s, op].time_s, latency_s=job.latency_s)
        if end <= deadline_s * (1 + 1e-12):
            busy = sum(row.energy_j - least_w[s] * row.time_s for (s, _), row in chosen.items())
            best = min(best, busy + sum(least_w) * end)
    return best


@pytest.mark.many
@examples(25)
@given(waiting_jobs(max_stages=2, max_microbatches=1, max_clocks=3), st.floats(0, 0.6), LATENCIES_S)
def test_the_bound_is_below_every_choice_of_clocks_and_waits(job: Job, slowdown: float, latency_s: float) -> None:
    planner = planner_of(job, latency_s)
    assume(len(planner.problem.instruction_nodes) <= 6)
    found = planner.solve(Target.slowdown(slowdown), effort="normal")
    least = least_energy_j(job, found.allowed_s)
    # A plan's own bound is cut off at what it takes.
    assert found.relaxed.bound_j <= least * (1 + 1e-9) + 1e-9
    assert least <= found.energy_j * (1 + 1e-9)


def changes_of(plan: Plan, stage: int, latency_s: float) -> list[float]:
    """When a stage's clock changes in an iteration, full clocks at its ends not counted."""
    planned, own = plan.stages[stage], {wait.after: wait for wait in plan.waits_of(stage)}
    when = []
    for after in range(-1, len(planned)):
        before_mhz = planned[after].frequency_mhz if after >= 0 else None
        next_mhz = planned[after + 1].frequency_mhz if after + 1 < len(planned) else None
        if after in own:
            wait = own[after]
            if wait.frequency_mhz != before_mhz:
                when.append(wait.start_s)
            if wait.frequency_mhz != next_mhz:
                when.append(wait.finish_s - latency_s)
        elif None not in (before_mhz, next_mhz) and before_mhz != next_mhz:
            when.append(planned[after + 1].start_s)
    return when


@pytest.mark.many
@examples(20)
@given(
    waiting_jobs(max_stages=3, max_microbatches=3, max_clocks=4),
    st.floats(0, 0.6),
    LATENCIES_S,
    st.one_of(st.none(), st.integers(0, 6)),
    st.sampled_from([0.0, 0.01, 0.1, 0.5]),
)
def test_limits_on_clock_changes_are_kept_by_waits_too(
    job: Job, slowdown: float, latency_s: float, most: int | None, dwell_s: float
) -> None:
    plan = planner_of(job, latency_s).plan(Target.slowdown(slowdown), ChangeLimits(most, dwell_s))
    for stage in range(len(plan.stages)):
        if most is not None:
            assert plan.clock_changes(stage) <= most
        when = changes_of(plan, stage, latency_s)
        # What the instructions alone do is held by tests of the limits; here a wait is one of the two.
        assert all(later - one >= dwell_s * (1 - 1e-6) for one, later in itertools.pairwise(when))


def a100_like(stages: int) -> Profile:
    watts = {1400: 100.0, 1200: 70.0, 1000: 66.0, 800: 66.0, 600: 66.0}
    return with_power(bundled_profile(stages), [watts] * stages)


def test_the_last_stage_waits_low_at_both_ends_of_an_iteration() -> None:
    graph = build_graph(one_f_one_b(4, 8))
    planner = Planner(graph, a100_like(4), blocking_power_w=90.0, switch_latency_s=0.005)
    plan = planner.plan(Target.slowdown())
    first, *_, last = plan.waits_of(3)
    assert (first.after, last.after) == (-1, len(plan.stages[3]) - 1)
    # Of those that take least the highest, and no further than needed.
    assert {first.frequency_mhz, last.frequency_mhz} == {1000}
    assert plan.saving > Planner(graph, a100_like(4), blocking_power_w=90.0).plan(Target.slowdown()).saving + 0.005


def test_the_clock_is_back_before_the_end_of_the_batch() -> None:
    streams = [[*stream, Constant("step", collective=True)] for stream in one_f_one_b(2, 3)]
    graph = build_graph(streams, {(stage, "step"): 0.04 for stage in range(2)})
    planner = Planner(graph, a100_like(2), blocking_power_w=90.0, switch_latency_s=0.005)
    plan = planner.plan(Target.slowdown())
    assert plan.waits_of(1)[-1].after == 5
    assert plan.waits_of(1)[-1].start_s == plan.stages[1][-1].finish_s
    assert plan.waits_of(1)[-1].finish_s == pytest.approx(plan.iteration_time_s - 0.04)


def test_work_that_is_no_wait_comes_before_the_wait() -> None:
    streams = [[*stream, Constant("step")] for stream in one_f_one_b(2, 3)]
    graph = build_graph(streams, {(stage, "step"): 0.04 for stage in range(2)})
    planner = Planner(graph, a100_like(2), blocking_power_w=90.0, switch_latency_s=0.005)
    plan = planner.plan(Target.slowdown())
    assert plan.waits_of(1)[-1].start_s == pytest.approx(plan.stages[1][-1].finish_s + 0.04)
    assert plan.waits_of(1)[-1].finish_s == pytest.approx(plan.iteration_time_s)


def test_work_at_the_end_that_nobody_has_timed_is_taken_for_no_wait() -> None:
    streams = [[*stream, Constant("step", collective=True)] for stream in one_f_one_b(4, 8)]
    last = 15  # of stage 3, which is done early
    for times_s, lowered in (({}, False), ({(stage, "step"): 0.01 for stage in range(4)}, True)):
        graph = build_graph(streams, times_s)
        plan = Planner(graph, a100_like(4), blocking_power_w=0.0, switch_latency_s=0.005).plan(Target.slowdown())
        assert (last in [wait.after for wait in plan.waits_of(3)]) == lowered
        assert -1 in [wait.after for wait in plan.waits_of(3)]
    # What is there once is known where iterations were measured.
    plan = Planner(build_graph(streams, end_s=0.01), a100_like(4), blocking_power_w=0.0, switch_latency_s=0.005).plan(
        Target.slowdown()
    )
    assert last in [wait.after for wait in plan.waits_of(3)]


def test_a_difference_that_is_not_worth_a_change_is_left_alone() -> None:
    nearly_even = with_power(bundled_profile(3), [{c: 66.0 + c / 1000 for c in (1400, 1200, 1000, 800, 600)}] * 3)
    planner = Planner(build_graph(one_f_one_b(3, 4)), nearly_even, blocking_power_w=90.0, switch_latency_s=0.005)
    assert planner.plan(Target.slowdown()).waits == ()


def test_where_waiting_takes_the_same_at_every_clock_no_clock_is_lowered() -> None:
    graph = build_graph(one_f_one_b(3, 6))
    even = Planner(graph, bundled_profile(3), blocking_power_w=60.0, switch_latency_s=0.005).plan(Target.slowdown())
    assert even == Planner(graph, bundled_profile(3), blocking_power_w=60.0).plan(Target.slowdown())
    assert even.waits == ()


def test_an_instruction_keeps_its_measured_energy() -> None:
    rows = (Measurement(1400, 0.1, 30.0, blocking_power_w=100.0), Measurement(700, 0.15, 30.0, blocking_power_w=50.0))
    profile = Profile({(0, "forward"): rows, (0, "backward"): rows})
    planner = Planner(build_graph(one_f_one_b(1, 1)), profile, blocking_power_w=0.0)
    assert planner.problem.blocking_power_w.tolist() == [50.0]
    assert planner.plan(Target.deadline(0.2)).energy_j == pytest.approx(60.0)


@settings(max_examples=40)
@given(waiting_jobs(), st.floats(0, 0.3))
def test_a_replay_of_iterations_as_profiled_takes_what_the_plan_promises(job: Job, slowdown: float) -> None:
    planner = planner_of(job, 0.0)
    plan, problem = rounded(planner, slowdown), planner.problem
    replayed = Replay(problem, problem.full_clock_s[None, None])
    outcome = replayed.under(clocks_of(plan, problem.graph), None, plan.wait_clocks_mhz)
    assert outcome.energy_j[0] == pytest.approx(plan.energy_j, rel=1e-9)
    assert replayed.at_full_clocks.energy_j[0] == pytest.approx(plan.baseline_energy_j, rel=1e-9)


@pytest.mark.many
@examples(30)
@given(waiting_jobs(), LATENCIES_S, st.integers(0, 100), st.floats(0, 0.3))
def test_iterations_that_vary_take_no_more_with_waits_at_lower_clocks(
    job: Job, latency_s: float, seed: int, sigma: float
) -> None:
    planner = planner_of(job, latency_s)
    plan, problem = rounded(planner, 0.05), planner.problem
    factors = np.exp(sigma * np.random.default_rng(seed).standard_normal((3, 2, len(problem.graph))))
    replayed = Replay(problem, problem.full_clock_s * factors, latency_s=latency_s)
    clocks = clocks_of(plan, problem.graph)
    low, alone = replayed.under(clocks, None, plan.wait_clocks_mhz), replayed.under(clocks)
    assert (low.energy_j <= alone.energy_j * (1 + 1e-9)).all()


def test_the_clock_is_back_for_the_shortest_wait_of_late() -> None:
    graph = build_graph(one_f_one_b(2, 1))
    planner = Planner(graph, a100_like(2), blocking_power_w=0.0, switch_latency_s=0.005)
    plan, problem = planner.plan(Target.slowdown()), planner.problem
    (mid,) = (wait for wait in plan.waits_of(0) if wait.after == 0)
    assert mid.frequency_mhz == 1000
    # In one of two iterations stage 1 is quick, and stage 0 waits for half as long.
    factors = np.ones((2, 1, len(graph)))
    factors[0, 0, np.flatnonzero(graph.stage == 1)] = 0.5
    clocks = problem.full_clocks.frequency_mhz
    replayed = Replay(problem, problem.full_clock_s * factors, latency_s=0.005)
    saved = replayed.at_full_clocks.energy_j - replayed.under(clocks, None, (((0, 1000),), ())).energy_j
    shortest_s = 0.5 * problem.full_clock_s[graph.stage == 1].sum()
    assert saved == pytest.approx([(100.0 - 66.0) * (shortest_s - 0.005)] * 2)


STREAMS = [[*stream, Constant("step", collective=True)] for stream in one_f_one_b(3, 6)]


def request(**changes: Any) -> PlanRequest:
    constants = {(stage, "step"): 0.01 for stage in range(3)}
    wanted = PlanRequest("1F1B", STREAMS, constants, a100_like(3), [90.0] * 3, margin=0.01, latency_s=0.005)
    return PlanRequest.from_dict(json.loads(json.dumps(replace(wanted, **changes).to_dict())))


def plan_of(answer: PlanAnswer) -> Plan:
    assert answer.plan is not None
    return answer.plan


def samples(sigma: float) -> Samples:
    problem = planner_for(request()).problem
    rng = np.random.default_rng(0)
    iterations = []
    for _ in range(12):
        took = problem.full_clock_s * np.exp(sigma * rng.standard_normal(len(problem.graph)))
        own = [[node for node in nodes.tolist() if problem.class_of[node] >= 0] for nodes in problem.graph.stage_nodes]
        iterations.append((tuple(tuple(took[nodes].tolist()) for nodes in own),))
    return Samples(tuple(iterations))


@pytest.mark.parametrize("changes", [{"lower_while_waiting": False}, {"latency_s": None}])
def test_no_clock_is_lowered_where_that_is_off_or_the_latency_unknown(changes: dict[str, Any]) -> None:
    low, alone = plan_of(answer_to(request())), plan_of(answer_to(request(**changes)))
    assert low.waits_of(2)
    assert alone.waits == ()
    assert low.energy_j < alone.energy_j


def test_what_is_promised_of_measured_iterations_counts_waits() -> None:
    steady = samples(0.0)
    low, alone = answer_to(request(samples=steady)), answer_to(request(samples=steady, lower_while_waiting=False))
    assert low.replayed is not None
    assert alone.replayed is not None
    assert low.replayed.saving_mean == pytest.approx(plan_of(low).saving, abs=0.004)
    assert low.replayed.saving_mean > alone.replayed.saving_mean + 0.005


def test_a_plan_in_force_is_judged_with_its_waits() -> None:
    made = answer_to(request(samples=samples(0.0)))
    plan = plan_of(made)
    clocks = tuple(tuple(plan.clocks_mhz(stage)) for stage in range(3))
    known = InForce(clocks, (), 0.01, 0.0, plan.wait_clocks_mhz)
    again = answer_to(request(samples=samples(0.0), in_force=known))
    assert again.plan is None, "it is as good as another"
    assert again.held is not None
    assert made.replayed is not None
    assert again.held.saving_mean == pytest.approx(made.replayed.saving_mean)


def test_where_no_slower_instruction_keeps_the_time_waits_are_still_spent_low() -> None:
    made = answer_to(request(samples=samples(0.6)))
    plan = plan_of(made)
    assert {clock for stage in range(3) for clock in plan.clocks_mhz(stage)} == {1400}
    assert plan.waits_of(2)
    assert made.replayed is not None
    assert (made.replayed.kept, made.replayed.obstacle) == (True, "")
    assert made_again(request(samples=samples(0.6)), made) == plan
    assert made.replayed.saving_mean > 0.001
    without = answer_to(request(samples=samples(0.6), lower_while_waiting=False))
    assert plan_of(without).waits == ()
    assert made_again(request(samples=samples(0.6), lower_while_waiting=False), without) == plan_of(without)
    assert without.replayed is not None
    assert without.replayed.obstacle


def test_what_an_answer_to_stragglers_takes_counts_waits() -> None:
    wanted = PaceRequest(((1.0,) * 3, (1.0, 1.3, 1.0)), tuple((1400,) * 12 for _ in range(3)))
    pace = answer_to(request(margin=0.0, pace=wanted)).pace
    assert pace is not None
    for variant in pace.variants:
        assert variant.plan is not None
        assert any(variant.plan.waits)
        assert variant.energy_j == pytest.approx(variant.plan.energy_j)


def test_what_is_known_of_a_plan_counts_waits() -> None:
    exact = Profile.from_rows(
        (stage, kind, replace(row, time_se_s=1e-9 * row.time_s, energy_se_j=1e-6 * row.energy_j))
        for stage, kind, row in a100_like(3).rows()
    )
    plan = plan_of(answer_to(request(profile=exact, margin=0.0, blocking_power_se_w=0.0)))
    assert plan.waits
    assert plan.confidence is not None
    assert plan.confidence.saving == pytest.approx((plan.saving, plan.saving), abs=1e-5)
