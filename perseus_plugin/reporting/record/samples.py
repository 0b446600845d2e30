"""Single iterations kept whole on a rank: every instruction, what was asked of the clock, what it read. Pure.

Few are kept. Which ones is decided by their number alone, so that all ranks keep the same ones.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from perseus_plugin.errors import ReportError
from perseus_plugin.files import read_model
from perseus_plugin.iteration.bounds import Count, PositiveTime
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, RanAs, Sweep, Timetable
from perseus_plugin.reporting.record.iterations import FULL, PLAN, PROFILING, STRAGGLER, Sort

_EVERY = 1024
_MAX_READINGS = 1000
_KEPT: Mapping[str, int] = {FULL: 1, PLAN: 4, STRAGGLER: 2}


class Timed(NamedTuple):
    """One hooked operation as it ran.

    Attributes:
        name: instruction kind, or name of the constant-time work.
        microbatch: -1 for constant-time work.
        chunk: model chunk.
        start_s, finish_s: from the beginning of the iteration.
        asked_mhz: the clock it was to run at, 0: full clock.
    """

    name: str
    microbatch: int
    chunk: int
    start_s: float
    finish_s: float
    asked_mhz: int


class ClockRequest(NamedTuple):
    """A clock request that reached the driver: when its call returned, and the clock, 0: lock given up."""

    time_s: float
    clock_mhz: int


class Reading(NamedTuple):
    """The energy counter was seen to move, to `energy_j` (0 at the first one); the SM clock read with it."""

    time_s: float
    clock_mhz: int
    energy_j: float


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Sample(_Strict):
    """One iteration on one rank; times are from its beginning.

    Attributes:
        number: of the iteration.
        state, plan: as of `Sort`.
        schedule: key of the schedule that ran.
        begin_s: Unix time.
        time_s: how long it took.
        operations: in program order.
        requests: to the driver, from shortly before the iteration on.
        readings: of the counter; none where it was not polled.
    """

    number: Annotated[int, Field(ge=0)]
    state: str
    plan: Count
    schedule: str
    begin_s: float
    time_s: PositiveTime
    operations: tuple[Timed, ...]
    requests: tuple[ClockRequest, ...] = ()
    readings: tuple[Reading, ...] = ()

    @property
    def instructions(self) -> list[Timed]:
        """Without the constant-time work."""
        return [one for one in self.operations if one.microbatch >= 0]

    def powers(self) -> list[tuple[float, float, float]]:
        """Mean power between readings, as (from, to, watts)."""
        pairs = zip(self.readings, self.readings[1:], strict=False)
        return [
            (a.time_s, b.time_s, (b.energy_j - a.energy_j) / (b.time_s - a.time_s)) for a, b in pairs if b[0] > a[0]
        ]


class SamplesFile(_Strict):
    """What stands in `records/rank-R.samples.json`."""

    schema_name: Literal["perseus-samples"] = Field(default="perseus-samples", alias="schema")
    version: Literal[1] = 1
    rank: int
    samples: tuple[Sample, ...]


def is_sampled(timetable: Timetable, number: int) -> bool:
    """Whether all ranks keep this iteration whole.

    That is the last one of every profiling block at the highest clock; and of those that follow a plan, or run at full
    clocks after the sweep, numbers 2, 4, 8 and so on to 1,024, then every 1,024th.
    """
    directive = timetable.at(number)
    if isinstance(directive, Sweep):
        last = (number - timetable.sweep.first) % timetable.steps_per_block == timetable.steps_per_block - 1
        return last and directive.is_full(max(timetable.sweep.clocks_mhz))
    if directive.ran_as is RanAs.WARM_UP:
        return False
    since = number - max([first for first, _ in timetable.switches if first <= number], default=timetable.sweep_end)
    return since >= 2 and (since % _EVERY == 0 or (since < _EVERY and since & (since - 1) == 0))


def next_sampled(timetable: Timetable, number: int) -> int:
    """The first one after the sweep, from this number on, that all ranks keep whole, as far as is decided yet."""
    begun = max([first for first, _ in timetable.switches if first <= number], default=timetable.sweep_end)
    since = max(2, number - begun)
    after = 1 << (since - 1).bit_length() if since < _EVERY else since + -since % _EVERY
    return min([begun + after, *(first + 2 for first, _ in timetable.switches if first > number)])


def asked_clocks_mhz(directive: Directive, record: IterationRecord, clocks_mhz: Iterable[int]) -> list[int]:
    """Per hooked operation the clock it was to run at, 0: full clock.

    Args:
        directive: what the iteration ran as.
        record: the iteration.
        clocks_mhz: of the plan's part that it followed; empty for none.
    """
    if isinstance(directive, Sweep):
        return [directive.frequency_mhz] * len(record.operations)
    planned = list(clocks_mhz)
    return [planned[slot] if 0 <= slot < len(planned) else 0 for slot in record.slots]


def sample_of(
    sort: Sort,
    record: IterationRecord,
    asked_mhz: Iterable[int],
    unix_offset_s: float,
    requests: Iterable[ClockRequest],
    readings: Iterable[Reading],
) -> Sample:
    """Put together what is known of an iteration.

    Args:
        sort: what it ran as.
        record: complete.
        asked_mhz: see `asked_clocks_mhz`.
        unix_offset_s: Unix time minus `time.monotonic()`.
        requests, readings: around the iteration, in `time.monotonic()` seconds, by rising time.
    """
    zero, end = record.begin_s, record.end_s
    rows = zip(record.operations, record.starts_s, record.ends_s, asked_mhz, strict=True)
    operations = tuple(
        Timed(
            op.kind if isinstance(op, Compute) else op.name,
            op.microbatch if isinstance(op, Compute) else -1,
            op.chunk if isinstance(op, Compute) else 0,
            round(start - zero, 6),
            round(finish - zero, 6),
            asked,
        )
        for op, start, finish, asked in rows
    )
    within = [one for one in readings if zero - 0.05 <= one.time_s <= end + 0.05]
    within = within[:: math.ceil(len(within) / _MAX_READINGS) or 1]
    first_j = within[0].energy_j if within else 0.0
    return Sample(
        number=record.number,
        state=FULL if sort.state == PROFILING else sort.state,
        plan=sort.plan,
        schedule=record.schedule,
        begin_s=round(zero + unix_offset_s, 6),
        time_s=round(end - zero, 6),
        operations=operations,
        requests=tuple(
            ClockRequest(round(one.time_s - zero, 6), one.clock_mhz)
            for one in requests
            if zero - 0.5 <= one.time_s <= end
        ),
        readings=tuple(
            Reading(round(one.time_s - zero, 6), one.clock_mhz, round(one.energy_j - first_j, 4)) for one in within
        ),
    )


class Samples:
    """The newest samples of each state."""

    def __init__(self) -> None:
        self._kept = {state: deque[Sample](maxlen=count) for state, count in _KEPT.items()}

    def add(self, sample: Sample) -> None:
        """Keep it; the oldest of its state goes if there are too many."""
        self._kept[sample.state].append(sample)

    def to_json(self, rank: int) -> str:
        """The content of the file."""
        samples = sorted((one for kept in self._kept.values() for one in kept), key=lambda one: one.number)
        content = SamplesFile(rank=rank, samples=tuple(samples))
        return json.dumps(content.model_dump(mode="json", by_alias=True), separators=(",", ":")) + "\n"


def load_samples(path: Path) -> tuple[Sample, ...]:
    """Read what `Samples.to_json` made.

    Raises:
        ReportError: it cannot be read, or is something else.
    """
    return read_model(path, SamplesFile, ReportError).samples
