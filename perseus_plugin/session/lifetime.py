"""Who ends a session, what ends with it, and who is told: the one place for all three.

A session ends once: by `end` (the job is over) or by `fail` (an error, on whichever thread). From then on the clock is
given up, and everything that was to be done then has been done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from perseus_plugin.errors import ClockNotFreeError, GpuError, PerseusError

logger = logging.getLogger(__name__)


class Retiring(Protocol):
    """Who holds the clock, see `control.client.ClockHelper`."""

    def retire(self) -> None:
        """Give up the clock for good; returns at once."""
        ...


class Lifetime:
    """Of one session; may be used from any thread.

    Args:
        helper: who holds the clock; None in observe mode.
    """

    def __init__(self, helper: Retiring | None) -> None:
        self._helper = helper
        self._lock = threading.Lock()
        self._ended = False
        self._told: list[Callable[[str], None]] = []
        self._reason: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._ended

    def on_end(self, callback: Callable[[str], None]) -> None:
        """Call this when the session ends, with why it failed, or with nothing; at once if it has ended already.

        What it raises is said, and keeps nobody else from being told.
        """
        with self._lock:
            reason = self._reason
            if reason is None:
                self._told.append(callback)
                return
        _call(callback, reason)

    def end(self) -> bool:
        """The job is over; False if the session had ended before."""
        if not self._give_up_clock():
            return False
        self._tell("")
        return True

    def fail(self, error: Exception) -> None:
        """End the session because of an error: full clocks, one message, training goes on.

        Of a clock that could not be freed, a session that has ended already says so, too: it said something else.
        """
        first = self._give_up_clock()
        if isinstance(error, ClockNotFreeError):
            if first:
                logger.error("perseus is off from here on: %s. Training goes on, at that clock until then", error)
            else:
                logger.error("training goes on, but not at full clocks: %s", error)
        if not first:
            return
        if isinstance(error, ClockNotFreeError):
            pass
        elif isinstance(error, GpuError):
            logger.warning(
                "perseus is off from here on: %s. Training goes on at full clocks; run `perseus doctor` on this "
                "machine",
                error,
            )
        elif isinstance(error, PerseusError):
            logger.warning(
                "perseus is off from here on: %s. Training goes on at full clocks; a restart of the job tries again",
                error,
            )
        else:
            logger.error(
                "perseus is off from here on; training goes on at full clocks. This is a fault of perseus_plugin: "
                "please report it with what follows",
                exc_info=error,
            )
        self._tell(str(error) or repr(error))

    def _give_up_clock(self) -> bool:
        with self._lock:
            before, self._ended = self._ended, True
        if not before and self._helper is not None:
            self._helper.retire()
        return not before

    def _tell(self, reason: str) -> None:
        with self._lock:
            self._reason = reason
            told, self._told = self._told, []
        for callback in told:
            _call(callback, reason)


def _call(callback: Callable[[str], None], reason: str) -> None:
    try:
        callback(reason)
    except Exception as error:  # whoever ends a session may be the training script
        logger.error(
            "not everything of perseus could be taken out of the job; training goes on at full clocks. This is a fault "
            "of perseus_plugin: please report it with what follows",
            exc_info=error,
        )
