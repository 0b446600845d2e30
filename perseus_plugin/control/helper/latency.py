"""Measuring how long a clock change takes to take effect, step by step. Pure: who has the GPU does what it says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from perseus_plugin.control.clock_log import DEVIATION_MHZ
from perseus_plugin.control.wire import SwitchLatency
from perseus_plugin.gpus.base import Gpu

POLL_S = 0.0002
TIMEOUT_S = 0.5
REST_S = 0.02
"""Between two changes, so that one is over before the next is timed."""
_LOW_SHARE = 0.6
_DOWN_SHARE = 0.85
_MOST_TRIES = 4
_MOST_TIMEOUTS = 3
"""After so many changes that were never seen more would not help, and cost half a second each."""


class LatencyMeasurement:
    """Goes down and up between a high clock that this GPU really reaches and about 60 % of it.

    The high clock is the highest one, or, on a GPU that does not reach that (a power limit, a thermal one), the next
    lower of a few that it does. A change that does not read its target within half a second counts as a timeout. The
    whole takes `rounds` times twice a change and a rest, and at most some seconds on a GPU that obeys nothing.

    Args:
        clocks_mhz: supported clocks, falling.
        rounds: pairs of changes, at least 1.

    Attributes:
        next_s: when to call `step` next.
        done: whether it is over; nothing is to be done any more.
    """

    def __init__(self, clocks_mhz: Sequence[int], rounds: int) -> None:
        self._clocks_mhz = clocks_mhz
        self._rounds = rounds
        self._seen_s: list[float] = []
        self._timeouts = self._tries = self._turns = 0
        self._left = True  # whether the last change got to its target, so that the next one has something to leave
        self._high_mhz = clocks_mhz[0]
        self._low_mhz = 0  # not chosen yet: the high clock is still to be found
        self._target_mhz = 0  # of the change that is under way, 0 while resting
        self._asked_s = 0.0
        self._highest_read_mhz = 0
        self.next_s = 0.0
        self.done = False

    @property
    def reads(self) -> bool:
        """Whether the next step wants a reading of the clock."""
        return bool(self._target_mhz)

    def step(self, now_s: float, read_mhz: int | None = None) -> int | None:
        """Go on.

        Args:
            now_s: the time, just before a clock that is returned is asked for, or just after one was read.
            read_mhz: the clock as just read, where `reads` says so.

        Returns:
            The clock to ask for now; None: nothing.
        """
        if self.done:
            return None
        if not self._target_mhz:
            return self._ask(now_s)
        assert read_mhz is not None  # `reads` says so
        self._highest_read_mhz = max(self._highest_read_mhz, read_mhz)
        reached = abs(read_mhz - self._target_mhz) <= DEVIATION_MHZ
        if not reached and now_s < self._asked_s + TIMEOUT_S:
            self.next_s = now_s + POLL_S
            return None
        if self._low_mhz:
            self._count(now_s, reached)
        else:
            self._choose(reached)
        self._target_mhz, self.next_s = 0, now_s + REST_S
        return None

    def outcome(self) -> SwitchLatency:
        """What has been measured so far."""
        samples = len(self._seen_s) + self._timeouts
        return SwitchLatency(percentile(self._seen_s, 0.5), percentile(self._seen_s, 0.95), samples, self._timeouts)

    def _ask(self, now_s: float) -> int:
        if not self._low_mhz:
            self._target_mhz = self._high_mhz
        else:
            self._target_mhz = self._high_mhz if self._turns % 2 else self._low_mhz
        self._asked_s = self.next_s = now_s
        return self._target_mhz

    def _count(self, now_s: float, reached: bool) -> None:
        if not reached:
            self._timeouts += 1
        elif self._left:  # else it stood there all the while: nothing was seen to change
            self._seen_s.append(now_s - self._asked_s)
        self._left = reached
        self._turns += 1
        self.done = self._timeouts >= _MOST_TIMEOUTS or self._turns >= 2 * self._rounds

    def _choose(self, reached: bool) -> None:
        """The high clock was tried: keep it, or try one that the readings make likely."""
        self._tries += 1
        if reached or self._tries == _MOST_TRIES:
            self._low_mhz = min(self._clocks_mhz, key=lambda clock: abs(clock - _LOW_SHARE * self._high_mhz))
            self.done = self._low_mhz == self._high_mhz  # one clock: there is nothing to change
            return
        likely_mhz = _DOWN_SHARE * min(self._high_mhz, self._highest_read_mhz or self._high_mhz)
        self._high_mhz = next((clock for clock in self._clocks_mhz if clock <= likely_mhz), self._clocks_mhz[-1])
        self._highest_read_mhz = 0


def advance(measurement: LatencyMeasurement, gpu: Gpu, now: Callable[[], float] = time.monotonic) -> None:
    """Do one step of a measurement on a GPU: one driver call.

    Raises:
        GpuError: the call failed.
    """
    if measurement.reads:
        read_mhz = gpu.read_clock_mhz()
        measurement.step(now(), read_mhz)
        return
    target_mhz = measurement.step(now())
    if target_mhz is not None:
        gpu.lock_clock(target_mhz)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
