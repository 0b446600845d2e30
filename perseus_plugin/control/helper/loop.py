"""What the clock helper does between its start and its end: take commands, set clocks, read counters.

It sleeps in `select` until a command arrives or something is due, never waits for its parent to read, and does nothing
that takes longer than a driver call: what takes many (timing clock changes, a reset that does not hold) goes on step by
step, between whatever else is due.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from perseus_plugin.control.clock_log import DEVIATION_MHZ
from perseus_plugin.control.helper.counter import SHORTEST_PAUSE_S, CounterReader
from perseus_plugin.control.helper.heartbeat import Heartbeat
from perseus_plugin.control.helper.latency import LatencyMeasurement, advance
from perseus_plugin.control.helper.parent import Parent
from perseus_plugin.control.helper.pausing import Pauses
from perseus_plugin.control.helper.resetting import ClockReset, not_free
from perseus_plugin.control.ownership import Ownership
from perseus_plugin.control.requests import PendingRequests, Request
from perseus_plugin.control.wire import (
    AT_ONCE_AND_LAST,
    CLOSE,
    FREE_AFTER,
    MARK,
    MEASURE_LATENCY,
    POLL_ENERGY,
    SET_CLOCK,
    Applied,
    Command,
    Deviation,
    Event,
    Trouble,
    WireError,
    pack_event,
    split_commands,
)
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import DWELL_LATENCIES, Gpu

PARENT_CHECK_S = 0.1
"""How often to look whether the parent lives where the kernel has no pidfd (before 5.3)."""
PARENT_LOOK_S = 0.25
"""How often to look whether it goes on, while the clock is locked."""
DEVIATION_REPORT_S = 1.0
KEEP_LOCK_FILE_S = 5.0
READ_AGAIN_S = 1.0
LOOKS_ABOVE = 2
FREE_LIMIT_S = 0.5
"""How long a reset is tried until it is told that it does not hold."""
FREE_AGAIN_S = 5.0
"""From then on, between two tries."""


class HelperLoop:
    """Serves one parent.

    Args:
        gpu: whose clock.
        ownership: the held lock file; None: clocks are not to be set.
        parent: its death ends the loop.
        inlet, outlet: file descriptors of commands and replies, both non-blocking.
        wakeup: non-blocking file descriptor from which the numbers of signals can be read as they arrive.
        heartbeat: shows the parent that the helper gets on.
        spec: of the GPU.
        min_dwell_s: shortest time between two clock changes; None: follows from the switch latency once that was
            measured.
        settle_s: time after a change until the clock is read back, and every second from then on; 0: never.
        gives_way: see `ClockHelper.start`.
        latency_s: the switch latency (95 %), where it is known from before.

    Attributes:
        locked_mhz: the lock that is asked for, None for none.
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
        heartbeat: Heartbeat,
        spec: str,
        min_dwell_s: float | None,
        settle_s: float,
        gives_way: bool = False,
        latency_s: float = 0.0,
    ) -> None:
        self._gives_way, self._spec = gives_way, spec
        self._above = 0
        self._gpu, self._ownership, self._parent = gpu, ownership, parent
        self._may_set = ownership is not None
        self._inlet, self._outlet, self._wakeup = inlet, outlet, wakeup
        self._requests = PendingRequests(min_dwell_s or 0.0)
        self._measure_dwell = min_dwell_s is None
        self._settle_s = settle_s
        self._buffer = bytearray()
        self._counter = CounterReader(gpu, self._event)
        self._ended = ""
        self._read_back_s = float("inf")
        self._expected_mhz: int | None = None
        self._next_deviation_s = 0.0
        self._heartbeat = heartbeat
        self._timing: LatencyMeasurement | None = None
        self._resetting: ClockReset | None = None
        self._freed_as = ("", "")
        self._not_free = False
        self._pauses = Pauses(time.monotonic())
        self._paused = False
        self._next_look_s = self._next_keep_s = 0.0
        self.locked_mhz: int | None = None
        self._know_latency(latency_s)

    def run(self) -> str:
        """Serve until something ends it; returns what. The clock is as it was set last."""
        if self._parent.gone():
            return "parent died"
        watched = [fd for fd in (self._inlet, self._wakeup, self._parent.fd) if fd >= 0]
        while not self._ended:
            readable = select.select(watched, [], [], self._timeout_s())[0]
            if self._wakeup in readable and self._signalled():
                return "signal"
            if self._parent.fd in readable or (self._parent.fd < 0 and self._parent.gone()):
                return "parent died"
            if self._inlet in readable:
                self._read()
            self._work()
        return self._ended

    def _signalled(self) -> bool:
        """Take the signals that have arrived; whether one of them asks to end."""
        numbers = os.read(self._wakeup, 1 << 10)
        if signal.SIGTSTP in numbers:
            self._pauses.suspend(time.monotonic())
        if signal.SIGCONT in numbers:
            self._pauses.resume()
        self._next_look_s = 0.0
        return any(number not in (signal.SIGTSTP, signal.SIGCONT) for number in numbers)

    def emit(self, reply: bytes) -> None:
        """Send a reply; dropped if the parent does not read."""
        with suppress(OSError):
            os.write(self._outlet, reply)

    def _event(self, event: Event) -> None:
        self.emit(pack_event(event))

    def _timeout_s(self) -> float:
        times = [self._counter.next_poll_s, self._read_back_s, self._heartbeat.next_s]
        # While changes are timed requests wait, as nothing else may change the clock.
        if self._timing is not None:
            times.append(self._timing.next_s)
        elif not self._paused:
            times.append(self._requests.next_s() or float("inf"))
        if self._paused or self.locked_mhz is not None:
            times.append(self._next_look_s)
        if self._resetting is not None:
            times.append(self._resetting.next_s)
        if self._counter.marks:
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
        self._pauses.heard(time.monotonic())
        try:
            for command in split_commands(self._buffer):
                self._execute(command)
        except WireError as error:
            self._event(Trouble("protocol", str(error), time.monotonic()))
            self._ended = "garbage on the pipe"

    def _execute(self, command: Command) -> None:
        if command.what == SET_CLOCK:
            if command.time_s == AT_ONCE_AND_LAST:
                self._retire()
            elif self._may_set:
                self._requests.push(Request(command.seq, command.number or None, command.sent_s, command.time_s))
        elif command.what == POLL_ENERGY:
            self._counter.poll_every(command.time_s)
        elif command.what == MARK:
            self._counter.marks.append(command.number)
        elif command.what == MEASURE_LATENCY:
            self._begin_timing(command.number)
        elif command.what == FREE_AFTER:
            self._pauses.free_after(command.time_s)
        elif command.what == CLOSE:
            self._ended = "closed"

    def _work(self) -> None:
        """Whatever is due."""
        if self._timing is not None:
            self._go_on_timing(self._timing)
        elif not self._pauses_now():
            request = self._requests.take(time.monotonic())
            if request is not None:
                self._apply(request)
        if self._resetting is not None and time.monotonic() >= self._resetting.next_s:
            self._go_on_resetting(self._resetting)
        self._counter.work()
        if time.monotonic() >= self._read_back_s:
            self._read_back()
        self._heartbeat.beat()
        self._keep_lock_file()

    def _keep_lock_file(self) -> None:
        now_s = time.monotonic()
        if not self._may_set or self._ownership is None or now_s < self._next_keep_s:
            return
        self._next_keep_s = now_s + KEEP_LOCK_FILE_S
        if not self._ownership.kept():
            self._give_up_control("the GPU's lock file was removed, and another process has taken the GPU since")

    def _pauses_now(self) -> bool:
        """Free the clock while the parent does nothing, and take it up again when it goes on."""
        now_s = time.monotonic()
        if not self._paused and now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + PARENT_LOOK_S
        why = self._pauses.why(now_s, self._parent.stopped())
        if why and not self._paused:
            self._paused = True
            if self.locked_mhz is not None:
                self._free("paused", f"{why}: its SM clock is free until it goes on")
        elif self._paused and not why:
            self._paused, self._resetting = False, None
            request, asked_mhz = self._requests.take(now_s), self._requests.asked_mhz
            if request is None and asked_mhz is not None:
                request = Request(0, asked_mhz, now_s, 0.0)
            if request is not None:
                self._apply(request)
        return self._paused

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
        self._may_set, self._paused, self._timing = False, False, None
        self._requests.clear()
        self._free("lock_failed", reason)

    def _retire(self) -> None:
        """No clock will be asked for any more."""
        self._end_timing()
        self._paused = False
        self._requests.clear()
        if self._may_set:
            self._may_set = False
            self._free()

    def _free(self, code: str = "", text: str = "") -> None:
        """Reset the clock until it holds, and then tell this trouble; or that it does not hold."""
        self._expected_mhz, self._read_back_s = None, float("inf")
        self._freed_as = code, text
        self._resetting = ClockReset(self._gpu, self.locked_mhz, limit_s=FREE_LIMIT_S)

    def _go_on_resetting(self, resetting: ClockReset) -> None:
        called_s = time.monotonic()
        outcome = resetting.step(called_s)
        if outcome is None:
            return
        code, text = self._freed_as
        now_s = time.monotonic()
        if outcome.confirmed:
            self._resetting, self.locked_mhz = None, None
            if self._ownership is not None:
                self._ownership.mark(locked=False)
            self._event(Applied(0, None, called_s, 0.0, called_s, now_s))
            if self._not_free:
                code, text = "freed", "the SM clock is free after all"
            self._not_free = False
            if code:
                self._event(Trouble(code, text, now_s))
            return
        if not self._not_free:
            self._not_free = True
            problem = not_free(self._spec, self._gpu.uuid, self.locked_mhz, outcome.problem)
            said = f"{text}; {problem}" if code == "lock_failed" else problem
            self._event(Trouble(code or "reset_failed", said, now_s, free=False))
        self._resetting = ClockReset(self._gpu, self.locked_mhz, limit_s=FREE_LIMIT_S, begin_s=now_s + FREE_AGAIN_S)

    def _begin_timing(self, rounds: int) -> None:
        if self._ownership is None or not self._may_set:
            return
        self._ownership.mark(locked=True)
        self.locked_mhz = self._gpu.supported_clocks_mhz()[0]
        self._resetting = None
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
        self._know_latency(event.p95_s)
        self._requests.set(None, time.monotonic())
        self._event(event)

    def _know_latency(self, p95_s: float) -> None:
        if not p95_s > 0:  # NaN when no change ever showed
            return
        if self._measure_dwell:
            self._requests.dwell(DWELL_LATENCIES * p95_s)
        if self._settle_s > 0:  # what is still under way is no deviation
            self._settle_s = max(self._settle_s, DWELL_LATENCIES * p95_s)

    def _read_back(self) -> None:
        self._read_back_s = float("inf")
        expected = self._expected_mhz
        if expected is None:
            return
        try:
            read_mhz = self._gpu.read_clock_mhz()
        except GpuError as error:
            self._counter.say_read_failed(error)
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
