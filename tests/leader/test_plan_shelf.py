from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.planning.plan import Plan, PlannedWait
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanRequest
from tests.factories import BLOCKING_W, profile, stream_of


@pytest.fixture(scope="module")
def plan() -> Plan:
    streams = [stream_of(2, 2)(stage) for stage in range(2)]
    return plan_for(PlanRequest("A", streams, {}, profile(2), [BLOCKING_W] * 2))


def test_a_plan_that_takes_anothers_place_leaves_nothing_of_it_behind(plan: Plan) -> None:
    shelf = PlanShelf(2)
    told: list[int] = []
    for _ in range(20):
        shelf.put("A", plan, profile(2))
        made = shelf.set_with()
        assert [parts.version for parts in made.parts] == [made.version] * 2, "for both stages"
        told.append(made.version)
        for version in shelf.tidy(told[-2:]):
            told.remove(version)
    assert told == [19, 20], "the one before is followed until the newest holds"
    gc.collect()
    kept = [one for one in gc.get_referrers(plan) if type(one).__name__ == "_Kept"]
    assert len(kept) == 2


def test_ranks_are_told_where_in_the_gap_between_instructions_a_wait_lies(plan: Plan) -> None:
    first, second = plan.stages[1][0], plan.stages[1][-1]
    waits = (
        PlannedWait(-1, 705, 0.001, first.start_s - 0.0005),
        PlannedWait(len(plan.stages[1]) - 1, 810, second.finish_s, plan.iteration_time_s - 0.002),
    )
    shelf = PlanShelf(2)
    shelf.put("A", replace(plan, waits=((), waits)), profile(2))
    none, (before, after) = (parts.parts[0].waits for parts in shelf.set_with().parts)
    assert none == ()
    assert (before.after, before.frequency_mhz) == (-1, 705)
    assert (before.work_before_s, before.work_after_s) == pytest.approx((0.001, 0.0005))
    assert before.duration_s == pytest.approx(first.start_s - 0.0015)
    assert (after.after, after.frequency_mhz, after.work_before_s) == (len(plan.stages[1]) - 1, 810, 0.0)
    assert after.work_after_s == pytest.approx(0.002)


def test_the_work_behind_a_wait_for_a_straggler_is_known(plan: Plan) -> None:
    until_s = 2 * plan.iteration_time_s
    last = plan.stages[1][-1]
    waits = (PlannedWait(len(plan.stages[1]) - 1, 810, last.finish_s, until_s - 0.002),)
    shelf = PlanShelf(2)
    shelf.put("A", replace(plan, waits=((), waits), waits_until_s=until_s), profile(2))
    assert shelf.set_with().parts[1].parts[0].waits[0].work_after_s == pytest.approx(0.002)


def test_a_stand_in_for_a_plan_in_force_stays(plan: Plan) -> None:
    shelf = PlanShelf(2)
    shelf.put("A", plan, profile(2))
    stand_in = shelf.keep("A", plan, profile(2), (1.0, 1.2))
    made = shelf.set_with(stand_in)
    assert shelf.tidy([]) == []
    again = shelf.set_with(stand_in)
    assert (again.version, again.parts) == (made.version, ()), "it has been told"


def test_a_copy_changes_by_itself(plan: Plan) -> None:
    shelf = PlanShelf(2)
    shelf.put("A", plan, profile(2))
    first = shelf.set_with()
    copy = shelf.copy()
    copy.put("B", plan, profile(2))
    assert copy.set_with().version == 2
    copy.take_out("A")
    assert (shelf.schedules, copy.schedules) == (["A"], ["B"])
    assert shelf.set_with().version == first.version
