"""What a job aims at, as figures for monitors. Pure."""

from __future__ import annotations

import math

from perseus_plugin.leader.aiming import FULL_CLOCKS
from perseus_plugin.leader.state import JobState, Phase
from perseus_plugin.leader.target_book import Goal
from perseus_plugin.reporting.live.power import Drawn

WISHES = ("slowdown", "deadline", "cheapest", "money", "full")
"""Kinds of wishes."""


def in_force(state: JobState) -> Goal:
    """The goal whose plans are followed, or are made first."""
    return FULL_CLOCKS if state.at_full else state.goal


def target_figures(state: JobState, drawn: Drawn | None, gpus: int) -> list[tuple[str, float]]:
    """Figures by name; NaN where there is none, so that one that there was goes.

    Args:
        state: of the job.
        drawn: power as measured lately, None: not known.
        gpus: of the whole job.
    """
    followed = state.phase is Phase.FOLLOWING
    goal, aimed = in_force(state), state.aimed
    power_w = math.nan if drawn is None else drawn.power_w
    budget_w = _budget_w(goal, gpus) if followed else math.nan
    slowdown = 0.0 if state.at_full else state.plans.allowed_slowdown
    return [
        ("Perseus/power_w/recent", power_w),
        ("Perseus/power_budget_w/in_force", budget_w),
        ("Perseus/power_budget_w/aimed_at", _budget_w(aimed, gpus)),
        ("Perseus/power_headroom_w", budget_w - power_w),
        ("Perseus/target/allowed_slowdown_percent", 100 * slowdown if followed else math.nan),
        *((f"Perseus/target_in_force/{kind}", float(followed and goal.wish.kind == kind)) for kind in WISHES),
        ("Perseus/target/under_way", float(not followed or goal != aimed)),
        ("Perseus/target/changes", float(state.reigns.changes)),
    ]


def _budget_w(goal: Goal, gpus: int) -> float:
    """What the GPUs may draw together; where a budget is of nodes, what is left to GPUs. NaN: no budget of the job."""
    limit = goal.limit
    return math.nan if limit is None or limit.job_w is None else limit.gpu_w(limit.job_w, gpus)
