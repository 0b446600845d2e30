"""Giving up a clock lock until it is certain: locks outlive the process that made them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from perseus_plugin.control.ownership import Ownership
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu
from perseus_plugin.gpus.registry import EMULATED

READ_BACK_S = 0.3
"""How long the clock may stay where it was locked before the reset is tried again."""
_LOOK_S = 0.002
FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class ResetOutcome:
    """How a reset went.

    Attributes:
        confirmed: the driver accepted it, and the clock no longer reads the locked value.
        problem: what was wrong last, for people; empty if confirmed.
    """

    confirmed: bool
    problem: str


class ClockReset:
    """Resets the clock, and again with growing pauses, until it holds: step by step, a driver call or two each.

    Args:
        gpu: whose clock.
        locked_mhz: the clock it was locked at last; the read-back must leave it. None, or the highest clock:
            there is nothing to tell a reset by, so the driver's word is enough.
        limit_s: when to give up, counted from the first step; at least one attempt is made.
        begin_s: when the first step is due.

    Attributes:
        next_s: when to call `step` next.
    """

    def __init__(self, gpu: Gpu, locked_mhz: int | None, *, limit_s: float, begin_s: float = 0.0) -> None:
        self._gpu, self._limit_s = gpu, limit_s
        top_mhz = gpu.supported_clocks_mhz()[0]
        self._locked_mhz = None if locked_mhz is None or locked_mhz >= top_mhz else locked_mhz
        self._end_s: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._problem = ""
        self._must_leave_by_s: float | None = None
        self.next_s = begin_s

    def step(self, now_s: float) -> ResetOutcome | None:
        """Go on; returns how it went once it is over. Never raises `GpuError`."""
        if self._end_s is None:
            self._end_s = now_s + self._limit_s
        try:
            if self._must_leave_by_s is None:
                self._gpu.reset_clock()
                self._must_leave_by_s = now_s + READ_BACK_S
            if self._locked_mhz is None or self._gpu.read_clock_mhz() != self._locked_mhz:
                return ResetOutcome(True, "")
            if now_s < self._must_leave_by_s:
                self.next_s = now_s + _LOOK_S
                return None
            self._problem = f"the driver accepted the reset but the clock still reads {self._locked_mhz} MHz"
        except GpuError as error:
            self._problem = str(error)
        self._must_leave_by_s = None
        if now_s + self._pause_s > self._end_s:
            return ResetOutcome(False, self._problem)
        self.next_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return None


def reset_until_confirmed(
    gpu: Gpu,
    locked_mhz: int | None,
    *,
    limit_s: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ResetOutcome:
    """A whole `ClockReset`, for callers with nothing else to do. Never raises `GpuError`."""
    resetting = ClockReset(gpu, locked_mhz, limit_s=limit_s)
    while (outcome := resetting.step(now())) is None:
        sleep(max(0.0, resetting.next_s - now()))
    return outcome


def free_clock(gpu: Gpu, ownership: Ownership, locked_mhz: int | None, *, limit_s: float) -> ResetOutcome:
    """Reset the clock until it holds, and note in the lock file whether it is free."""
    outcome = reset_until_confirmed(gpu, locked_mhz, limit_s=limit_s)
    ownership.mark(locked=not outcome.confirmed)
    return outcome


def not_free(spec: str, uuid: str, locked_mhz: int | None, problem: str) -> str:
    """What is said of a clock that is not known to be free, with the command that frees it.

    Args:
        spec, uuid: of the GPU.
        locked_mhz: the clock it was locked at last, None if that is not known.
        problem: what was wrong with freeing it.
    """
    name, _, rest = spec.partition(":")
    which = f"--emulated {rest}" if name == EMULATED else f"--gpu {uuid}"
    at = f" at {locked_mhz} MHz" if locked_mhz else ""
    return f"the SM clock may still be locked{at}: {problem}; free it with `perseus reset --force {which}`"
