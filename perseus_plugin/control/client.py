"""A rank's side of the clock helper: start it, ask for clocks, collect what it reports.

Nothing here blocks or raises into the caller. A helper that is dead or stuck makes `alive` false and leaves
one `Trouble`; if it died with the clock locked, a fresh process is started that frees it.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path

from perseus_plugin import processes
from perseus_plugin.control.ownership import HELPER_MODULE
from perseus_plugin.control.wire import (
    AT_ONCE_AND_LAST,
    BYE,
    CLOSE,
    EXIT_NO_GPU,
    EXIT_RESET_FAILED,
    HEARTBEAT,
    MARK,
    MEASURE_LATENCY,
    POLL_ENERGY,
    READY,
    SET_CLOCK,
    Command,
    DeviceFacts,
    Event,
    Trouble,
    WireError,
    split_replies,
    unpack_event,
)
from perseus_plugin.errors import os_problem

STUCK_AFTER_S = 10.0
"""A helper that is silent for so long (it sends a heartbeat every second) counts as stuck."""
MAX_EVENTS = 200_000
RESCUE_WAIT_S = 30.0


class ClockHelper:
    """The helper process of one GPU, and the thread that reads its replies. Made by `start`."""

    def __init__(
        self,
        spec: str,
        process: subprocess.Popen[bytes] | None,
        trouble: Trouble | None,
        *,
        read_only: bool = False,
    ) -> None:
        self._spec = spec
        self._read_only = read_only
        self._process = process
        self._owner_pid = os.getpid()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._lock = threading.Lock()
        self._seq = 0
        self._last_sent: tuple[int | None] | None = None
        self._ready = threading.Event()
        self._facts: DeviceFacts | None = None
        self._closing = self._said_bye = self._lost = False
        self._retired = False
        self._alive = process is not None
        self._inlet = -1
        self.dropped = 0
        if trouble is not None:
            self._events.append(trouble)
        if process is not None and process.stdin is not None:
            self._inlet = process.stdin.fileno()
            os.set_blocking(self._inlet, False)
            _helpers.add(self)
            self._reader = threading.Thread(target=self._read_replies, name="perseus-replies", daemon=True)
            self._reader.start()
        else:
            self._ready.set()

    @classmethod
    def start(
        cls,
        spec: str,
        *,
        log_path: Path | str | None = None,
        min_dwell_s: float | None = 0.0,
        settle_s: float = 0.03,
        gives_way: bool = False,
        read_only: bool = False,
    ) -> ClockHelper:
        """Start the helper of the GPU that `spec` names (see `gpus.registry`); does not wait for it.

        Args:
            spec: which GPU.
            log_path: where its standard error is appended; None: the caller's standard error.
            min_dwell_s: shortest time between two clock changes; None: follows from the switch latency once
                that was measured.
            settle_s: time after a change until the clock is read back (0: never).
            gives_way: whether it stops setting clocks when the clock is changed from outside, and does not ask again.
            read_only: whether it only reads: no call that sets or frees a clock is made, then or at the end.
        """
        dwell = [] if min_dwell_s is None else ["--min-dwell", repr(min_dwell_s)]
        options = [*dwell, "--settle", repr(settle_s), *(["--give-way"] if gives_way else [])]
        options += ["--read-only"] if read_only else []
        try:
            process = _spawn(spec, options, log_path)
        except OSError as error:
            trouble = Trouble("helper_failed", f"cannot start the clock helper: {os_problem(error)}", time.monotonic())
            return cls(spec, None, trouble)
        return cls(spec, process, None, read_only=read_only)

    @property
    def alive(self) -> bool:
        """Whether the helper runs and answers."""
        return self._alive and os.getpid() == self._owner_pid

    @property
    def pid(self) -> int | None:
        """The helper's process id; None if it never started."""
        return self._process.pid if self._process is not None else None

    def wait_ready(self, timeout_s: float) -> DeviceFacts | None:
        """What the helper found out about the GPU; None if it failed or is not there after `timeout_s`."""
        self._ready.wait(timeout_s)
        return self._facts

    def request(self, frequency_mhz: int | None, apply_at_s: float = 0.0) -> None:
        """Ask for a clock at `apply_at_s` (`time.monotonic()`; default: at once); None gives up the lock.

        It replaces earlier requests for the same or a later time.
        """
        with self._lock:
            if self._retired:
                return
            if apply_at_s <= 0.0 and self._last_sent == (frequency_mhz,):
                return
            sent = self._send(SET_CLOCK, frequency_mhz or 0, apply_at_s)
            self._last_sent = (frequency_mhz,) if sent and apply_at_s <= 0.0 else None

    def retire(self) -> None:
        """Give up the lock for good: later requests, also of other threads just now, are ignored."""
        with self._lock:
            self._retired = True
            self._send(SET_CLOCK, 0, AT_ONCE_AND_LAST)

    def poll_energy(self, interval_s: float | None) -> None:
        """Have the helper poll the energy counter and report its ticks; None stops it."""
        with self._lock:
            self._send(POLL_ENERGY, 0, interval_s or 0.0)

    def mark(self, tag: int) -> None:
        """Have the helper read counter and clock at once; the answer is a `Mark` with this `tag` (0 to
        2^32-1)."""
        with self._lock:
            self._send(MARK, tag, 0.0)

    def measure_latency(self, rounds: int = 8) -> None:
        """Have the helper time `rounds` clock changes down and up; the answer is a `SwitchLatency`.

        Takes about 0.1 s a round; on a GPU that does not obey, a few seconds in all. Afterwards the clock is reset.
        Requests made meanwhile are applied after it; `retire` and `close` end it.
        """
        with self._lock:
            self._last_sent = None
            self._send(MEASURE_LATENCY, rounds, 0.0)

    def drain(self) -> list[Event]:
        """What the helper has reported since the last call, oldest first."""
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, timeout_s: float = 5.0) -> bool:
        """Reset the clock and end the helper. Returns whether it confirmed that within `timeout_s`.

        The only call that waits. A helper that needs longer goes on resetting after this returns.
        """
        if os.getpid() != self._owner_pid or self._process is None:
            return False
        with self._lock:
            self._closing = True
            self._send(CLOSE, 0, 0.0)
            self._close_inlet()
        self._reader.join(timeout_s)
        self._alive = False
        return self._said_bye

    def _send(self, what: int, number: int, time_s: float) -> bool:
        if not self.alive or self._inlet < 0:
            return False
        self._seq += 1
        command = Command(what, number, self._seq, time.monotonic(), time_s)
        try:
            os.write(self._inlet, command.pack())
        except BlockingIOError:
            self.dropped += 1
            return False
        except OSError:
            self._alive = False  # the reader sees the end of the replies and says so
            return False
        return True

    def _close_inlet(self) -> None:
        if self._inlet >= 0 and self._process is not None and self._process.stdin is not None:
            self._inlet = -1
            with suppress(OSError):
                self._process.stdin.close()

    def _read_replies(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        outlet = process.stdout.fileno()
        waiter = select.poll()
        waiter.register(outlet, select.POLLIN)
        buffer = bytearray()
        heard_s = time.monotonic()
        try:
            while True:
                if waiter.poll(1000):
                    data = os.read(outlet, 1 << 16)
                    if not data:
                        break
                    heard_s = time.monotonic()
                    buffer += data
                    for what, payload in split_replies(buffer):
                        self._take(what, payload)
                elif self._alive and not self._closing and time.monotonic() - heard_s > STUCK_AFTER_S:
                    self._lose("helper_stuck", f"the clock helper was silent for {STUCK_AFTER_S:.0f} s")
        except (OSError, WireError) as error:
            self._lose("protocol", str(error))
        process.stdout.close()
        self._after_end(process)

    def _take(self, what: int, payload: bytes) -> None:
        if what == READY:
            try:
                self._facts = DeviceFacts.unpack(payload)
            except (ValueError, TypeError, KeyError) as error:
                raise WireError(f"reply READY with a wrong payload: {error}") from error
            self._ready.set()
        elif what == BYE:
            self._said_bye = True
        elif what != HEARTBEAT:
            event = unpack_event(what, payload)
            if isinstance(event, Trouble) and event.code == "helper_failed":
                self._lost, self._alive = True, False
            self._events.append(event)

    def _after_end(self, process: subprocess.Popen[bytes]) -> None:
        """The helper has ended: say so if it should not have, and make sure that the clock is free."""
        status = process.wait()
        orderly = self._said_bye or self._closing
        if not orderly:
            self._lose("helper_died", f"the clock helper ended with status {status}")
        self._alive = False
        with self._lock:
            self._close_inlet()
        self._ready.set()
        if not self._said_bye and not self._read_only and status not in (EXIT_NO_GPU, EXIT_RESET_FAILED):
            with suppress(OSError, RuntimeError, subprocess.TimeoutExpired):
                _spawn(self._spec, ["--reset-only"], None).wait(RESCUE_WAIT_S)

    def _lose(self, code: str, text: str) -> None:
        """No longer alive; closing the pipe makes a helper that still runs reset the clock and end."""
        if not self._lost:
            self._lost = True
            self._events.append(Trouble(code, text, time.monotonic()))
        self._alive = False
        with self._lock:
            self._close_inlet()

    def _forget_after_fork(self) -> None:
        # A forked child must not hold the pipe open: the helper would not see the trainer's end of it.
        self._alive = False
        if self._inlet >= 0:
            with suppress(OSError):
                os.close(self._inlet)
            self._inlet = -1


_helpers: weakref.WeakSet[ClockHelper] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for helper in list(_helpers):
        helper._forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)


def _spawn(spec: str, options: list[str], log_path: Path | str | None) -> subprocess.Popen[bytes]:
    """Start a helper process in a session of its own, so that signals to the job do not end it first."""
    command = processes.command(HELPER_MODULE, spec, "--parent", str(os.getpid()), *options)
    log = open(log_path, "ab") if log_path is not None else None  # noqa: PTH123, SIM115
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=processes.environment(),
            start_new_session=True,
            close_fds=True,
        )
    finally:
        if log is not None:
            log.close()
