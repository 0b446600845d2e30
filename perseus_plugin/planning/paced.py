"""The answer to stragglers: the pace of the job, and a plan per sort of pipeline; `planning.pace` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perseus_plugin.errors import PlanError
from perseus_plugin.planning.plan import Plan, plan_from_json, plan_to_json

Slowdowns = tuple[float, ...]
"""How many times as long the instructions of each stage take, 1.0 for a stage that is not slow."""


@dataclass(frozen=True)
class PacedPlan:
    """What one sort of pipeline does at the pace. Energies are of one GPU per stage, blocking until the end included.

    Attributes:
        plan: None if the job's plan holds as it is.
        energy_j: of an iteration at the pace.
        without_j: of an iteration with the job's plan left as it is.
    """

    plan: Plan | None
    energy_j: float
    without_j: float


@dataclass(frozen=True)
class Pace:
    """The answer to stragglers.

    Attributes:
        pace_s: iteration time that all pipelines plan for, in the graph's seconds.
        without_s: iteration time with the job's plan left as it is.
        variants: one per sort of pipeline, in the order asked for.
    """

    pace_s: float
    without_s: float
    variants: tuple[PacedPlan, ...]


def pace_to_dict(pace: Pace) -> dict[str, Any]:
    """Plain JSON data."""
    variants = [[None if v.plan is None else plan_to_json(v.plan), v.energy_j, v.without_j] for v in pace.variants]
    return {"pace_s": pace.pace_s, "without_s": pace.without_s, "variants": variants}


def pace_from_dict(data: dict[str, Any]) -> Pace:
    """Inverse of `pace_to_dict`.

    Raises:
        PlanError: it is no such data.
    """
    try:
        return Pace(
            data["pace_s"],
            data["without_s"],
            tuple(
                PacedPlan(None if text is None else plan_from_json(text), energy_j, without_j)
                for text, energy_j, without_j in data["variants"]
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"pace: not what the planner sends: {error!r}") from error
