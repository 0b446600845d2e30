"""Time and energy of iterations, by sort, on one rank.

Energy comes from counter readings at the beginning and the end of an iteration. The counter moves in ticks, so one
iteration is known to within a tick; the error of a sum over iterations averages out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perseus_plugin.messages import Totals

FULL_CLOCK = "full_clock"
PROFILING = "profiling"
PLAN = "plan"
STRAGGLER = "straggler"
RECHECK = "recheck"
"""Full clocks measured again after a plan was dropped: the reference from then on."""


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
        self._begun: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._open: dict[int, _Open] = {}
        self._totals: dict[str, Totals] = {}

    def add(self, iteration: int, sorts: Sequence[str], time_s: float) -> None:
        """An iteration took `time_s` and counts for these sorts."""
        if self._measures_energy:
            self._open[iteration] = _Open(sorts, time_s)
            self._settle(iteration)
        else:
            self._count(sorts, time_s, None)

    def add_reading(self, tag: int, energy_j: float) -> None:
        """The counter's value at a tag (see `begin_tag`, `end_tag`)."""
        iteration, is_end = divmod(tag, 2)
        (self._ended if is_end else self._begun)[iteration] = energy_j
        self._settle(iteration)

    def forget_before(self, iteration: int) -> None:
        """Drop what is still incomplete from before this iteration (readings that never came)."""
        kept: dict[int, Any]
        for kept in (self._begun, self._ended, self._open):
            for old in [number for number in kept if number < iteration]:
                del kept[old]

    def clear(self, sort: str) -> None:
        """Begin this sort's sum anew."""
        self._totals.pop(sort, None)

    @property
    def totals(self) -> dict[str, Totals]:
        """The sums so far, by sort."""
        return dict(self._totals)

    def _settle(self, iteration: int) -> None:
        if iteration in self._open and iteration in self._begun and iteration in self._ended:
            energy_j = self._ended.pop(iteration) - self._begun.pop(iteration)
            entry = self._open.pop(iteration)
            self._count(entry.sorts, entry.time_s, energy_j)
            if self._on_energy is not None:
                self._on_energy(iteration, energy_j)

    def _count(self, sorts: Sequence[str], time_s: float, energy_j: float | None) -> None:
        for sort in sorts:
            old = self._totals.get(sort, Totals(energy_j=None if energy_j is None else 0.0))
            both = None if energy_j is None or old.energy_j is None else old.energy_j + energy_j
            self._totals[sort] = Totals(iterations=old.iterations + 1, time_s=old.time_s + time_s, energy_j=both)
