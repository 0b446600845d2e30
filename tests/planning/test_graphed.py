"""Plans whose clocks change by host time, against the same plans by instruction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.graphed import (
    Jitter,
    Replayer,
    Replays,
    choose_by_time,
    jitter_of,
    phases_of,
    replays,
    worth,
)
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.process import answer_to, by_time, plan_for
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import ChangeLimits, Target
from perseus_plugin.profiling.profile import Profile
from tests.examples import examples
from tests.planning.jobs import bundled_profile

# One process makes the plan for all tests of this file.
pytestmark = pytest.mark.xdist_group("plans by host time")

STAGES, MICROBATCHES = 4, 5


@pytest.fixture(scope="module")
def planner() -> Planner:
    graph = build_graph(one_f_one_b(STAGES, MICROBATCHES))
    return Planner(graph, bundled_profile(STAGES), blocking_power_w=60.0)


@pytest.fixture(scope="module")
def plan(planner: Planner) -> Plan:
    return planner.plan(Target.slowdown(0.0), ChangeLimits(max_changes=3))


def test_phases_are_runs_of_one_clock(plan: Plan) -> None:
    for stage, planned in enumerate(plan.stages):
        part = phases_of(plan, stage)
        assert part is not None
        assert all(a != b for a, b in zip(part.clocks_mhz, part.clocks_mhz[1:], strict=False))
        for one in planned:
            at = max(number for number, start_s in enumerate(part.starts_s) if start_s <= one.start_s)
            assert part.clocks_mhz[at] == one.frequency_mhz
        assert (part.end_s, part.iteration_s) == (planned[-1].finish_s, plan.iteration_time_s)


def test_without_jitter_nearly_all_of_a_plan_is_left_and_no_time_is_lost(planner: Planner, plan: Plan) -> None:
    found = replays(planner.problem, plan, 0.0, 0.0)
    assert (found.full_s, found.full_j) == pytest.approx((plan.baseline_time_s, plan.baseline_energy_j))
    assert found.slowdown <= 1e-6
    assert 0.8 * plan.saving < found.saving <= plan.saving + 1e-6


def test_jitter_costs_energy_before_it_costs_time(planner: Planner, plan: Plan) -> None:
    found = [replays(planner.problem, plan, 0.005, jitter) for jitter in (0.0, 0.01, 0.05)]
    assert [one.saving for one in found] == sorted((one.saving for one in found), reverse=True)
    assert found[-1].saving > 0
    assert all(one.slowdown < 0.01 for one in found)


def test_the_same_seed_draws_the_same(planner: Planner, plan: Plan) -> None:
    def drawn(seed: int) -> Replays:
        return replays(planner.problem, plan, 0.005, 0.02, seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_at_full_clocks_there_is_nothing_to_save(planner: Planner) -> None:
    full = planner.plan_of(planner.full_clocks(planner.solve(Target.slowdown(0.0))))
    assert replays(planner.problem, full, 0.005, 0.02).saving == pytest.approx(0.0, abs=1e-12)


def request_of(jitter: float, max_changes: int | None = None, stages: int = 2, microbatches: int = 3) -> PlanRequest:
    return PlanRequest(
        schedule="1f1b",
        streams=one_f_one_b(stages, microbatches),
        constant_time_s={},
        profile=bundled_profile(stages),
        blocking_power_w=[60.0] * stages,
        max_changes=max_changes,
        latency_s=0.005,
        lower_while_waiting=False,
        search=False,
        jitter=(jitter, jitter),
    )


@pytest.mark.many
@examples(3)
@given(st.floats(0.0, 0.1), st.sampled_from([None, 6, 3]))
def test_what_is_chosen_is_never_predicted_worse_than_the_fixed_number(jitter: float, max_changes: int | None) -> None:
    request = request_of(jitter, max_changes)
    chosen, plan = by_time(request)
    fixed = plan_for(replace(request, jitter=None))
    graph = build_graph(request.streams)
    problem = Planner(graph, request.profile, blocking_power_w=60.0).problem
    replayer = Replayer(problem, 0.005, Jitter(jitter, jitter))
    assert plan is not None
    assert worth(replayer.under(plan), 0.0) >= worth(replayer.under(fixed), 0.0)
    assert chosen.max_changes is None or max_changes is None or chosen.max_changes <= max_changes
    assert chosen.jitter is None


def test_where_durations_vary_time_is_kept(planner: Planner, plan: Plan) -> None:
    replayer = Replayer(planner.problem, 0.005, Jitter(0.03, 0.03))
    before = replayer.under(plan)
    chosen, made = by_time(request_of(0.03, 3, STAGES, MICROBATCHES))
    assert made is not None
    assert before.slowdown > 0.002
    assert replayer.under(made).slowdown < before.slowdown
    assert chosen.margin > 0


def test_a_plan_for_a_graph_is_made_again_of_what_is_kept_of_it() -> None:
    request = request_of(0.03, 6)
    told = answer_to(request)
    kept = replace(request, overheads=told.overheads, made=told.made).as_made()
    assert kept.jitter is None
    assert told.plan is not None
    assert plan_for(kept).stages == told.plan.stages


def test_of_plans_that_are_worth_the_same_the_given_one_is_kept(planner: Planner, plan: Plan) -> None:
    replayer = Replayer(planner.problem, 0.0, Jitter(0.0, 0.0))
    assert choose_by_time(lambda margin, changes: plan, replayer, 0.0, 0.01, 8) == (0.01, 8)


def test_the_jitter_is_that_of_the_profile_at_full_clocks() -> None:
    known = bundled_profile(2)
    rows = [
        (stage, kind, replace(row, spread_within=0.03 + 0.01 * stage if row is known.table[stage, kind][0] else 0.5))
        for stage, kind, row in known.rows()
    ]
    found = jitter_of(Profile.from_rows(rows))
    assert found is not None
    assert found == pytest.approx((math.sqrt((0.03**2 + 0.04**2) / 2), 0.0))
    assert jitter_of(bundled_profile(2)) is None
