from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.pace import plan_pace, slowed
from perseus_plugin.planning.paced import Pace, pace_from_dict, pace_to_dict
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import make_plan
from perseus_plugin.planning.targets import Target
from tests.examples import examples
from tests.factories import BLOCKING_W, CLOCKS_MHZ, profile

STAGES, MICROBATCHES = 3, 6
GRAPH = build_graph(one_f_one_b(STAGES, MICROBATCHES), {})
PROFILE = profile(STAGES)
EVEN = (1.0,) * STAGES


def own_plan(slowdown: float = 0.0) -> Plan:
    return make_plan(GRAPH, PROFILE, blocking_power_w=BLOCKING_W, target=Target.slowdown(slowdown))


def pace(*variants: tuple[float, ...], slowdown: float = 0.0, at_least_s: float = 0.0) -> Pace:
    plan = own_plan(slowdown)
    return plan_pace(
        GRAPH,
        PROFILE,
        variants,
        clocks_mhz=[plan.clocks_mhz(stage) for stage in range(STAGES)],
        blocking_power_w=[BLOCKING_W] * STAGES,
        slowdown=slowdown,
        at_least_s=at_least_s,
    )


def full_clock_s(variant: tuple[float, ...]) -> float:
    plan = make_plan(GRAPH, slowed(PROFILE, variant), blocking_power_w=BLOCKING_W, target=Target.slowdown())
    return plan.baseline_time_s


def test_the_pace_is_that_of_the_slowest_pipeline_at_full_clocks() -> None:
    slow, slower = (1.0, 1.0, 1.2), (1.0, 1.0, 1.4)
    made = pace(EVEN, slow, slower)
    assert made.pace_s == pytest.approx(full_clock_s(slower))
    for variant in made.variants:
        assert variant.plan is not None
        assert variant.plan.iteration_time_s <= made.pace_s * (1 + 1e-9)


def test_the_others_slow_down_and_save() -> None:
    made = pace(EVEN, (1.0, 1.0, 1.25))
    fast = made.variants[0].plan
    assert fast is not None
    assert fast.iteration_time_s > 1.05 * own_plan().iteration_time_s
    assert made.variants[0].energy_j < 0.95 * made.variants[0].without_j
    assert sum(fast.clocks_mhz(1)) < sum(own_plan().clocks_mhz(1))


def test_the_slow_stage_runs_at_full_clock_and_its_neighbours_stop_racing() -> None:
    before = own_plan()
    made = pace((1.0, 1.5, 1.0))
    after = made.variants[0].plan
    assert after is not None
    # The iteration's beginning and end leave even the slowest stage some time.
    assert after.clocks_mhz(1).count(CLOCKS_MHZ[0]) >= len(after.clocks_mhz(1)) - 4
    assert before.clocks_mhz(1).count(CLOCKS_MHZ[0]) < len(after.clocks_mhz(1)) - 4, "it had time to spare before"
    assert sum(after.clocks_mhz(2)) < sum(before.clocks_mhz(2))
    assert made.pace_s < made.without_s, "left alone, the slow stage would have kept its low clocks"
    assert made.variants[0].energy_j < made.variants[0].without_j


def test_a_slow_stage_with_time_to_spare_costs_next_to_no_time() -> None:
    made = pace(EVEN, (1.05, 1.0, 1.0))
    assert own_plan().baseline_time_s < made.pace_s < 1.005 * own_plan().baseline_time_s
    assert made.variants[1].plan is not None
    assert made.variants[1].plan.iteration_time_s <= made.pace_s * (1 + 1e-9)


def test_a_pace_within_the_slowdown_that_is_allowed_anyway_is_kept() -> None:
    made = pace(EVEN, (1.0, 1.0, 1.1), slowdown=0.3)
    assert made.pace_s == pytest.approx(1.3 * own_plan().baseline_time_s)
    assert made.variants[0].plan is None


def test_beyond_what_saves_energy_nobody_gets_slower() -> None:
    far, farther = (pace(EVEN, at_least_s=share * own_plan().baseline_time_s).variants[0].plan for share in (4, 50))
    assert far is not None
    assert farther is not None
    assert farther.iteration_time_s == pytest.approx(far.iteration_time_s)


def test_a_reported_iteration_time_is_planned_for() -> None:
    wanted_s = 1.2 * own_plan().baseline_time_s
    made = pace(EVEN, at_least_s=wanted_s)
    assert made.pace_s == made.without_s == pytest.approx(wanted_s)
    assert made.variants[0].energy_j < made.variants[0].without_j


@pytest.mark.many
@examples(6)
@given(st.lists(st.tuples(*[st.floats(1.0, 2.0)] * STAGES), min_size=1, max_size=3))
def test_no_answer_is_slower_or_dearer_than_none(variants: list[tuple[float, ...]]) -> None:
    made = pace(EVEN, *variants)
    assert made.pace_s <= made.without_s * (1 + 1e-9)
    assert made.pace_s >= max(full_clock_s(variant) for variant in variants) * (1 - 1e-9)
    # Each on its own may take more: a pipeline that ran too slow for the pace has to run faster now.
    if made.pace_s > made.without_s * (1 - 1e-9):
        assert sum(v.energy_j for v in made.variants) <= sum(v.without_j for v in made.variants) * (1 + 1e-3)


@pytest.mark.parametrize("slowdown", [0.0, 0.1])
@pytest.mark.parametrize("variant", [(1.0, 1.0, 1.02), (1.0, 1.2, 1.0)])
def test_asked_for_the_pace_that_was_found_the_answer_is_the_same(variant: tuple[float, ...], slowdown: float) -> None:
    """So what is searched for longer can be held against it."""
    made = pace(EVEN, variant, slowdown=slowdown)
    again = pace(EVEN, variant, slowdown=slowdown, at_least_s=made.pace_s)
    assert again.pace_s == made.pace_s
    assert [(one.plan, one.energy_j) for one in again.variants] == [(one.plan, one.energy_j) for one in made.variants]


def test_through_json_and_back() -> None:
    made = pace(EVEN, (1.05, 1.0, 1.0))
    assert pace_from_dict(pace_to_dict(made)) == made
    with pytest.raises(PlanError, match="pace: not what the planner sends"):
        pace_from_dict({"pace_s": 1.0})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="slowdowns: got"):
        pace((1.0, 1.0))
    with pytest.raises(PlanError, match="slowdowns: got"):
        pace((1.0, 0.9, 1.0))
    with pytest.raises(PlanError, match="clocks: got 1 in stage 0; allowed: one for each of its 12 instructions"):
        plan_pace(GRAPH, PROFILE, [EVEN], clocks_mhz=[[1410]] * STAGES, blocking_power_w=[BLOCKING_W] * STAGES)
    with pytest.raises(PlanError, match="clocks: 7 MHz in stage 0 is not in the profile"):
        plan_pace(GRAPH, PROFILE, [EVEN], clocks_mhz=[[7] * 12] * STAGES, blocking_power_w=[BLOCKING_W] * STAGES)
