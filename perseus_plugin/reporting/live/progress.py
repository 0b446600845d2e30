"""The progress lines while a job is being profiled."""

from __future__ import annotations

import logging
import statistics

from perseus_plugin.iteration.record import IterationRecord
from perseus_plugin.iteration.timetable import Directive, FullClock, Sweep, Timetable

logger = logging.getLogger(__name__)


class Progress:
    """Says before the sweep how long it will take, and at each clock how far it is.

    Args:
        timetable: the job's; its sweep is what progress is made in.
    """

    def __init__(self, timetable: Timetable) -> None:
        self._timetable = timetable
        self._durations_s: list[float] = []
        self._block: object = None

    def swept_again(self, timetable: Timetable) -> None:
        """There is another round of the sweep."""
        self._timetable = timetable

    def iteration(self, directive: Directive, record: IterationRecord) -> None:
        """An iteration has ended."""
        if isinstance(directive, Sweep):
            if directive.identity != self._block:
                self._block = directive.identity
                self._say(directive, record.number)
            self._durations_s.append(record.end_s - record.begin_s)
        elif isinstance(directive, FullClock) and record.number == 0 and self._timetable.sweep.clocks_mhz:
            logger.info(
                "warming up for %d iterations, then profiling for %d in %d blocks at %d clocks; training goes on all "
                "the while",
                self._timetable.sweep.first,
                self._timetable.sweep_end - self._timetable.sweep.first,
                len(self._timetable.sweep.clocks_mhz),
                len(set(self._timetable.sweep.clocks_mhz)),
            )

    def _say(self, directive: Sweep, number: int) -> None:
        done = number - self._timetable.sweep.first
        total = self._timetable.sweep_end - self._timetable.sweep.first
        left = ""
        if self._durations_s:
            left = f", about {(total - done) * statistics.mean(self._durations_s):.0f} s left"
        logger.info(
            "profiling%s block %d of %d: %d MHz%s (iteration %d of %d%s)",
            " stages in turn," if directive.paired else "",
            directive.block + 1,
            len(self._timetable.sweep.clocks_mhz),
            directive.frequency_mhz,
            " on this one" if directive.paired else "",
            done + 1,
            total,
            left,
        )
