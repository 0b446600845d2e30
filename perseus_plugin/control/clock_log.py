"""Which clock a GPU really had during a stretch of time: what reached the driver, and what was read back. Pure.

A request is no clock: it may wait, be dropped by a full pipe, be refused, or not be honoured.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from math import nan

DEVIATION_MHZ = 20
"""A clock further than this from the one asked for is another one; clocks are rounded to steps of 15 or less."""
_KEPT = 4096


class ClockLog:
    """Follows one GPU; both requests and readings come in order of their times.

    Args:
        top_mhz: the highest clock that is asked for. A GPU need not reach it (power limit, temperature): what it does
            when asked for it is what full clocks are on it.
    """

    def __init__(self, top_mhz: int) -> None:
        self._top_mhz = top_mhz
        self._applied: deque[tuple[float, int | None]] = deque(maxlen=_KEPT)
        self._read: deque[tuple[float, int, float]] = deque(maxlen=_KEPT)

    def applied(self, time_s: float, frequency_mhz: int | None) -> None:
        """The driver has taken a request, None for giving up the lock."""
        self._applied.append((time_s, frequency_mhz))

    def read(self, time_s: float, frequency_mhz: int, capped_s: float = nan) -> None:
        """The clock was read, and with it how long in all the power limit has held the GPU (NaN: unknown)."""
        self._read.append((time_s, frequency_mhz, capped_s))

    def held(self, time_s: float) -> bool | None:
        """Whether the power limit held the GPU around a moment; None: no reading after it has come yet."""
        before = [capped_s for read_s, _, capped_s in self._read if read_s <= time_s]
        after = [capped_s for read_s, _, capped_s in self._read if read_s > time_s]
        return after[-1] > before[-1] if before and after else None

    def confirms(self, frequency_mhz: int | None, begin_s: float, end_s: float) -> bool:
        """Whether the GPU had this clock from begin to end, as far as anybody can know.

        The driver must have taken it before, and nothing else since; and below the top clock it must have been read in
        that time, and nothing above it. A lower reading alone is no contradiction: an idle GPU clocks down; and where
        the power limit held the GPU meanwhile, a lower clock is what asking for this one comes to.

        Args:
            frequency_mhz: the clock, None: no lock.
            begin_s, end_s: the stretch of time.
        """
        in_force: int | None = None
        # From the newest on: asked about the iteration that has just ended, which few of them concern.
        for time_s, mhz in reversed(self._applied):
            if time_s <= begin_s:
                in_force = mhz
                break
            if time_s < end_s and mhz != frequency_mhz:
                return False
        if in_force != frequency_mhz:
            return False
        if frequency_mhz is None or frequency_mhz >= self._top_mhz:
            return True
        since = takewhile(lambda one: one[0] >= begin_s, reversed(self._read))
        within = [(mhz, capped_s) for time_s, mhz, capped_s in since if time_s <= end_s][::-1]
        highest_mhz = max((mhz for mhz, _ in within), default=0)
        held = bool(within) and within[-1][1] > within[0][1]
        return 0 < highest_mhz <= frequency_mhz + DEVIATION_MHZ and (
            held or highest_mhz >= frequency_mhz - DEVIATION_MHZ
        )
