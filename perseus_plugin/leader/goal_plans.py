"""Plans for the goals that a job has had, so that it is back at one of them at once. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from perseus_plugin.iteration.replayed import InForce, Replayed
from perseus_plugin.leader.target_book import Goal
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.request import PlanRequest

_GOALS_KEPT = 32


@dataclass(frozen=True)
class MadePlan:
    """A plan on the shelf with what it was made for.

    Attributes:
        number: on the shelf.
        request: it answers.
        replayed: what measured iterations made of it.
        in_force: what newer iterations are held against.
        uniform: one clock for all, within the goal's limit, or else the lowest; None: it has none.
    """

    number: int
    request: PlanRequest
    replayed: Replayed | None
    in_force: InForce | None
    uniform: Plan | None = None


class GoalPlans:
    """Per goal, the plan of each schedule; those of goals that were not wanted for long make room."""

    def __init__(self) -> None:
        self._made: OrderedDict[Goal, dict[str, MadePlan]] = OrderedDict()

    def copy(self) -> GoalPlans:
        """One that changes by itself."""
        made = GoalPlans()
        made._made = OrderedDict((goal, dict(plans)) for goal, plans in self._made.items())
        return made

    def put(self, goal: Goal, schedule: str, made: MadePlan) -> list[int]:
        """A plan was made; returns numbers of plans that are not kept any more."""
        self._made.setdefault(goal, {})[schedule] = made
        self._made.move_to_end(goal)
        if len(self._made) <= _GOALS_KEPT:
            return []
        _, gone = self._made.popitem(last=False)
        return [one.number for one in gone.values()]

    def of(self, goal: Goal) -> Mapping[str, MadePlan]:
        """The plans there are for a goal, by schedule; it is wanted now."""
        if goal in self._made:
            self._made.move_to_end(goal)
        return self._made.get(goal, {})

    def missing(self, goal: Goal, schedules: Collection[str]) -> list[str]:
        """Those of these schedules that have no plan for a goal."""
        return [schedule for schedule in schedules if schedule not in self._made.get(goal, {})]

    def take_out(self, schedule: str) -> list[int]:
        """This schedule has no plan any more; returns the numbers of those it had."""
        gone = [plans.pop(schedule) for plans in self._made.values() if schedule in plans]
        return [one.number for one in gone]

    def clear(self) -> list[int]:
        """What they were made on does not hold any more; returns the numbers of all there were."""
        gone = [one.number for plans in self._made.values() for one in plans.values()]
        self._made.clear()
        return gone
