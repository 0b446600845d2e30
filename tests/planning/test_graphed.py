"""Plans whose clocks change by host time, against the same plans by instruction."""

from __future__ import annotations

import pytest

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.graphed import Replays, phases_of, replays
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.targets import ChangeLimits, Target
from tests.planning.jobs import bundled_profile

# One process makes the plan for all tests of this file.
pytestmark = pytest.mark.xdist_group("plans by host time")

STAGES, MICROBATCHES = 4, 8


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
