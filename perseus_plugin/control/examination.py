"""Whether plans could be made for a GPU, known before anything is profiled: what the job and `perseus doctor` ask."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from perseus_plugin.control.wire import SwitchLatency
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import Gpu

COUNTER_WATCH_S = 1.5
"""How long a counter may stand still; real ones move every 20 to 100 ms, also while the GPU is idle."""
_POLL_S = 0.002


def counter_problem(
    gpu: Gpu, *, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> str:
    """What is wrong with a GPU's energy counter; empty if it moves. Returns as soon as that is known."""
    try:
        first = gpu.read_energy()
        end_s = now() + COUNTER_WATCH_S
        last = first
        while last.energy_j == first.energy_j:
            if now() >= end_s:
                if first.energy_j == 0:
                    return f"the energy counter read 0 J for {COUNTER_WATCH_S} s"
                return f"the energy counter did not move within {COUNTER_WATCH_S} s"
            sleep(_POLL_S)
            last = gpu.read_energy()
    except GpuError as error:
        return f"the energy counter cannot be read ({error})"
    return ""


def why_not_obeyed(latency: SwitchLatency) -> str:
    """Why a GPU whose clock changes were timed is not one to plan for, with what would help; empty if it is. Pure."""
    if latency.timeouts < latency.samples or not latency.samples:
        return ""
    return (
        f"the driver takes locks but the clock does not follow (none of {latency.samples} changes was seen); look for "
        "power or thermal limits and other programs that set clocks (`nvidia-smi -q -d PERFORMANCE`)"
    )


def why_not_planned(clocks_mhz: Sequence[int], counter: str, *, has_profile: bool = False) -> str:
    """Why no plan can be made for a GPU whose clock can be locked, with what would help; empty if one can. Pure.

    Args:
        clocks_mhz: that can be locked.
        counter: see `counter_problem`.
        has_profile: a profile is given, so that no energy need be measured.
    """
    if len(set(clocks_mhz)) < 2:
        clocks = ", ".join(str(clock) for clock in clocks_mhz) or "none"
        return f"there is nothing to choose between its SM clocks ({clocks} MHz); nothing needs to be done"
    if counter and not has_profile:
        return (
            f"{counter}, so no energies can be measured; give a profile that was measured on such a GPU "
            "(perseus.profiling.load)"
        )
    return ""
