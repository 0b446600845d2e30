"""The lines of `records/rank-R.jsonl`: one model each, by which they are written and read."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perseus_plugin.exchange.messages import Placement, Text
from perseus_plugin.iteration.bounds import ClockOrFull, Count, PositiveTime, Time
from perseus_plugin.reporting.record.iterations import Sort, Stretch


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    def to_line(self) -> str:
        """As it stands in the file; what is as usual is left out."""
        usual = set(type(self).model_fields) - self.model_fields_set
        return self.model_dump_json(by_alias=True, exclude=usual) + "\n"


ONE_GRAPH = ("training step", "one CUDA graph")
"""Fact of a job whose steps are one CUDA graph: of those no instruction is seen."""


class Header(_Strict):
    """The first line; see `recorder.Recorder`."""

    schema_name: Literal["perseus-record"] = Field(alias="schema")
    version: Literal[1]
    placement: Placement
    started_s: float
    host: Text
    gpu: Text
    backend: str
    emulated: bool
    facts: dict[str, Text]


class Deviation(_Strict):
    """The GPU was seen at another clock than the one asked for; `time_s` is Unix time."""

    event: Literal["deviation"]
    time_s: float
    asked_mhz: ClockOrFull
    read_mhz: ClockOrFull


class Row(_Strict):
    """A stretch of iterations; what is as usual is left out."""

    first: Annotated[int, Field(ge=0, le=10**8)]
    count: Annotated[int, Field(ge=1, le=10**8)] = 1
    begin_s: float
    time_s: PositiveTime
    longest_s: Time | None = None
    energy_j: float | None
    read: Count | None = None
    state: Literal["warm-up", "full", "profiling", "plan", "straggler", "unknown"]
    plan: Count = 0
    clock_mhz: ClockOrFull = 0
    reason: str = ""
    schedule: str = ""

    @classmethod
    def of(cls, stretch: Stretch) -> Row:
        """The row of a stretch."""
        sort = stretch.sort
        time_s, longest_s = round(stretch.time_s, 7), round(stretch.longest_s, 7)
        row: dict[str, Any] = {"first": stretch.first, "count": stretch.count, "begin_s": round(stretch.begin_s, 6)}
        row |= {"time_s": time_s, "longest_s": longest_s}
        row |= {"energy_j": round(stretch.energy_j, 4) if stretch.read else None, "read": stretch.read}
        row |= {"state": sort.state, "plan": sort.plan, "clock_mhz": sort.clock_mhz}
        row |= {"reason": sort.reason, "schedule": sort.schedule}
        usual: dict[str, Any] = {"count": 1, "read": stretch.count, "longest_s": time_s, "plan": 0, "clock_mhz": 0}
        usual |= {"reason": "", "schedule": ""}
        return cls(**{name: value for name, value in row.items() if name not in usual or value != usual[name]})

    def stretch(self) -> Stretch:
        """The stretch of a row."""
        return Stretch(
            self.first,
            self.count,
            self.begin_s,
            self.time_s,
            self.time_s if self.longest_s is None else self.longest_s,
            math.nan if self.energy_j is None else self.energy_j,
            self.count if self.read is None else self.read,
            Sort(self.state, self.plan, self.clock_mhz, self.reason, self.schedule),
        )
