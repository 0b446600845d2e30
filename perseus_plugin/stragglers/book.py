"""Who is slow now: reports of slow ranks, checked on arrival, and the book that keeps them.

A report names a rank and either its slowdown or how long an iteration of its pipeline takes. It holds until it expires,
is cleared, or the same source reports the rank anew; a slowdown of 1 takes back what that source said.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perseus_plugin.errors import PerseusError, validation_problem
from perseus_plugin.iteration.bounds import MOST_S

DETECTION = "detection"
"""Source of what the session sees itself; nobody else may use it."""

_MAX_AGE_S = 600.0  # older messages are refused, so that ids need not be remembered for longer
_MAX_AHEAD_S = 60.0  # by how much clocks of two machines may differ
_LAST_TIME = 1e10  # Unix seconds: some three hundred years
_MAX_IDS = 100_000
_MAX_SOURCES_PER_RANK = 16


class StragglerError(PerseusError):
    """A report that is refused; the message is the reason."""


class Report(BaseModel):
    """One message about one rank.

    Attributes:
        rank: in the whole job.
        slowdown: its instructions take so many times as long as they did when they were profiled.
        iteration_time_s: or: an iteration of its pipeline takes so long. One of the two is given.
        until: Unix time at which it ends by itself; None: when it is cleared.
        source: who says so.
        id: no two reports have the same one.
        time: Unix time at which it was made.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rank: int
    slowdown: float | None = None
    iteration_time_s: Annotated[float, Field(le=MOST_S)] | None = None
    until: Annotated[float, Field(le=_LAST_TIME)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=64)] = "python"
    id: Annotated[str, Field(min_length=1, max_length=64)] = Field(default_factory=lambda: uuid.uuid4().hex)
    time: float = Field(default_factory=time.time)

    @property
    def ends(self) -> bool:
        """Whether it takes back what the same source said of the rank before."""
        return self.slowdown == 1.0


def check_report(value: Any, world_size: int, max_slowdown: float, now: float) -> Report:
    """Check what has arrived.

    Args:
        value: a report as plain data.
        world_size: ranks of the job.
        max_slowdown: more is absurd.
        now: Unix time.

    Raises:
        StragglerError: with the one reason why it is refused.
    """
    try:
        report = Report.model_validate(value)
    except ValidationError as error:
        raise StragglerError(f"malformed report: {validation_problem(error, Report)}") from None
    if not 0 <= report.rank < world_size:
        raise StragglerError(f"rank: got {report.rank}; allowed: 0 to {world_size - 1}, the ranks of this job")
    if (report.slowdown is None) == (report.iteration_time_s is None):
        raise StragglerError("malformed report: allowed: either slowdown or iteration_time_s")
    if report.slowdown is not None and not 1.0 <= report.slowdown <= max_slowdown:
        raise StragglerError(f"slowdown: got {report.slowdown:g}; allowed: 1 to {max_slowdown:g}")
    if report.iteration_time_s is not None and not report.iteration_time_s > 0:
        raise StragglerError(f"iteration_time_s: got {report.iteration_time_s:g}; allowed: above 0")
    if not report.source.isprintable() or not report.id.isprintable():
        raise StragglerError("malformed report: source and id must be printable")
    if not now - _MAX_AGE_S <= report.time <= now + _MAX_AHEAD_S:
        raise StragglerError(f"time: the report is from {now - report.time:.0f} s ago; allowed: up to {_MAX_AGE_S:.0f}")
    if report.until is not None and report.until <= now:
        raise StragglerError(f"until: got {report.until:.0f}, which has passed")
    return report


@dataclass(frozen=True, slots=True)
class SlowRank:
    """What the book says of one rank.

    Attributes:
        rank: which.
        slowdown: the largest one told, 1.0 for none.
        iteration_time_s: the longest one told, 0.0 for none.
        sources: who told.
    """

    rank: int
    slowdown: float
    iteration_time_s: float
    sources: tuple[str, ...]


class StragglerBook:
    """Keeps the reports in force. Its methods may be called from any thread.

    Args:
        world_size: ranks of the job.
        max_slowdown: more is refused as absurd.
    """

    def __init__(self, world_size: int, max_slowdown: float) -> None:
        self._full_clock_s: float | None = None
        self._world_size = world_size
        self._max_slowdown = max_slowdown
        self._lock = threading.Lock()
        self._live: dict[tuple[int, str], Report] = {}
        self._seen: OrderedDict[str, float] = OrderedDict()

    def judge_by(self, full_clock_s: float | None) -> None:
        """An `iteration_time_s` is judged by this time of an iteration at full clocks; None: it is not known."""
        self._full_clock_s = full_clock_s

    def take(self, value: Any, now: float) -> Report:
        """Enter a report.

        Raises:
            StragglerError: it is refused.
        """
        report = check_report(value, self._world_size, self._max_slowdown, now)
        self._check_iteration_time(report)
        with self._lock:
            if report.id in self._seen:
                raise StragglerError(f"replayed: a report with the id {report.id!r} has been taken already")
            self._remember(report.id, now)
            key = (report.rank, report.source)
            before = self._live.get(key)
            if before is not None and before.time > report.time:
                raise StragglerError("replayed: a newer report of this rank by the same source has been taken already")
            if report.ends:
                self._live.pop(key, None)
            elif before is None and sum(rank == report.rank for rank, _ in self._live) >= _MAX_SOURCES_PER_RANK:
                raise StragglerError(f"rank {report.rank}: {_MAX_SOURCES_PER_RANK} sources have reported it already")
            else:
                self._live[key] = report
        return report

    def _check_iteration_time(self, report: Report) -> None:
        time_s, full_s = report.iteration_time_s, self._full_clock_s
        if time_s is not None and full_s is not None and not full_s <= time_s <= self._max_slowdown * full_s:
            raise StragglerError(
                f"iteration_time_s: got {time_s:g}; allowed: {full_s:.4g} (an iteration at full clocks) to "
                f"{self._max_slowdown:g} times that"
            )

    def clear(self, rank: int | None = None) -> list[Report]:
        """Forget reports of a rank, or all; what the session sees itself stays. Returns what was forgotten."""
        with self._lock:
            gone = [key for key in self._live if key[1] != DETECTION and (rank is None or key[0] == rank)]
            return [self._live.pop(key) for key in gone]

    def live(self, now: float) -> list[Report]:
        """The reports in force, by rank."""
        with self._lock:
            for key in [key for key, report in self._live.items() if report.until is not None and report.until <= now]:
                del self._live[key]
            return sorted(self._live.values(), key=lambda report: (report.rank, report.source))

    def slow_ranks(self, now: float) -> list[SlowRank]:
        """What is in force of each slow rank.

        When the session sees more than half of all ranks slower than they were, the job itself has changed (longer
        sequences, say) and nobody is a straggler: that is left to the watch over iteration times.
        """
        live = self.live(now)
        if self.job_is_slower(live):
            live = [report for report in live if report.source != DETECTION]
        found: dict[int, SlowRank] = {}
        for report in live:
            known = found.get(report.rank, SlowRank(report.rank, 1.0, 0.0, ()))
            found[report.rank] = SlowRank(
                report.rank,
                max(known.slowdown, report.slowdown or 1.0),
                max(known.iteration_time_s, report.iteration_time_s or 0.0),
                (*known.sources, report.source),
            )
        return list(found.values())

    def job_is_slower(self, live: list[Report]) -> bool:
        """Whether more than half of all ranks are seen to be slow."""
        return 2 * sum(report.source == DETECTION for report in live) > self._world_size

    def _remember(self, report_id: str, now: float) -> None:
        self._seen[report_id] = now
        while self._seen and (
            len(self._seen) > _MAX_IDS or next(iter(self._seen.values())) < now - _MAX_AGE_S - _MAX_AHEAD_S
        ):
            self._seen.popitem(last=False)


def rounded_slowdown(slowdown: float) -> float:
    """Down to whole percents: plans are then found again, and never slower than the straggler is."""
    return max(1.0, math.floor(100 * slowdown + 1e-6) / 100)
