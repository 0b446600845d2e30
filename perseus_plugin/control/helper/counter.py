"""Reading a GPU's energy counter for the parent: polled while it asks for that, and when it asks for a mark."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from perseus_plugin.control.readings import CheckedEnergy, EnergyCheck
from perseus_plugin.control.wire import Event, Mark, Tick, Trouble
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import EnergyReading, Gpu

MAX_MARKS = 64
"""Readings that wait; beyond that the oldest are dropped."""
SHORTEST_PAUSE_S = 0.0005
"""Between two polls of the counter, however short an interval was asked for or however long a read takes."""
POLL_AGAIN_S = 2.0
"""From a counter that could not be read to the next try."""
_SAY_AGAIN_S = 60.0  # a counter that comes and goes is not told of more often


class CounterReader:
    """Reads one GPU's counter.

    Args:
        gpu: whose counter.
        tell: takes what the parent is to be told.

    Attributes:
        marks: tags of readings that are still to be made.
        next_poll_s: when to call `work` next.
    """

    def __init__(self, gpu: Gpu, tell: Callable[[Event], None]) -> None:
        self._gpu, self._tell = gpu, tell
        self.marks: deque[int] = deque(maxlen=MAX_MARKS)
        self.next_poll_s = float("inf")
        self._poll_s = 0.0
        self._read_failed_s: float | None = None
        self._energy = EnergyCheck(gpu.power_limit_w())
        self._last_poll: EnergyReading | None = None
        self._polled_epoch = 0

    def poll_every(self, interval_s: float) -> None:
        """Poll it from now on; 0: no more."""
        self._poll_s = interval_s
        self._last_poll = None
        self.next_poll_s = time.monotonic() if interval_s > 0 else float("inf")

    def work(self) -> None:
        """Whatever is due."""
        if self.marks:
            # One at a time: with a driver that takes seconds the pipe's end must not wait behind a queue of readings.
            self._mark(self.marks.popleft())
        if time.monotonic() >= self.next_poll_s:
            self._poll()

    def say_read_failed(self, error: GpuError) -> None:
        """Something of the GPU could not be read; told once in a while."""
        if self._read_failed_s is None:
            self._read_failed_s = time.monotonic()
            self._tell(Trouble("read_failed", str(error), self._read_failed_s))

    def _poll(self) -> None:
        try:
            reading, checked = self._read_energy()
            last = self._last_poll
            if last is not None and reading.energy_j != last.energy_j and checked.epoch == self._polled_epoch:
                clock_mhz = self._gpu.read_clock_mhz()
                seen = (last.time_s, reading.time_s, reading.energy_j, clock_mhz, reading.capped_s)
                self._tell(Tick(*seen, checked.epoch))
        except GpuError as error:
            self.say_read_failed(error)
            self._last_poll = None  # a tick across the gap would be as long as the gap
            self.next_poll_s = time.monotonic() + max(self._poll_s, POLL_AGAIN_S)
            return
        self._last_poll, self._polled_epoch = reading, checked.epoch
        self.next_poll_s = max(self.next_poll_s + self._poll_s, time.monotonic() + SHORTEST_PAUSE_S)

    def _read_energy(self) -> tuple[EnergyReading, CheckedEnergy]:
        reading = self._gpu.read_energy()
        if self._read_failed_s is not None and reading.time_s > self._read_failed_s + _SAY_AGAIN_S:
            self._read_failed_s = None
            self._tell(Trouble("read_again", "the energy counter can be read again", time.monotonic()))
        return reading, self._energy.check(reading.time_s, reading.energy_j)

    def _mark(self, tag: int) -> None:
        try:
            reading, checked = self._read_energy()
            clock_mhz = self._gpu.read_clock_mhz()
        except GpuError as error:
            self.say_read_failed(error)
            return
        self._tell(Mark(tag, reading.time_s, checked.energy_j, clock_mhz, reading.capped_s, checked.epoch))
