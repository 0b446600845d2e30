from __future__ import annotations

import pytest

from perseus_plugin.exchange.messages import BatchPart, PlanPart, PlanParts
from perseus_plugin.exchange.parts import Parts, batch_part, part_for, with_batch, with_newest, with_own_plan
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock
from tests.factories import record

SCHEDULE = "1F1B"


def of_set(version: int) -> PlanParts:
    part = PlanPart(version=version, schedule=SCHEDULE, clocks_mhz=(900,), times_s=(0.1,))
    return PlanParts(version=version, parts=(part,))


def of_batch(iteration: int, base: int = 1) -> BatchPart:
    return BatchPart(
        version=0,
        schedule=SCHEDULE,
        clocks_mhz=(1200,),
        times_s=(0.3,),
        iteration=iteration,
        base=base,
        pace_s=0.6,
        usual_s=0.2,
    )


def at_hand(*iterations: int) -> Parts:
    parts = with_newest({}, of_set(1))
    for iteration in iterations:
        parts = with_batch(parts, of_batch(iteration))
    return parts


def test_an_iteration_follows_the_plan_for_its_own_batch() -> None:
    parts, seen = at_hand(7), record(7)
    directive = with_own_plan(Follow(1), parts, seen)
    assert directive == Follow(1, batch=True)
    assert directive.identity == Follow(1).identity  # it ends at full clocks, as all others under a plan
    assert part_for(parts, directive, seen) == of_batch(7)


@pytest.mark.parametrize(
    "directive", [Follow(2), Follow(1, straggler=True), Follow(1, limited=True), FullClock("a reference")]
)
def test_made_beside_another_plan_it_does_not_hold(directive: Directive) -> None:
    assert with_own_plan(directive, at_hand(7), record(7)) == directive


def test_others_follow_the_plan_in_the_set() -> None:
    parts, seen = at_hand(7), record(8)
    assert with_own_plan(Follow(1), parts, seen) == Follow(1)
    part = part_for(parts, Follow(1), seen)
    assert part is not None
    assert part.clocks_mhz == (900,)
    assert with_own_plan(Follow(1), parts, record(7, schedule="GPipe")) == Follow(1)


def test_newer_sets_and_batches_leave_each_other_alone() -> None:
    parts = at_hand(*range(100))
    for version in range(2, 8):
        parts = with_newest(parts, of_set(version))
    assert sorted({version for version, _ in parts if version >= 0}) == [4, 5, 6, 7]
    assert batch_part(parts, record(99)) is not None
    assert batch_part(parts, record(68)) is not None
    assert batch_part(parts, record(60)) is None


def test_of_batches_far_apart_those_are_kept_that_are_still_to_run() -> None:
    parts = at_hand(*range(0, 900, 30))
    assert all(batch_part(parts, record(number)) is not None for number in range(0, 900, 30))
