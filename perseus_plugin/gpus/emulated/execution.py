"""Stretching a real instruction to the time it would take on the emulated GPU.

The trainer calls `begin` before an instruction's real work and `finish` after it. How far the emulated work
has come is integrated in the GPU's state file over the clock as it really changes, whoever changes it;
`finish` waits until it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import load_class

SLICE_S = 0.002
"""Longest sleep without a look at the clock, unless a clock change takes longer than that to take effect."""
SPIN_S = 0.0003
"""How long before the end to stop sleeping: a sleeper wakes 0.05 to 0.2 ms late."""
CARRY_GAP_S = 0.001
"""Work that begins this soon after `finish` returned follows its predecessor without a gap on a GPU."""
CARRY_LIMIT_S = 0.010
"""A wake-up later than this is not made good: the machine is overloaded, and that should be seen."""
OVERRUN_TOLERANCE_S = 0.0005


@dataclass(frozen=True, slots=True)
class Execution:
    """One finished emulated instruction. Times are `time.monotonic()`.

    Attributes:
        start_s, end_s: its span on the emulated GPU. If it overran, `end_s` is when the CPU was done.
        overran: the real work took longer than the emulated instruction: the CPU is too slow for this
            emulation.
        late_s: how late the waiting process woke up after `end_s` (0 if it overran).
    """

    start_s: float
    end_s: float
    overran: bool
    late_s: float


class EmulatedExecution:
    """Runs instructions on one emulated GPU, one at a time.

    Args:
        gpu: the GPU; anybody may change its clock meanwhile.
        now, sleep: the clock; tests put a virtual one in their place.
    """

    def __init__(
        self,
        gpu: EmulatedGpu,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gpu = gpu
        self._now = now
        self._sleep = sleep
        self._work_id = 0
        self._start_s = 0.0
        self._late_s = 0.0
        self._returned_s = float("-inf")

    def begin(self, kind: str, full_clock_time_s: float, *, carry: bool = True) -> float:
        """Start an instruction that takes `full_clock_time_s` at the highest clock. Returns its start.

        With `carry`, if the last `finish` returned less than a millisecond ago and late, the start is dated
        back by that lateness: on a GPU the next kernel starts when the one before it ends, not when a
        process has woken up.
        """
        now_s = self._now()
        carried_s = self._late_s if carry and now_s - self._returned_s <= CARRY_GAP_S else 0.0
        gpu, load = self._gpu, load_class(kind)
        with gpu.changing() as dynamics:
            dynamics.begin_work(gpu.tables, load, full_clock_time_s, gpu.tables.dynamic_w[load], carried_s)
            self._work_id, self._start_s = dynamics.work_id, dynamics.started_s
        self._late_s = 0.0
        return self._start_s

    def finish(self) -> Execution:
        """Wait until the emulated instruction is done. The GPU waits from then on."""
        gpu = self._gpu
        entered_s = self._now()
        slice_s = max(SLICE_S, gpu.switch_latency_s())
        while True:
            state = gpu.peek()
            if state.work_id != self._work_id or state.work_s <= 0.0:
                break
            left_s = state.completes_s(gpu.tables) - self._now()
            if left_s > SPIN_S:
                self._sleep(min(slice_s, left_s - SPIN_S))
            else:
                self._sleep(0.0)
        done_s = max(self._start_s, state.finished_s)
        overran = entered_s > done_s + OVERRUN_TOLERANCE_S
        end_s = entered_s if overran else done_s
        self._returned_s = self._now()
        late_s = 0.0 if overran else max(0.0, self._returned_s - end_s)
        self._late_s = late_s if late_s <= CARRY_LIMIT_S else 0.0
        return Execution(self._start_s, end_s, overran, late_s)
