"""What a job aimed at, and from which iteration on, as it has left that in its events. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.bounds import Count, PositiveTime, Power, Ratio
from perseus_plugin.planning.power.budget import GroupBudget, NodeOverhead, Peaks, PowerBudget


@dataclass(frozen=True, slots=True)
class Reign:
    """What is in force from an iteration on.

    Attributes:
        first: that iteration.
        says: what it is, for people.
        budget_w: that all GPUs of the job may draw together; NaN: no budget of the whole job.
        power_ratio: average power by the plans over that at full clocks, as predicted then; NaN: not known.
        limit: on power; None: none, or of another version.
    """

    first: int
    says: str
    budget_w: float = math.nan
    power_ratio: float = math.nan
    limit: PowerBudget | None = None


class _Node(BaseModel):
    watts: Power = 0.0
    share: Annotated[float, Field(ge=0, le=100)] = 0.0


class _Group(BaseModel):
    name: Annotated[str, Field(max_length=1000)]
    of: Annotated[str, Field(max_length=1000)]
    watts: Power


class _Peaks(BaseModel):
    window_s: PositiveTime = 1.0
    job_w: Power | None = None
    node_w: Power | None = None
    gpu_w: Power | None = None


class _Limit(BaseModel):
    job_w: Power | None = None
    groups: tuple[_Group, ...] = ()
    peaks: _Peaks = _Peaks()
    node: _Node = _Node()
    gpus_per_node: Annotated[Count, Field(ge=1)] = 8

    def budget(self, world_size: int) -> PowerBudget | None:
        """As it was in force; None: it is none that there can be in a job of so many ranks."""
        try:
            made = PowerBudget(
                self.job_w,
                tuple(GroupBudget(one.name, one.of, one.watts) for one in self.groups),
                NodeOverhead(self.node.watts, self.node.share),
                Peaks(**dict(self.peaks)),
                self.gpus_per_node,
            )
            for group in made.groups:
                group.ranks(world_size, made.gpus_per_node)
        except PlanError:
            return None
        return made


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
        limit = None if told.limit is None else told.limit.budget(world_size)
        job_w = None if limit is None else limit.job_w
        budget_w = math.nan if limit is None or job_w is None else limit.gpu_w(job_w, world_size)
        reign = Reign(told.iteration, told.says, budget_w, _power_ratio(told), limit)
        found = [before for before in found if before.first < reign.first] + [reign]
    return found


def _power_ratio(told: _Goal) -> float:
    if not told.time_ratio or told.energy_ratio is None:
        return math.nan
    return told.energy_ratio / told.time_ratio
