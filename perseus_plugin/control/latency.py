"""Measuring how long a clock change takes to take effect."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from perseus_plugin.control.wire import SwitchLatency
from perseus_plugin.gpus.base import Gpu

POLL_S = 0.0002
TIMEOUT_S = 0.5
REST_S = 0.02
"""Between two changes, so that one is over before the next is timed."""


def measure_switch_latency(
    gpu: Gpu,
    rounds: int,
    *,
    stop: Callable[[], bool] = lambda: False,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> SwitchLatency:
    """Go down and up `rounds` times between the highest clock and about 60 % of it; the lock is left at the
    top.

    A change that does not read its target within half a second counts as a timeout.

    Args:
        gpu: whose clock to change.
        rounds: pairs of changes, at least 1.
        stop: looked at between changes; True ends the measurement early.

    Raises:
        GpuError: a call failed.
    """
    clocks = gpu.supported_clocks_mhz()
    top = clocks[0]
    low = min(clocks, key=lambda clock: abs(clock - 0.6 * top))
    seen: list[float] = []
    timeouts = 0
    gpu.lock_clock(top)
    _wait_for(gpu, top, now, sleep)
    for _ in range(rounds):
        for target in (low, top):
            if stop():
                break
            sleep(REST_S)
            took_s = _change(gpu, target, now, sleep)
            if math.isnan(took_s):
                timeouts += 1
            else:
                seen.append(took_s)
    return SwitchLatency(percentile(seen, 0.5), percentile(seen, 0.95), len(seen) + timeouts, timeouts)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _change(gpu: Gpu, target: int, now: Callable[[], float], sleep: Callable[[float], None]) -> float:
    begin_s = now()
    gpu.lock_clock(target)
    return _wait_for(gpu, target, now, sleep) - begin_s


def _wait_for(gpu: Gpu, target: int, now: Callable[[], float], sleep: Callable[[float], None]) -> float:
    """When the clock first reads `target`; NaN after the timeout."""
    end_s = now() + TIMEOUT_S
    while gpu.read_clock_mhz() != target:
        if now() >= end_s:
            return math.nan
        sleep(POLL_S)
    return now()
