"""Giving up a clock lock until it is certain: locks outlive the process that made them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu

READ_BACK_S = 0.3
"""How long the clock may stay where it was locked before the reset is tried again."""
FIRST_PAUSE_S = 0.005
LONGEST_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class ResetOutcome:
    """How a reset went.

    Attributes:
        confirmed: the driver accepted it, and the clock no longer reads the locked value.
        attempts: driver calls made.
        problem: what was wrong last, for people; empty if confirmed.
    """

    confirmed: bool
    attempts: int
    problem: str


def reset_until_confirmed(
    gpu: Gpu,
    locked_mhz: int | None,
    *,
    limit_s: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ResetOutcome:
    """Reset the clock, and again with growing pauses, until it holds or `limit_s` is over. Never raises
    `GpuError`.

    Args:
        gpu: whose clock.
        locked_mhz: the clock it was locked at last; the read-back must leave it. None, or the highest clock:
            there is nothing to tell a reset by, so the driver's word is enough.
        limit_s: when to give up; at least one attempt is made.
    """
    end_s = now() + limit_s
    pause_s = FIRST_PAUSE_S
    attempts = 0
    while True:
        attempts += 1
        try:
            gpu.reset_clock()
            if _has_left(gpu, locked_mhz, now, sleep):
                return ResetOutcome(True, attempts, "")
            problem = f"the driver accepted the reset but the clock still reads {locked_mhz} MHz"
        except GpuError as error:
            problem = str(error)
        if now() + pause_s > end_s:
            return ResetOutcome(False, attempts, problem)
        sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _has_left(gpu: Gpu, locked_mhz: int | None, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    if locked_mhz is None or locked_mhz >= gpu.supported_clocks_mhz()[0]:
        return True
    end_s = now() + READ_BACK_S
    while gpu.read_clock_mhz() == locked_mhz:
        if now() >= end_s:
            return False
        sleep(0.002)
    return True
