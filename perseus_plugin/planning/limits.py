"""Plans with few clock changes."""

from __future__ import annotations

from perseus_plugin.pipeline import IntArray
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.relaxation import Relaxed
from perseus_plugin.planning.targets import ChangeLimits


def keep_limits(problem: PlanningProblem, relaxed: Relaxed, choice: IntArray, limits: ChangeLimits) -> IntArray:
    return choice
