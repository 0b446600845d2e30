"""A request with a limit beside its target: the target is followed as far as that keeps the limit."""

from __future__ import annotations

import dataclasses

import pytest

from perseus_plugin.errors import PlanError
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.power.budget import GroupBudget, Peaks, PowerBudget
from perseus_plugin.planning.process import answer_to
from perseus_plugin.planning.request import PaceRequest, PlanAnswer, PlanRequest
from perseus_plugin.planning.targets import Target
from tests.factories import BLOCKING_W, CLOCKS_MHZ, profile, stream_of

STAGES, MICROBATCHES, PIPELINES = 3, 4, 2
STAGE_OF = [stage for stage in range(STAGES) for _ in range(PIPELINES)]


def request(target: Target, limit: PowerBudget | None = None) -> PlanRequest:
    streams = [stream_of(STAGES, MICROBATCHES)(stage) for stage in range(STAGES)]
    placed = None if limit is None else limit.placed(STAGE_OF, 2)
    return PlanRequest("A", streams, {}, profile(STAGES), [BLOCKING_W] * STAGES, target, margin=0.01, limit=placed)


def planned(target: Target, limit: PowerBudget | None = None) -> Plan:
    plan = answer_to(request(target, limit)).plan
    assert plan is not None
    return plan


FULL = planned(Target.full())
FULL_W = PIPELINES * FULL.power_w


@pytest.mark.parametrize("target", [Target.slowdown(0.0), Target.slowdown(0.1), Target.cheapest(), Target.full()])
def test_a_target_that_keeps_the_limit_is_planned_for_as_without_it(target: Target) -> None:
    assert planned(target, PowerBudget(1.01 * FULL_W)) == planned(target)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.65])
@pytest.mark.parametrize("target", [Target.slowdown(0.0), Target.slowdown(0.05), Target.full()])
def test_one_that_draws_more_is_as_fast_as_the_limit_allows(target: Target, share: float) -> None:
    wished, within = planned(target), planned(target, PowerBudget(share * FULL_W))
    assert PIPELINES * within.power_w <= share * FULL_W * (1 + 1e-9)
    if PIPELINES * wished.power_w <= share * FULL_W:
        assert within == wished
    else:
        assert within.iteration_time_s >= wished.iteration_time_s * (1 - 1e-9)
        assert within.power is not None


@pytest.mark.parametrize(
    "limit",
    [
        PowerBudget(groups=(GroupBudget("first", "0-1", 1.0),)),
        PowerBudget(peaks=Peaks(window_s=0.05, job_w=0.8 * FULL_W)),
    ],
)
def test_groups_and_peaks_bind_too(limit: PowerBudget) -> None:
    if limit.groups:
        limit = dataclasses.replace(limit, groups=(GroupBudget("first", "0-1", 0.8 * FULL_W / STAGES),))
    within = planned(Target.full(), limit)
    assert within != FULL
    assert within.power is not None
    assert all(one.planned_w <= one.allowed_w * (1 + 1e-9) for one in within.power.budgets)


def test_there_is_one_clock_for_all_within_the_limit_to_fall_back_to() -> None:
    answer = answer_to(request(Target.slowdown(), PowerBudget(0.8 * FULL_W)))
    assert PlanAnswer.from_dict(answer.to_dict(), 0.0).uniform == answer.uniform
    assert answer.uniform is not None
    (clock,) = {clock for stage in range(STAGES) for clock in answer.uniform.clocks_mhz(stage)}
    assert clock < max(CLOCKS_MHZ)
    assert PIPELINES * answer.uniform.power_w <= 0.8 * FULL_W
    assert answer.plan is not None
    assert answer.plan.iteration_time_s <= answer.uniform.iteration_time_s * (1 + 1e-9)
    assert answer_to(request(Target.slowdown())).uniform is None


def test_a_limit_that_nothing_keeps_is_refused_with_the_lowest() -> None:
    with pytest.raises(PlanError, match="power budget"):
        answer_to(request(Target.slowdown(), PowerBudget(0.1 * FULL_W)))


@pytest.mark.parametrize("share", [1.01, 0.8, 0.65])
def test_the_pace_of_a_straggler_keeps_the_limit(share: float) -> None:
    limit = PowerBudget(share * FULL_W)
    within = planned(Target.slowdown(), limit)
    pace = PaceRequest(
        ((1.0,) * STAGES, (1.0, 1.3, 1.0)), tuple(tuple(within.clocks_mhz(stage)) for stage in range(STAGES))
    )
    answer = answer_to(dataclasses.replace(request(Target.slowdown(), limit), pace=pace)).pace
    free = answer_to(dataclasses.replace(request(Target.slowdown()), pace=pace)).pace
    assert answer is not None
    assert free is not None
    assert answer.pace_s >= free.pace_s * (1 - 1e-9), "slower where that is needed"
    for variant in answer.variants:
        assert PIPELINES * variant.energy_j / answer.pace_s <= share * FULL_W * (1 + 1e-9)


def test_a_request_with_a_limit_passes_through_json() -> None:
    made = request(Target.slowdown(0.1), PowerBudget(100.0, groups=(GroupBudget("a", "0-1", 5.0),)))
    again = PlanRequest.from_dict(made.to_dict())
    assert (again.limit, again.target) == (made.limit, made.target)
