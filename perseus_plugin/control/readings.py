"""Which readings of an energy counter can be believed. Pure.

Counters of real GPUs stand still, start again from zero when a driver is reloaded, read zero where they are not
supported, and jump. What a reading says about the time since the one before it is only worth something where the
counter can have done that: never back, never beyond what the card can draw, and never still for long, as a GPU draws
power at all times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FROZEN_S = 2.0
"""Real counters move every 20 to 100 ms; one that has not moved for so long does not measure."""
STILL_S = 0.5
"""An iteration that is longer and moved the counter by nothing was not measured."""
TICK_S = 0.25
"""A tick may bring the energy of so long a time."""
SLACK = 1.25
"""Power limits hold for means over some ms to seconds; short peaks go beyond."""
ANY_LIMIT_W = 2000.0
"""More than any GPU draws: for one whose limit is not known."""


@dataclass(frozen=True, slots=True)
class CheckedEnergy:
    """A reading after the check.

    Attributes:
        energy_j: as read; NaN: not to be believed.
        epoch: only readings of the same epoch may be subtracted; it counts up whenever the counter did what no
            counter does.
    """

    energy_j: float
    epoch: int


class EnergyCheck:
    """Follows one counter.

    Args:
        limit_w: the most that the card may draw (NaN: not known).
    """

    def __init__(self, limit_w: float = math.nan) -> None:
        self._limit_w = limit_w if limit_w > 0 else ANY_LIMIT_W
        self._epoch = 0
        self._last_j: float | None = None
        self._moved_s = self._read_s = math.nan
        self._room_j = 0.0  # what the counter may move by: it fills at the limit, and holds about a tick
        self._froze = False

    def check(self, time_s: float, energy_j: float) -> CheckedEnergy:
        """Look at the next reading, taken at `time_s`."""
        if not (math.isfinite(energy_j) and energy_j > 0):
            self._restart(None, time_s)
            return CheckedEnergy(math.nan, self._epoch)
        if self._last_j is None:
            self._restart(energy_j, time_s, epochs=0)
            return CheckedEnergy(energy_j, self._epoch)
        moved_j, since_s = energy_j - self._last_j, time_s - self._moved_s
        limit_w = SLACK * self._limit_w
        self._room_j = min(self._room_j + limit_w * (time_s - self._read_s), limit_w * (since_s + TICK_S))
        self._read_s = time_s
        if moved_j < 0 or moved_j > self._room_j or (moved_j > 0 and self._froze):
            self._restart(energy_j, time_s)
        elif moved_j > 0:
            self._room_j -= moved_j
            self._last_j, self._moved_s = energy_j, time_s
        elif since_s > FROZEN_S:
            self._froze = True
            return CheckedEnergy(math.nan, self._epoch)
        return CheckedEnergy(energy_j, self._epoch)

    def _restart(self, energy_j: float | None, time_s: float, epochs: int = 1) -> None:
        self._epoch += epochs
        self._last_j, self._moved_s, self._read_s, self._froze = energy_j, time_s, time_s, False
        self._room_j = SLACK * self._limit_w * TICK_S


def energy_between_j(begin: CheckedEnergy, end: CheckedEnergy, span_s: float) -> float | None:
    """Energy between two readings; None where they do not tell.

    Args:
        begin, end: the readings.
        span_s: time between them; over more than many ticks a counter that has not moved is no measurement, while a
            shorter time may lie between two ticks.
    """
    if begin.epoch != end.epoch:
        return None
    energy_j = end.energy_j - begin.energy_j
    if not energy_j >= 0 or (energy_j == 0 and span_s > STILL_S):
        return None
    return energy_j
