"""What the clock helper does between its start and its end: take commands, set clocks, read counters.

It sleeps in `select` until a command arrives or something is due, never waits for its parent to read, and does nothing
that takes longer than a driver call: what takes many (timing clock changes, a reset that does not hold) goes on step by
step, between whatever else is due.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from contextlib import suppress

from perseus_plugin.control.clock_log import DEVIATION_MHZ
from perseus_plugin.control.helper.latency import LatencyMeasurement, advance
from perseus_plugin.control.helper.resetting import ClockReset, ResetOutcome, reset_until_confirmed
from perseus_plugin.control.ownership import Ownership
from perseus_plugin.control.readings import CheckedEnergy, EnergyCheck
from perseus_plugin.control.requests import PendingRequests, Request
from perseus_plugin.control.wire import (
    AT_ONCE_AND_LAST,
    CLOSE,
    HEARTBEAT,
    MARK,
    MEASURE_LATENCY,
    POLL_ENERGY,
    SET_CLOCK,
    Applied,
    Command,
    Deviation,
    Event,
    Mark,
    Tick,
    Trouble,
    WireError,
    pack_event,
    pack_reply,
    split_commands,
)
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import DWELL_LATENCIES, EnergyReading, Gpu

MAX_MARKS = 64
"""Readings that wait; beyond that the oldest are dropped."""
HEARTBEAT_S = 1.0
PARENT_CHECK_S = 0.1
"""How often to look whether the parent lives where the kernel has no pidfd (before 5.3)."""
DEVIATION_REPORT_S = 1.0
READ_AGAIN_S = 1.0
LOOKS_ABOVE = 2
GIVE_UP_RESET_S = 0.5
SHORTEST_PAUSE_S = 0.0005
"""Between two polls of the counter, however short an interval was asked for or however long a read takes."""
POLL_AGAIN_S = 2.0
"""From a counter that could not be read to the next try."""
_SAY_AGAIN_S = 60.0  # a counter that comes and goes is not told of more often


class Parent:
    """The process whose death ends the helper, even while a fork of it holds the pipe open."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.fd = -1
        with suppress(OSError, AttributeError):
            self.fd = os.pidfd_open(pid)

    def gone(self) -> bool:
        """Whether it has died."""
        if os.getppid() != self._pid:
            return True
        return self.fd >= 0 and bool(select.select([self.fd], [], [], 0)[0])


class HelperLoop:
    """Serves one parent.

    Args:
        gpu: whose clock.
        ownership: the held lock file; None: clocks are not to be set.
        parent: its death ends the loop.
        inlet, outlet: file descriptors of commands and replies, both non-blocking.
        wakeup: file descriptor that becomes readable when a signal arrives.
        min_dwell_s: shortest time between two clock changes; None: follows from the switch latency once that was
            measured.
        settle_s: time after a change until the clock is read back, and every second from then on; 0: never.
        gives_way: see `ClockHelper.start`.
    """

    def __init__(
        self,
        gpu: Gpu,
        ownership: Ownership | None,
        parent: Parent,
        *,
        inlet: int,
        outlet: int,
        wakeup: int,
        min_dwell_s: float | None,
        settle_s: float,
        gives_way: bool = False,
    ) -> None:
        self._gives_way = gives_way
        self._above = 0
        self._gpu, self._ownership, self._parent = gpu, ownership, parent
        self._may_set = ownership is not None
        self._inlet, self._outlet, self._wakeup = inlet, outlet, wakeup
        self._requests = PendingRequests(min_dwell_s or 0.0)
        self._measure_dwell = min_dwell_s is None
        self._settle_s = settle_s
        self._buffer = bytearray()
        self._marks: deque[int] = deque(maxlen=MAX_MARKS)
        self._read_failed_s: float | None = None
        self._ended = ""
        self._poll_s = 0.0
        self._next_poll_s = float("inf")
        self._energy = EnergyCheck(gpu.power_limit_w())
        self._last_poll: EnergyReading | None = None
        self._polled_epoch = 0
        self._read_back_s = float("inf")
        self._expected_mhz: int | None = None
        self._next_deviation_s = 0.0
        self._next_heartbeat_s = 0.0
        self._timing: LatencyMeasurement | None = None
        self._resetting: ClockReset | None = None
        self.locked_mhz: int | None = None

    def run(self) -> str:
        """Serve until something ends it; returns what. The clock is as it was set last."""
        if self._parent.gone():
            return "parent died"
        watched = [fd for fd in (self._inlet, self._wakeup, self._parent.fd) if fd >= 0]
        while not self._ended:
            readable = select.select(watched, [], [], self._timeout_s())[0]
            if self._wakeup in readable:
                return "signal"
            if self._parent.fd in readable or (self._parent.fd < 0 and self._parent.gone()):
                return "parent died"
            if self._inlet in readable:
                self._read()
            self._work()
        return self._ended

    def emit(self, reply: bytes) -> None:
        """Send a reply; dropped if the parent does not read."""
        with suppress(OSError):
            os.write(self._outlet, reply)

    def _event(self, event: Event) -> None:
        self.emit(pack_event(event))

    def _timeout_s(self) -> float:
        times = [self._next_poll_s, self._read_back_s, self._next_heartbeat_s]
        # While changes are timed requests wait, as nothing else may change the clock.
        times.append(self._timing.next_s if self._timing is not None else self._requests.next_s() or float("inf"))
        if self._resetting is not None:
            times.append(self._resetting.next_s)
        if self._marks:
            return 0.0
        timeout_s = max(0.0, min(times) - time.monotonic())
        return timeout_s if self._parent.fd >= 0 else min(timeout_s, PARENT_CHECK_S)

    def _read(self) -> None:
        try:
            data = os.read(self._inlet, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._ended = "end of the pipe"
            return
        self._buffer += data
        try:
            for command in split_commands(self._buffer):
                self._execute(command)
        except WireError as error:
            self._event(Trouble("protocol", str(error), time.monotonic()))
            self._ended = "garbage on the pipe"

    def _execute(self, command: Command) -> None:
        if command.what == SET_CLOCK:
            if command.time_s == AT_ONCE_AND_LAST:
                self._end_timing()
            if self._may_set:
                self._requests.push(Request(command.seq, command.number or None, command.sent_s, command.time_s))
        elif command.what == POLL_ENERGY:
            self._poll_s = command.time_s
            self._last_poll = None
            self._next_poll_s = time.monotonic() if command.time_s > 0 else float("inf")
        elif command.what == MARK:
            self._marks.append(command.number)
        elif command.what == MEASURE_LATENCY:
            self._begin_timing(command.number)
        elif command.what == CLOSE:
            self._ended = "closed"

    def _work(self) -> None:
        """Whatever is due."""
        if self._timing is not None:
            self._go_on_timing(self._timing)
        else:
            request = self._requests.take(time.monotonic())
            if request is not None:
                self._apply(request)
        if self._resetting is not None and time.monotonic() >= self._resetting.next_s:
            self._go_on_resetting(self._resetting)
        if self._marks:
            # One at a time: with a driver that takes seconds the pipe's end must not wait behind a queue of readings.
            self._mark(self._marks.popleft())
        now_s = time.monotonic()
        if now_s >= self._next_poll_s:
            self._poll()
        if now_s >= self._read_back_s:
            self._read_back()
        if now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + HEARTBEAT_S
            self.emit(pack_reply(HEARTBEAT))

    def _apply(self, request: Request) -> None:
        mhz = request.frequency_mhz
        called_s = time.monotonic()
        try:
            self._set_clock(mhz)
        except GpuError as error:
            self._give_up_control(str(error))
            return
        applied_s = time.monotonic()
        self._requests.set(mhz, applied_s)
        self._expected_mhz, self._above = mhz, 0
        self._read_back_s = applied_s + self._settle_s if mhz and self._settle_s > 0 else float("inf")
        self._event(Applied(request.seq, mhz, request.requested_s, request.apply_at_s, called_s, applied_s))

    def _set_clock(self, mhz: int | None) -> None:
        if mhz is None:
            self._gpu.reset_clock()
            self.locked_mhz = None
            return
        if self._ownership is not None:
            self._ownership.mark(locked=True)
        self.locked_mhz = mhz
        self._gpu.lock_clock(mhz)

    def _give_up_control(self, reason: str) -> None:
        """A clock could not be set: full clocks from here on, if the driver lets us, and no further try."""
        self._may_set = False
        self._event(Trouble("lock_failed", reason, time.monotonic()))
        self._timing = None
        self._requests.clear()
        self._read_back_s = float("inf")
        if self._ownership is not None:
            self._resetting = ClockReset(self._gpu, self.locked_mhz, limit_s=GIVE_UP_RESET_S)

    def _go_on_resetting(self, resetting: ClockReset) -> None:
        outcome = resetting.step(time.monotonic())
        if outcome is not None:
            self._resetting = None
            # What has not held by now is tried again at the end, for longer.
            if outcome.confirmed and self._ownership is not None:
                self._ownership.mark(locked=False)

    def _poll(self) -> None:
        try:
            reading, checked = self._read_energy()
            last = self._last_poll
            if last is not None and reading.energy_j != last.energy_j and checked.epoch == self._polled_epoch:
                clock_mhz = self._gpu.read_clock_mhz()
                seen = (last.time_s, reading.time_s, reading.energy_j, clock_mhz, reading.capped_s)
                self._event(Tick(*seen, checked.epoch))
        except GpuError as error:
            self._say_read_failed(error)
            self._last_poll = None  # a tick across the gap would be as long as the gap
            self._next_poll_s = time.monotonic() + max(self._poll_s, POLL_AGAIN_S)
            return
        self._last_poll, self._polled_epoch = reading, checked.epoch
        self._next_poll_s = max(self._next_poll_s + self._poll_s, time.monotonic() + SHORTEST_PAUSE_S)

    def _read_energy(self) -> tuple[EnergyReading, CheckedEnergy]:
        reading = self._gpu.read_energy()
        if self._read_failed_s is not None and reading.time_s > self._read_failed_s + _SAY_AGAIN_S:
            self._read_failed_s = None
            self._event(Trouble("read_again", "the energy counter can be read again", time.monotonic()))
        return reading, self._energy.check(reading.time_s, reading.energy_j)

    def _mark(self, tag: int) -> None:
        try:
            reading, checked = self._read_energy()
            clock_mhz = self._gpu.read_clock_mhz()
        except GpuError as error:
            self._say_read_failed(error)
            return
        self._event(Mark(tag, reading.time_s, checked.energy_j, clock_mhz, reading.capped_s, checked.epoch))

    def _say_read_failed(self, error: GpuError) -> None:
        if self._read_failed_s is None:
            self._read_failed_s = time.monotonic()
            self._event(Trouble("read_failed", str(error), self._read_failed_s))

    def _begin_timing(self, rounds: int) -> None:
        if self._ownership is None or not self._may_set:
            return
        self._ownership.mark(locked=True)
        self.locked_mhz = self._gpu.supported_clocks_mhz()[0]
        self._timing = LatencyMeasurement(self._gpu.supported_clocks_mhz(), rounds)

    def _go_on_timing(self, timing: LatencyMeasurement) -> None:
        try:
            if time.monotonic() >= timing.next_s:
                advance(timing, self._gpu)
        except GpuError as error:
            self._give_up_control(str(error))
            return
        if timing.done:
            self._end_timing()

    def _end_timing(self) -> None:
        """Give the clock back, and say what was measured."""
        timing, self._timing = self._timing, None
        if timing is None:
            return
        try:
            self._set_clock(None)
        except GpuError as error:
            self._give_up_control(str(error))
            return
        event = timing.outcome()
        if self._measure_dwell and event.p95_s > 0:  # NaN when no change ever showed
            self._requests.dwell(DWELL_LATENCIES * event.p95_s)
        if self._settle_s > 0 and event.p95_s > 0:  # what is still under way is no deviation
            self._settle_s = max(self._settle_s, DWELL_LATENCIES * event.p95_s)
        self._requests.set(None, time.monotonic())
        self._event(event)

    def _read_back(self) -> None:
        self._read_back_s = float("inf")
        expected = self._expected_mhz
        if expected is None:
            return
        try:
            read_mhz = self._gpu.read_clock_mhz()
        except GpuError as error:
            self._say_read_failed(error)
            return
        if not 0 < read_mhz <= self._gpu.supported_clocks_mhz()[0] + DEVIATION_MHZ:
            self._read_back_s = time.monotonic() + READ_AGAIN_S  # no clock that a GPU has: that tells nothing
            return
        now_s = time.monotonic()
        self._read_back_s = now_s + READ_AGAIN_S
        if read_mhz <= expected + DEVIATION_MHZ:
            self._above = 0
            if read_mhz < expected - DEVIATION_MHZ:
                self._say_deviation(now_s, expected, read_mhz)
            return
        # Nothing but another lock, or none, makes a GPU faster than it was asked to be. A second look, as a change that
        # somebody makes just now may still be under way.
        self._above += 1
        self._read_back_s = now_s + max(self._settle_s, SHORTEST_PAUSE_S)
        if self._above >= LOOKS_ABOVE:
            self._above = 0
            self._read_back_s = now_s + READ_AGAIN_S
            self._say_deviation(now_s, expected, read_mhz)
            self._changed_from_outside(expected, read_mhz)

    def _say_deviation(self, now_s: float, expected_mhz: int, read_mhz: int) -> None:
        if now_s >= self._next_deviation_s:
            self._next_deviation_s = now_s + DEVIATION_REPORT_S
            self._event(Deviation(now_s, expected_mhz, read_mhz))

    def _changed_from_outside(self, expected_mhz: int, read_mhz: int) -> None:
        if not self._gives_way:
            try:
                self._gpu.lock_clock(expected_mhz)
            except GpuError as error:
                self._give_up_control(str(error))
            return
        # Whoever it was shall have the clock as they set it: nothing is reset either.
        self._may_set, self._timing, self._expected_mhz = False, None, None
        self._requests.clear()
        self._read_back_s = float("inf")
        self.locked_mhz = None
        if self._ownership is not None:
            self._ownership.found(0)
            self._ownership.mark(locked=False)
        text = (
            f"the SM clock was changed from outside ({read_mhz} MHz where {expected_mhz} MHz were asked for), and "
            "perseus.gpu.foreign_clock is give_way"
        )
        self._event(Trouble("gave_way", text, time.monotonic()))


def free_clock(gpu: Gpu, ownership: Ownership, locked_mhz: int | None, *, limit_s: float) -> ResetOutcome:
    """Reset the clock until it holds, and note in the lock file that it is free."""
    outcome = reset_until_confirmed(gpu, locked_mhz, limit_s=limit_s)
    if outcome.confirmed:
        ownership.mark(locked=False)
    return outcome
