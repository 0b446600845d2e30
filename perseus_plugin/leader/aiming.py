"""From what the job is to aim at to the next thing to be done for it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from perseus_plugin.leader.state import JobState, Phase
from perseus_plugin.leader.target_book import Goal
from perseus_plugin.planning.targets import Target

FULL_CLOCKS = Goal(Target.full())


@dataclass(frozen=True)
class PlanAtFirst:
    """There are no plans yet: those to come are for this goal."""

    goal: Goal


@dataclass(frozen=True)
class PlanFor:
    """A plan of this schedule is missing for this goal."""

    schedule: str
    goal: Goal


@dataclass(frozen=True)
class GoOver:
    """All ranks go over to this goal; its plans are there."""

    goal: Goal


@dataclass(frozen=True)
class Stay:
    """What is aimed at is in force."""


@dataclass(frozen=True)
class Wait:
    """Nothing can be done now."""


Move: TypeAlias = PlanAtFirst | PlanFor | GoOver | Stay | Wait


def next_move(state: JobState) -> Move:
    """What to do next, so that the job comes to what its book of targets says."""
    goal, phase = state.targets.goal, state.phase
    if phase in (Phase.MEASURING, Phase.PLANNING, Phase.RECHECKING):
        return PlanAtFirst(state.goal if goal.is_full else goal)
    if phase is Phase.GIVEN_UP or goal == state.unplannable:
        return Wait()
    if goal == (FULL_CLOCKS if state.at_full else state.goal):
        return Stay()
    if goal.is_full:
        return GoOver(goal)
    missing = state.goal_plans.missing(goal, state.plans.schedules)
    return PlanFor(missing[0], goal) if missing else GoOver(goal)
