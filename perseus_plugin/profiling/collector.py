"""Gathering one rank's sweep: iteration records and counter ticks in, runs for the estimator out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from perseus_plugin.iteration.instructions import Compute, Constant
from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Sweep
from perseus_plugin.profiling.observations import Activity, ClockRun, Tick
from perseus_plugin.profiling.step_sizes import usual_mean

_PAUSE_SHARE = 0.1  # of an iteration's time between two, above which they are two runs
_HELD_SHARE = 0.01  # of a run's time at the power limit, above which that is what the clock comes to


class SweepCollector:
    """Collects the iterations of a profiling sweep.

    Args:
        top_mhz: the highest clock of the sweep; constant-time work is timed there.
    """

    def __init__(self, top_mhz: int) -> None:
        self._top_mhz = top_mhz
        self._groups: list[tuple[int, list[IterationRecord]]] = []
        self._group: object = None
        self._ticks: list[Tick] = []
        self._capped: list[tuple[float, float]] = []
        self._deviations_s: list[float] = []
        self._constants: dict[Constant, list[float]] = {}

    def add(self, step: Sweep, record: IterationRecord) -> None:
        """Add an iteration of the sweep.

        One that is not undisturbed (an evaluation ran since the one before it) is dropped, as the clock has to settle
        anew, and a new run begins after it.

        Args:
            step: what the timetable said about it.
            record: what was seen.
        """
        if not step.kept or not record.undisturbed or not record.complete:
            self._group = None
            return
        here = step.identity
        if here != self._group or self._paused(record):
            self._groups.append((step.frequency_mhz, []))
            self._group = here
        self._groups[-1][1].append(record)
        if step.is_full(self._top_mhz):
            for operation, start_s, end_s in _timed(record):
                if isinstance(operation, Constant):
                    self._constants.setdefault(operation, []).append(end_s - start_s)

    def _paused(self, record: IterationRecord) -> bool:
        """Whether something else (a checkpoint) ran before this iteration: its power is not that of waiting."""
        last = self._groups[-1][1][-1]
        return record.begin_s - last.end_s > _PAUSE_SHARE * (last.end_s - last.begin_s)

    def add_tick(self, tick: Tick, capped_s: float) -> None:
        """Add a tick of the energy counter, in the order they were seen.

        Args:
            tick: as it was seen.
            capped_s: seconds in all that the GPU has run below the clock asked for (NaN: unknown).
        """
        self._ticks.append(tick)
        self._capped.append((tick.time_s, capped_s))

    def add_deviation(self, time_s: float) -> None:
        """The GPU was seen at another clock than the one it was asked for."""
        self._deviations_s.append(time_s)

    def runs(self) -> list[ClockRun]:
        """One run per stretch of consecutive kept iterations at one clock."""
        return [self._run(frequency_mhz, records) for frequency_mhz, records in self._groups]

    @property
    def constant_kinds(self) -> tuple[str, ...]:
        """Names of the constant-time work seen; the estimator keeps its power out of the blocking power."""
        return tuple(sorted({operation.name for operation in self._constants}))

    def constant_times_s(self) -> dict[str, float]:
        """Time of each kind of constant-time work, at the top clock.

        Means add up to iterations: of microbatches that take long to load now and then, the median says too little.
        Only in collective work it is the median, as the time in there is mostly that of waiting for others.
        """
        return {
            operation.name: statistics.median(times) if operation.collective else usual_mean(times)
            for operation, times in self._constants.items()
        }

    @property
    def top_steps(self) -> int:
        """How many iterations were seen at the top clock."""
        return sum(len(records) for frequency_mhz, records in self._groups if frequency_mhz == self._top_mhz)

    def top_times_s(self) -> dict[str, float]:
        """Median time of each instruction kind at the top clock."""
        times: dict[str, list[float]] = {}
        for frequency_mhz, records in self._groups:
            for record in records if frequency_mhz == self._top_mhz else ():
                for operation, start_s, end_s in _timed(record):
                    if isinstance(operation, Compute):
                        times.setdefault(operation.kind, []).append(end_s - start_s)
        return {kind: statistics.median(values) for kind, values in times.items()}

    def _run(self, frequency_mhz: int, records: Sequence[IterationRecord]) -> ClockRun:
        begin_s, end_s = records[0].begin_s, records[-1].end_s
        held = self._was_held(begin_s, end_s)
        deviated = any(begin_s <= time_s <= end_s for time_s in self._deviations_s)
        top = frequency_mhz == self._top_mhz
        return ClockRun(
            frequency_mhz=frequency_mhz,
            begin_s=begin_s,
            end_s=end_s,
            activities=tuple(
                Activity(_name(operation), start_s, stop_s)
                for record in records
                for operation, start_s, stop_s in _timed(record)
            ),
            ticks=tuple(tick for tick in self._ticks if begin_s <= tick.time_s <= end_s),
            capped=deviated and not held and not top,
            at_limit=held or (deviated and top),
            steps=tuple((record.number, record.end_s) for record in records),
        )

    def _was_held(self, begin_s: float, end_s: float) -> bool:
        """Whether the GPU says that its power limit held it."""
        within = [capped_s for time_s, capped_s in self._capped if begin_s <= time_s <= end_s]
        return len(within) > 1 and within[-1] - within[0] > _HELD_SHARE * (end_s - begin_s)


def _timed(record: IterationRecord) -> Iterable[tuple[Compute | Constant, float, float]]:
    return zip(record.operations, record.starts_s, record.ends_s, strict=True)


def _name(operation: Compute | Constant) -> str:
    return operation.kind if isinstance(operation, Compute) else operation.name
