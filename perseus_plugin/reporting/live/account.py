"""Time and energy of iterations, by sort, on one rank.

Energy comes from counter readings at the beginning and the end of an iteration. The counter moves in ticks, so one
iteration is known to within a tick; the error of a sum over iterations averages out. Readings that cannot be believed,
or that were taken at another time than they should have been, leave an iteration's energy unknown: it counts for the
time and is counted as unread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perseus_plugin.control.readings import CheckedEnergy, energy_between_j
from perseus_plugin.control.wire import Mark
from perseus_plugin.exchange.messages import Totals
from perseus_plugin.iteration.timetable import RanAs

FULL_CLOCK = "full_clock"
PROFILING, PLAN, STRAGGLER = RanAs.PROFILING.value, RanAs.PLAN.value, RanAs.STRAGGLER.value
REFERENCES = RanAs.REFERENCE.value
"""Full clocks amid iterations under the plan, for it to be compared with."""
EVERY, UNDER_PLANS = "every", "under_plans"
"""All iterations of the run, and those under any of its plans."""
RECHECK = "recheck"
"""Full clocks measured again after a plan was dropped: the reference from then on."""

_LATE_S, _LATE_SHARE = 0.02, 0.1  # a reading so much later than its end of the iteration is another stretch's


def begin_tag(iteration: int) -> int:
    """Tag of the counter reading at an iteration's beginning."""
    return 2 * iteration


def end_tag(iteration: int) -> int:
    """Tag of the counter reading at an iteration's end."""
    return 2 * iteration + 1


@dataclass(slots=True)
class _Open:
    sorts: Sequence[str]
    time_s: float


class Account:
    """Sums up iterations.

    Args:
        measures_energy: whether counter readings will come; without, an iteration counts as soon as it is added.
        on_energy: called with an iteration and its energy as soon as that is known.
    """

    def __init__(self, measures_energy: bool, on_energy: Callable[[int, float], None] | None = None) -> None:
        self._measures_energy = measures_energy
        self._on_energy = on_energy
        self._begun: dict[int, Mark] = {}
        self._ended: dict[int, Mark] = {}
        self._open: dict[int, _Open] = {}
        self._sums: dict[str, Totals] = {}

    def add(self, iteration: int, sorts: Sequence[str], time_s: float) -> None:
        """An iteration took `time_s` and counts for these sorts."""
        if self._measures_energy:
            self._open[iteration] = _Open(sorts, time_s)
            self._settle(iteration)
        else:
            self._count(sorts, time_s, None)

    def add_reading(self, mark: Mark) -> None:
        """The counter at a tag (see `begin_tag`, `end_tag`)."""
        iteration, is_end = divmod(mark.tag, 2)
        (self._ended if is_end else self._begun)[iteration] = mark
        self._settle(iteration)

    def forget_before(self, iteration: int) -> None:
        """Drop what is still incomplete from before this iteration (readings that never came)."""
        kept: dict[int, Any]
        for kept in (self._begun, self._ended, self._open):
            for old in [number for number in kept if number < iteration]:
                del kept[old]

    def clear(self, sort: str) -> None:
        """Begin this sort's sum anew."""
        self._sums.pop(sort, None)

    @property
    def totals(self) -> dict[str, Totals]:
        """The sums so far, by sort."""
        return {sort: replace(sums) for sort, sums in self._sums.items()}

    def _settle(self, iteration: int) -> None:
        if iteration in self._open and iteration in self._begun and iteration in self._ended:
            entry = self._open.pop(iteration)
            begin, end = self._begun.pop(iteration), self._ended.pop(iteration)
            energy_j = _energy_j(begin, end, entry.time_s)
            held_s = min(end.capped_s - begin.capped_s, entry.time_s)  # counters of real GPUs run some percent fast
            self._count(entry.sorts, entry.time_s, energy_j, unread=energy_j is None, held_s=held_s)
            if self._on_energy is not None and energy_j is not None:
                self._on_energy(iteration, energy_j)

    def _count(
        self,
        sorts: Sequence[str],
        time_s: float,
        energy_j: float | None,
        unread: bool = False,
        held_s: float = math.nan,
    ) -> None:
        for sort in sorts:
            sums = self._sums.get(sort)
            if sums is None:
                sums = self._sums[sort] = Totals(energy_j=0.0 if self._measures_energy else None)
            sums.iterations += 1
            sums.time_s += time_s
            sums.unread += unread
            if energy_j is not None and sums.energy_j is not None:
                sums.energy_j += energy_j
            if held_s >= 0:
                sums.held_s += held_s
                sums.told_s += time_s


def _energy_j(begin: Mark, end: Mark, time_s: float) -> float | None:
    """Energy between the readings at both ends of an iteration of this length; None where they do not tell."""
    span_s = end.time_s - begin.time_s
    if abs(span_s - time_s) > max(_LATE_S, _LATE_SHARE * time_s):
        return None
    return energy_between_j(CheckedEnergy(begin.energy_j, begin.epoch), CheckedEnergy(end.energy_j, end.epoch), span_s)
