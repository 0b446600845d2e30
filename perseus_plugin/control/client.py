"""A rank's side of the clock helper: start it, ask for clocks, collect what it reports.

Nothing here blocks or raises into the caller. A helper that ends although nobody here has asked it to, or is silent,
makes `alive` false; a fresh process frees its clock, and then one `Trouble` says what came of that.

A helper answers many times in an iteration, and a thread that woke for each of them would keep the training thread
waiting for the interpreter as often. So `drain` takes what is there by itself, and the thread, which is to see that the
helper lives, wakes by the clock and at the end of the replies alone.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from perseus_plugin.control.helper.resetting import not_free
from perseus_plugin.control.ownership import HELPER_MODULE
from perseus_plugin.control.wire import (
    AT_ONCE_AND_LAST,
    BYE,
    CLOSE,
    EXIT_NO_GPU,
    EXIT_RESET_FAILED,
    FREE_AFTER,
    HEARTBEAT,
    MARK,
    MEASURE_LATENCY,
    POLL_ENERGY,
    READY,
    SET_CLOCK,
    Applied,
    Command,
    DeviceFacts,
    Event,
    Trouble,
    WireError,
    split_replies,
    unpack_event,
)
from perseus_plugin.errors import os_problem
from perseus_plugin.exchange import processes
from perseus_plugin.files import Descriptor

STUCK_AFTER_S = 8.0
"""A helper that is silent for so long (it sends a heartbeat every second) counts as stuck."""
START_S = 30.0
"""How long it may take to say its first word: where many ranks start, Python is read from a busy file system."""
RESCUE_START_S, RESCUE_WAIT_S = 10.0, 2.5
"""How long what is said of a helper waits for what comes of freeing its clock: until the process that does so has
begun, which a busy machine may start late, and from then on."""
CLOSE_GRACE_S = 15.0
"""How long a helper that was closed may take to reset its clock before it is ended."""
MAX_EVENTS = 200_000
_LOOK_S, _REST_S = 0.5, 0.5
"""From one look at the replies to the next: until its first word comes, at which the thread wakes, and after it."""


class _End(NamedTuple):
    """How a helper ended, or why it must: code and text of a `Trouble`; its exit status, None if it still runs."""

    code: str
    text: str
    status: int | None


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
        self._rescuer: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._lock = threading.Lock()
        self._seq = 0
        self._last_sent: tuple[int | None] | None = None
        self._locked_mhz: int | None = None
        self._reading = threading.Lock()
        self._outlet: Descriptor | None = None
        self._said = bytearray()
        self._heard, self._broken = False, ""
        self._ready = threading.Event()
        self._facts: DeviceFacts | None = None
        self._closing = self._said_bye = self._lost = False
        self._on_end: Callable[[], None] = lambda: None
        self._is_over = process is None
        self._retired = False
        self._alive = process is not None
        self._inlet: Descriptor | None = None
        self.dropped = 0
        if trouble is not None:
            self._events.append(trouble)
        if process is not None:
            self._inlet, outlet = _taken_over(process.stdin), _taken_over(process.stdout)
            for end in (self._inlet, outlet):
                os.set_blocking(end.number, False)
            self._outlet = outlet
            _helpers.add(self)
            watching = (process, outlet)
            self._reader = threading.Thread(target=self._watch, args=watching, name="perseus-replies", daemon=True)
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
        latency_s: float = 0.0,
    ) -> ClockHelper:
        """Start the helper of the GPU that `spec` names (see `gpus.registry`); does not wait for it.

        Args:
            spec: which GPU.
            log_path: where its standard error is appended; None: the caller's standard error.
            min_dwell_s: shortest time between two clock changes; None: follows from the switch latency once that
                was measured.
            settle_s: time after a change until the clock is read back (0: never).
            gives_way: whether it stops setting clocks when the clock is changed from outside, and does not ask again.
            read_only: whether it only reads: no call that sets or frees a clock is made, then or at the end.
            latency_s: the switch latency (95 %) where it was measured before, else 0.
        """
        dwell = [] if min_dwell_s is None else ["--min-dwell", repr(min_dwell_s)]
        options = [*dwell, "--settle", repr(settle_s), *(["--give-way"] if gives_way else [])]
        options += ["--read-only"] if read_only else []
        options += ["--switch-latency", repr(latency_s)] if latency_s else []
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

    def free_after(self, silence_s: float) -> None:
        """Have the clock free while nothing is sent for so long; taken up again with what is sent next."""
        with self._lock:
            self._send(FREE_AFTER, 0, silence_s)

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

    def on_end(self, ended: Callable[[], None]) -> None:
        """Call this, from any thread, once the helper has ended and it is known what of its clock: `drain` tells."""
        with self._lock:
            self._on_end = ended
        if self._is_over:
            ended()

    def drain(self) -> list[Event]:
        """What the helper has reported since the last call, oldest first."""
        if self.alive and self._outlet is not None:
            with suppress(OSError, WireError):  # the thread finds the same
                self._pull(self._outlet)
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
        if self._reader.is_alive() and not self._said_bye and not self._read_only:
            # This process may end before the helper does: another one sees to it that the clock is free.
            self._rescue(self._process, told=False)
        return self._said_bye

    def _send(self, what: int, number: int, time_s: float) -> bool:
        if not self.alive or self._inlet is None:
            return False
        self._seq += 1
        command = Command(what, number, self._seq, time.monotonic(), time_s)
        try:
            os.write(self._inlet.number, command.pack())
        except BlockingIOError:
            self.dropped += 1
            return False
        except OSError:  # the reader sees the end of the replies
            return False
        return True

    def _close_inlet(self) -> None:
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None

    # The reader's thread.

    def _watch(self, process: subprocess.Popen[bytes], outlet: Descriptor) -> None:
        """Take what the helper says until it has ended, and see that its clock is free."""
        end = self._read_replies(process, outlet)
        self._alive = False
        with self._reading:  # who reads it just now reads no other file that gets its number
            outlet.close()
        with self._lock:
            self._close_inlet()  # a helper that still runs resets the clock and ends
        self._clear_up(process, end)
        self._ready.set()  # who waits for that finds out why it will not be
        self._is_over = True
        with self._lock:  # who comes later sees that it is over
            told = self._on_end
        told()
        for ended in (process, self._rescuer):
            if ended is not None:
                with suppress(subprocess.TimeoutExpired):
                    ended.wait(_LOOK_S)
                if ended.stdout is not None:
                    ended.stdout.close()

    def _read_replies(self, process: subprocess.Popen[bytes], outlet: Descriptor) -> _End | None:
        """Take what the helper says until it ends, or must; None if it ended because it was closed."""
        waiter = select.poll()
        waiter.register(outlet.number, select.POLLIN)
        limit_s, silent_s, looked_s, look_s = START_S, 0.0, time.monotonic(), _LOOK_S
        try:
            while True:
                waiter.poll(1e3 * look_s)
                # Time in which this process did not run either is no silence: a job may be suspended as a whole.
                now_s = time.monotonic()
                silent_s += min(now_s - looked_s, 2 * _LOOK_S)
                looked_s = now_s
                if not self._pull(outlet):
                    break
                if self._ready.is_set():
                    look_s = _REST_S
                    waiter.modify(outlet.number, 0)  # that nothing more will come is told all the same
                if self._heard:
                    self._heard = False
                    limit_s, silent_s = STUCK_AFTER_S, 0.0
                elif silent_s > limit_s and not self._closing:
                    return _End("helper_stuck", f"the clock helper was silent for {limit_s:.0f} s", None)
        except (OSError, WireError) as error:
            problem = os_problem(error) if isinstance(error, OSError) else str(error)
            return None if self._closing else _End("protocol", problem, None)
        try:
            status = process.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            return None if self._closing else _End("helper_died", "the clock helper closed its pipe", None)
        if self._closing:
            return None
        asked = ": a signal asked it to" if self._said_bye else ""
        return _End("helper_died", f"the clock helper ended with status {status}{asked}", status)

    def _pull(self, outlet: Descriptor) -> bool:
        """Take what the helper has said, from any thread; returns whether more may come.

        Raises:
            OSError: the pipe is not ours any more.
            WireError: that is no reply.
        """
        with self._reading:
            if self._broken:
                raise WireError(self._broken)
            try:
                data = os.read(outlet.number, 1 << 16)
            except BlockingIOError:
                return True
            if data:
                self._heard = True
                self._said += data
                try:
                    for what, payload in split_replies(self._said):
                        self._take(what, payload)
                except WireError as error:
                    self._broken = str(error)
                    raise
            return bool(data)

    def _take(self, what: int, payload: bytes) -> None:
        if what == READY:
            try:
                self._facts = DeviceFacts.unpack(payload)
            except (ValueError, TypeError, KeyError) as error:
                raise WireError(f"reply READY with a wrong payload: {error}") from error
            self._ready.set()
        elif what == BYE:
            self._said_bye, self._locked_mhz = True, None
        elif what != HEARTBEAT:
            event = unpack_event(what, payload)
            if isinstance(event, Trouble) and event.code in ("helper_failed", "protocol"):
                self._lost, self._alive = True, False
            elif isinstance(event, Applied):
                self._locked_mhz = event.frequency_mhz
            self._events.append(event)

    def _clear_up(self, process: subprocess.Popen[bytes], end: _End | None) -> None:
        """The helper has ended for good, or must: see that its clock is free, and say what has become of it."""
        status = process.poll()
        controlled = not self._read_only and (self._facts is None or self._facts.can_lock)
        problem = ""
        if not controlled:
            process.kill()  # the clock is as others have it
        elif status == EXIT_RESET_FAILED:
            problem = self._not_free("the driver has not taken the reset")
        elif not self._said_bye and status != EXIT_NO_GPU:
            problem = self._rescue(process, told=end is not None)
        if end is None:
            return
        if problem:
            self._events.append(Trouble(end.code, f"{end.text}; {problem}", time.monotonic(), free=False))
        elif not self._lost:
            text = f"{end.text}; its SM clock is free" if controlled else end.text
            self._events.append(Trouble(end.code, text, time.monotonic()))

    def _rescue(self, process: subprocess.Popen[bytes], *, told: bool) -> str:
        """Have a fresh process free the clock, in the place of one that is ended if need be; why it may not be free."""
        instead = ["--instead-of", str(process.pid)] if process.poll() is None else []
        locked = [] if self._locked_mhz is None else ["--locked-mhz", str(self._locked_mhz)]
        options = ["--reset-only", *instead, *locked]
        if not told:  # this process may end before it: it says itself what is to be said
            options += ["--grace", repr(CLOSE_GRACE_S)]
        try:
            self._rescuer = _spawn(self._spec, [*options, *(["--told"] if told else [])], None)
        except OSError as error:
            process.kill()
            return self._not_free(f"no process could be started that frees it: {os_problem(error)}")
        return self._answer_of(self._rescuer) if told else ""

    def _answer_of(self, rescuer: subprocess.Popen[bytes]) -> str:
        waiter, outlet = select.poll(), _taken_over(rescuer.stdout)
        waiter.register(outlet.number, select.POLLIN)
        said, limit_s = bytearray(), RESCUE_START_S
        end_s = time.monotonic() + limit_s
        while waiter.poll(1e3 * max(0.0, end_s - time.monotonic())):
            try:
                data = os.read(outlet.number, 1 << 16)
                said += data
                for what, payload in split_replies(said):
                    if what != HEARTBEAT:
                        return "" if what == BYE else Trouble.unpack(payload).text
                    limit_s = RESCUE_WAIT_S
                    end_s = time.monotonic() + limit_s
            except (OSError, WireError, ValueError):
                data = b""
            if not data:
                return self._not_free("the process that was to free it has failed")
        return self._not_free(f"freeing it takes longer than {limit_s:g} s")

    def _not_free(self, problem: str) -> str:
        uuid = self._spec.rpartition(":")[2] if self._facts is None else self._facts.uuid
        return not_free(self._spec, uuid, self._locked_mhz, problem)

    def _forget_after_fork(self) -> None:
        # A forked child must not hold the pipe open: the helper would not see the trainer's end of it.
        self._alive = False
        self._close_inlet()


_helpers: weakref.WeakSet[ClockHelper] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for helper in list(_helpers):
        helper._forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)


def _taken_over(pipe: IO[bytes] | None) -> Descriptor:
    """A pipe to a helper, such that it is used and closed only as long as it is ours."""
    assert pipe is not None  # see `_spawn`
    with pipe:
        return Descriptor(os.dup(pipe.fileno()))


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
