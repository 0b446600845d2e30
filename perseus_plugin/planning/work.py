"""How much a search may do: counted, so that the same input gives the same plan however busy the machine is.

Costs below are what a piece of work takes on one core of a common server, measured once; they only decide how far a
search goes, and need not be right for the machine at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from perseus_plugin.planning.targets import Effort

logger = logging.getLogger(__name__)

BRAKE_S: dict[Effort, float] = {"quick": 300.0, "normal": 1200.0, "thorough": 7200.0}
"""Seconds after which the clock ends a search whatever it has done: some fifty times what one usually takes."""

SMALL = 64
"""A job of at most so many instructions is searched as a whole, at any effort."""
WORTH_REFINING = 0.001
"""Share of energy that a search in the background has to save for a running job to go over to what it found."""

CP_SAT = 1.5  # per unit of its deterministic time


class Work:
    """What one search has done, in units of about a second, and the clock as its last brake.

    Args:
        brake_s: seconds from now after which the clock ends the search.
        clock: in seconds, never goes back; None: the system's.
        tell: told now and then how many units have been done since it was told last; None: nobody.

    Attributes:
        done: units so far; searches add what they do.
        cut_short: whether the brake has acted: the result is valid, but depends on how fast the machine was.
    """

    def __init__(
        self,
        brake_s: float,
        clock: Callable[[], float] | None = None,
        tell: Callable[[float], None] | None = None,
    ) -> None:
        self.done = 0.0
        self.cut_short = False
        self._tell, self._told = tell, 0.0
        self._clock = clock or monotonic
        self._end_s = self._clock() + brake_s

    def over(self, until: float) -> bool:
        """Whether `until` units are done, or the brake acts; to be asked where there is something left to do."""
        if self._tell is not None:
            self._tell(self.done - self._told)
            self._told = self.done
        return self.done >= until or self.brake_acts()

    def brake_acts(self) -> bool:
        """Whether the clock ends the search; to be asked where it was not ended by what it has done."""
        self.cut_short = self.cut_short or self._clock() >= self._end_s
        return self.cut_short

    @property
    def solver_limit_s(self) -> float:
        """Limit for a solver's own clock: well after the brake, so that one who is stopped by it sees the brake act."""
        return 10.0 + 2 * max(0.0, self._end_s - self._clock())


def tell_cut_short() -> None:
    """Say that a brake has acted."""
    logger.warning(
        "a search for a plan was cut short by the clock, as this machine is very busy or slow: the plan is valid, but "
        "may save less than it could, and another run may find another one. Nothing needs to be done (a lower effort "
        "searches less)"
    )
