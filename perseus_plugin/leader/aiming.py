"""From what the job is to aim at to the next thing to be done for it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from perseus_plugin.leader.state import JobState, Phase, Rules
from perseus_plugin.leader.target_book import Goal
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Target

_PROGRESS = 1e-3  # of the way, for a step to be one
_STEPS_AT_MOST = 10**9  # where power was never changed, or may change at once
LEAST_STEP_S = 1.0
"""From one step of a ramp to the next."""

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


def next_move(state: JobState, rules: Rules) -> Move:
    """What to do next, so that the job comes to what its book of targets says."""
    goal, phase = state.aimed, state.phase
    if phase in (Phase.MEASURING, Phase.PLANNING, Phase.RECHECKING):
        return PlanAtFirst(state.goal if goal.is_full else goal)
    if phase is Phase.GIVEN_UP or goal == state.unplannable:
        return Wait()
    if goal == (FULL_CLOCKS if state.at_full else state.goal):
        return Stay()
    missing = [] if goal.is_full else state.goal_plans.missing(goal, state.plans.schedules)
    if missing:
        return PlanFor(missing[0], goal)
    return GoOver(goal) if rules.config.ramp_w_per_s is None else _ramped(goal, rules.config.ramp_w_per_s, state, rules)


def _ramped(goal: Goal, ramp_w_per_s: float, state: JobState, rules: Rules) -> Move:
    """Go over to a goal that there are plans for, or a step towards it."""
    steps = math.floor(min((state.now_s - state.stepped_s) / LEAST_STEP_S, _STEPS_AT_MOST))
    if steps < 1:
        return Wait()
    before_w, after_w = power_w(FULL_CLOCKS if state.at_full else state.goal, state, rules), power_w(goal, state, rules)
    reach_w = ramp_w_per_s * LEAST_STEP_S * steps
    if before_w is None or after_w is None or abs(after_w - before_w) <= reach_w:
        return GoOver(goal)
    # A plan may draw less than its budget: it waits until that is not too fast.
    farthest = Goal(Target.full(), PowerBudget(before_w + (reach_w if after_w > before_w else -reach_w)))
    # The one that is planned for already, and where that leads nowhere, as plans are too few, one that goes farther.
    for step in (farthest if state.step is None else state.step, farthest):
        missing = state.goal_plans.missing(step, state.plans.schedules)
        if missing:
            return PlanFor(missing[0], step)
        step_w = power_w(step, state, rules)
        if step_w is not None and (step_w - before_w) / (after_w - before_w) > _PROGRESS:
            return GoOver(step) if abs(step_w - before_w) <= reach_w else Wait()
    return Wait()


def power_w(goal: Goal, state: JobState, rules: Rules) -> float | None:
    """Average power of all GPUs under the plan of the usual schedule for a goal; None: there is no such plan."""
    if state.plan is None:
        return None
    if goal.is_full:
        return rules.pipelines * state.plan.baseline_energy_j / state.plan.baseline_time_s
    made = state.goal_plans.of(goal).get(state.plan.schedule)
    if made is None:
        return None
    plan = state.plans.numbered(made.number)
    return rules.pipelines * plan.energy_j / plan.iteration_time_s
