"""Waiting at a lower clock, and being back in time: how long the waits of a plan really are on one rank. Pure.

A plan says after which instructions a stage waits, and at which clock it then waits best. How long a wait is, the rank
sees for itself: peers are late or early, and no graph knows all of it. So the first iterations under a plan are only
watched, and from then on the clock rises again as if the wait were as short as the shortest of late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from perseus_plugin.exchange.messages import WaitPart

_WATCHED = 2  # iterations before a wait is trusted
_ROUNDING_S = 1e-6
_OF_LATE = 16  # iterations whose shortest wait counts


class Lowering(NamedTuple):
    """What to do in a wait.

    Attributes:
        frequency_mhz: clock to wait at.
        from_s: when to ask for it.
        until_s: when to ask for the clock that follows.
    """

    frequency_mhz: int
    from_s: float
    until_s: float


class Waits:
    """The waits of one stage's plan. Called at instruction boundaries: cheap.

    Args:
        parts: the plan's, with a clock of their own.
    """

    def __init__(self, parts: Sequence[WaitPart]) -> None:
        self._parts = {part.after: part for part in parts}
        self._seen_s: dict[int, deque[float]] = {part.after: deque(maxlen=_OF_LATE) for part in parts}
        self._open: tuple[int, float] | None = None
        self._back_s = 0.0

    def lowers(self, after: int, lead_s: float) -> bool:
        """Whether the wait after this position is going to be spent at a clock of its own."""
        return self._low_s(after, lead_s) is not None

    def _low_s(self, after: int, lead_s: float) -> tuple[float, float] | None:
        """When to ask for the wait's clock and for the one that follows, since the instruction's end."""
        part, seen_s = self._parts.get(after), self._seen_s.get(after)
        if part is None or seen_s is None or lead_s <= 0 or len(seen_s) < _WATCHED:
            return None
        until_s = min(seen_s) - part.work_after_s - lead_s
        # Down, and up again before the end: shorter than that, and it would be over before it has begun.
        return (part.work_before_s, until_s) if until_s - part.work_before_s > lead_s else None

    def begin(self, after: int, now_s: float, lead_s: float) -> Lowering | None:
        """The instruction at this position has ended (-1: an iteration has begun), and a wait may follow.

        Args:
            after: position.
            now_s: when.
            lead_s: how long a clock change takes; 0: unknown, and no clock is lowered.

        Returns:
            None: the clock stays.
        """
        self._open = (after, now_s) if after in self._parts else None
        self._back_s = 0.0
        low_s = self._low_s(after, lead_s)
        if low_s is None:
            return None
        return Lowering(self._parts[after].frequency_mhz, now_s + low_s[0], now_s + low_s[1])

    def back_at(self, time_s: float) -> None:
        """The clock has been lowered, and will be back by then."""
        self._back_s = time_s

    def end(self, now_s: float) -> bool:
        """The next instruction has begun, or the iteration has ended: the wait that was open, if any, is over.

        Returns:
            Whether that was before the clock was back.
        """
        if self._open is None:
            return False
        after, began_s = self._open
        self._seen_s[after].append(now_s - began_s)
        self._open = None
        return now_s < self._back_s - _ROUNDING_S
