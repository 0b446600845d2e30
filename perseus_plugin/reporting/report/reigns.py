"""What a job aimed at, and from which iteration on, as it has left that in its events. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from perseus_plugin.bounds import Count, Power, Ratio
from perseus_plugin.planning.power.budget import NodeOverhead, PowerBudget


@dataclass(frozen=True, slots=True)
class Reign:
    """What is in force from an iteration on.

    Attributes:
        first: that iteration.
        says: what it is, for people.
        budget_w: that all GPUs of the job may draw together; NaN: no budget of the whole job.
        power_ratio: average power by the plans over that at full clocks, as predicted then; NaN: not known.
    """

    first: int
    says: str
    budget_w: float = math.nan
    power_ratio: float = math.nan


class _Node(BaseModel):
    watts: Power = 0.0
    share: Annotated[float, Field(ge=0, le=100)] = 0.0


class _Limit(BaseModel):
    job_w: Power | None = None
    node: _Node = _Node()
    gpus_per_node: Annotated[Count, Field(ge=1)] = 8


class _Goal(BaseModel):
    iteration: Count
    says: Annotated[str, Field(max_length=10_000)]
    limit: _Limit | None = None
    time_ratio: Ratio | None = None
    energy_ratio: Ratio | None = None


def reigns(events: Sequence[Mapping[str, Any]], world_size: int) -> list[Reign]:
    """What was in force, by rising iteration; of what began at the same iteration the newest, which was.

    Args:
        events: of the job.
        world_size: GPUs of the job.
    """
    found: list[Reign] = []
    for event in events:
        if event["event"] != "goal":
            continue
        try:
            told = _Goal.model_validate(event)
        except ValidationError:
            continue  # of another version; the rest is shown
        reign = Reign(told.iteration, told.says, _budget_w(told.limit, world_size), _power_ratio(told))
        found = [before for before in found if before.first < reign.first] + [reign]
    return found


def _budget_w(limit: _Limit | None, world_size: int) -> float:
    if limit is None or not limit.job_w:
        return math.nan
    node = NodeOverhead(limit.node.watts, limit.node.share)
    return PowerBudget(limit.job_w, node=node, gpus_per_node=limit.gpus_per_node).gpu_w(limit.job_w, world_size)


def _power_ratio(told: _Goal) -> float:
    if not told.time_ratio or told.energy_ratio is None:
        return math.nan
    return told.energy_ratio / told.time_ratio
