"""A job's iterations in bounded space: one entry each while there are few, neighbours joined when there are many. Pure.

Entries of different sort (another clock, another plan) are never joined, so that every change stays where it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from perseus_plugin.iteration.timetable import REFERENCE, Directive, Follow, FullClock, RanAs, Sweep

WARM_UP, FULL, PROFILING = RanAs.WARM_UP.value, RanAs.FULL.value, RanAs.PROFILING.value
PLAN, STRAGGLER, UNKNOWN = RanAs.PLAN.value, RanAs.STRAGGLER.value, RanAs.UNKNOWN.value
"""The record's words for `RanAs`; a reference is one at full clocks, with that as its reason."""
OWN_BATCH = "made for its batch"
"""Reason of an iteration under a plan of its own."""

_MIXING = 64  # iterations in a stretch, from which on references and schedules are not kept apart


@dataclass(frozen=True, slots=True)
class Sort:
    """What an iteration ran as.

    Attributes:
        state: the record's word for `RanAs`.
        plan: version of the plan, 0 without one.
        clock_mhz: of the profiling sweep, 0 otherwise.
        reason: why at full clocks, or `OWN_BATCH`, for people; else empty.
        schedule: key of the schedule that ran, empty: several, or not known.
    """

    state: str
    plan: int = 0
    clock_mhz: int = 0
    reason: str = ""
    schedule: str = ""

    @classmethod
    @lru_cache(maxsize=64)  # iteration after iteration is of the same
    def of(cls, directive: Directive, schedule: str = "") -> Sort:
        """The sort of iterations that run this schedule as `directive` says."""
        ran_as = directive.ran_as
        match directive:
            case Sweep():
                return cls(ran_as.value, clock_mhz=directive.frequency_mhz, schedule=schedule)
            case Follow():
                reason = OWN_BATCH if directive.batch else ""
                return cls(ran_as.value, plan=directive.version, reason=reason, schedule=schedule)
            case FullClock():
                reason = "" if ran_as is RanAs.WARM_UP else directive.reason[:300]
                state = FULL if ran_as is RanAs.REFERENCE else ran_as.value
                return cls(state, reason=reason, schedule=schedule)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive iterations of one sort on one rank.

    Attributes:
        first, count: which.
        begin_s: Unix time at which the first began.
        time_s: mean time of an iteration.
        longest_s: time of the longest one.
        energy_j: mean energy of an iteration, NaN: not known.
        read: how many have a known energy.
        sort: what they ran as.
    """

    first: int
    count: int
    begin_s: float
    time_s: float
    longest_s: float
    energy_j: float
    read: int
    sort: Sort

    @classmethod
    def single(cls, number: int, begin_s: float, time_s: float, energy_j: float | None, sort: Sort) -> Stretch:
        """One iteration."""
        energy = math.nan if energy_j is None else energy_j
        return cls(number, 1, begin_s, time_s, time_s, energy, int(energy_j is not None), sort)

    def precedes(self, later: Stretch) -> bool:
        """Whether `later` is of the same sort and begins where this ends."""
        return self.sort == later.sort and self.first + self.count == later.first

    def joined(self, later: Stretch) -> Stretch:
        """This and the one right after it."""
        count, read = self.count + later.count, self.read + later.read
        energies = [(s.energy_j, s.read) for s in (self, later) if s.read]
        return replace(
            self,
            sort=self.sort if self.sort.schedule == later.sort.schedule else replace(self.sort, schedule=""),
            count=count,
            time_s=(self.time_s * self.count + later.time_s * later.count) / count,
            longest_s=max(self.longest_s, later.longest_s),
            energy_j=sum(e * n for e, n in energies) / read if read else math.nan,
            read=read,
        )


def _joins(last: Stretch, one: Stretch, size: int) -> bool:
    """Whether the next stretch goes into the last one.

    In a long run schedules that take turns are joined, and so are iterations under the plan and under plans for single
    batches; references go into the iterations under the plan before them: all these return for
    as long as the plan is followed. What is added up stays right, as references save nothing.
    """
    if last.precedes(one) or size < _MIXING or last.first + last.count != one.first:
        return last.precedes(one)
    is_reference = one.sort.state == FULL and one.sort.reason == REFERENCE.reason
    # Plans for single batches come and go as well.
    reason = one.sort.reason if one.sort.state == PLAN else last.sort.reason
    same = replace(last.sort, schedule=one.sort.schedule, reason=reason) == one.sort
    return (last.sort.state == PLAN and is_reference) or same


class IterationLog:
    """Stretches of a growing run, at most `limit` of them.

    When there are more, neighbours are joined two by two; from then on new ones gather twice as many iterations, and
    once they gather many, schedules that take turns are joined, and references go into the iterations under the plan
    before them. Only a run that changes its sort otherwise more than `limit` times loses something: its oldest
    stretches.

    Args:
        limit: most stretches kept, from 2.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 1
        self._open: Stretch | None = None
        self.stretches: list[Stretch] = []

    def add(self, one: Stretch) -> bool:
        """Add the next iteration; returns whether older stretches have changed because of it."""
        last = self._open
        self._open = one
        if last is not None and last.count < self._size and _joins(last, one, self._size):
            self._open = last.joined(one)
            self.stretches[-1] = self._open
            return False
        self.stretches.append(one)
        if len(self.stretches) <= self._limit:
            return False
        self._halve()
        while len(self.stretches) > self._limit and self._size < _MIXING:
            self._halve()
        if len(self.stretches) > self._limit:
            del self.stretches[: len(self.stretches) - self._limit // 2]
        self._open = self.stretches[-1]
        return True

    def _halve(self) -> None:
        self._size *= 2
        self.stretches = _halved(self.stretches, self._size)

    @property
    def closed(self) -> Sequence[Stretch]:
        """Those that the next iteration cannot join any more."""
        last = self._open
        return self.stretches if last is None or last.count >= self._size else self.stretches[:-1]


def _halved(stretches: Sequence[Stretch], size: int) -> list[Stretch]:
    joined: list[Stretch] = []
    for one in stretches:
        last = joined[-1] if joined else None
        if last is not None and last.count + one.count <= size and _joins(last, one, size):
            joined[-1] = last.joined(one)
        else:
            joined.append(one)
    return joined
