"""A process of ours that plans beside the job: started, asked and heard in lines, ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from perseus_plugin.exchange import processes
from perseus_plugin.files import Descriptor

DROP = signal.SIGURG
"""Has a process give up what it works on, where it listens to that; does nothing to one that does not, or not yet."""
_PIECE = 1 << 16


class ChildLostError(Exception):
    """The process has ended, or has to be; the message says why."""


class Child:
    """One process, and the pipes to and from it.

    Args:
        module: what it runs, see `processes`.
        arguments: for it.
        task: an open file that it reads instead of a pipe; None: a pipe.
        quiet: drop what it writes to its standard error.
        python: that runs it; None: this one.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, module: str, *arguments: str, task: Any = None, quiet: bool = False, python: str | None = None
    ) -> None:
        heard, its_outlet = os.pipe()
        its_inlet, told = (None, None) if task is not None else os.pipe()
        try:
            self._process = subprocess.Popen(
                processes.command(module, *arguments, python=python),
                stdin=its_inlet if task is None else task,
                stdout=its_outlet,
                stderr=subprocess.DEVNULL if quiet else None,
                start_new_session=True,
                env=processes.environment(python),
            )
            self._heard = Descriptor(heard)
            self._told = None if told is None else Descriptor(told)
        except BaseException:
            os.close(heard)
            if told is not None:
                os.close(told)
            raise
        finally:
            os.close(its_outlet)
            if its_inlet is not None:
                os.close(its_inlet)
        self._buffer = b""
        self._quiet = quiet
        self._writing = threading.Lock()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send it, and what it has started, a signal, if it has not ended."""
        if self.running:
            with suppress(OSError):
                os.killpg(self.pid, number)

    def check(self) -> None:
        """Raise if it has ended.

        Raises:
            ChildLostError: it has.
        """
        if not self.running:
            raise self._lost(OSError(), 0.0)

    def tell(self, pieces: Iterable[str], limit_s: float = float("inf")) -> None:
        """Write a line to it.

        Args:
            pieces: that make up the line, without its end.
            limit_s: time until it must have been read.

        Raises:
            ChildLostError: it has not read it.
        """
        assert self._told is not None  # it has a pipe, see the class
        deadline_s = time.monotonic() + limit_s
        try:
            os.set_blocking(self._told.number, False)
            for piece in pieces:
                self._write(self._told, piece.encode(), deadline_s)
            self._write(self._told, b"\n", deadline_s)
        except OSError as error:
            raise self._lost(error, limit_s) from error

    def hear(self, limit_s: float = float("inf"), idle_s: float = float("inf")) -> str:
        """The next line that it writes.

        Args:
            limit_s: how long to wait for it.
            idle_s: for how long it may take no processor time meanwhile: then it hangs, or has been stopped.

        Raises:
            ChildLostError: none has come.
        """
        deadline_s = time.monotonic() + limit_s
        pieces, idle = [self._buffer], _Idle(self.pid, idle_s)
        try:
            while b"\n" not in pieces[-1]:
                _wait(self._heard, select.POLLIN, deadline_s, idle)
                pieces.append(os.read(self._heard.number, _PIECE))
                if not pieces[-1]:
                    raise OSError("its output has ended")
        except OSError as error:
            raise self._lost(error, limit_s) from error
        line, _, self._buffer = b"".join(pieces).partition(b"\n")
        return line.decode(errors="replace")

    def end(self, patience_s: float = 0.0) -> None:
        """End it: by the end of its input, and if that takes longer than `patience_s`, by force."""
        if self._told is not None:
            with self._writing:
                self._told.close()
        try:
            self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)  # a Python may be a script that runs one
            self._process.wait()

    def _write(self, descriptor: Descriptor, data: bytes, deadline_s: float) -> None:
        while data:
            _wait(descriptor, select.POLLOUT, deadline_s)
            with self._writing:
                data = data[os.write(descriptor.number, data[:_PIECE]) :]

    def _lost(self, error: OSError, limit_s: float) -> ChildLostError:
        """Why it is of no use any more; it is ended if it was not."""
        if isinstance(error, TimeoutError):
            self.end()
            why = str(error) or f"took longer than {limit_s:g} s"
            return ChildLostError(f"{why} and was ended")
        with suppress(subprocess.TimeoutExpired):  # it ends, or will not
            status = self._process.wait(timeout=1.0)
            its_word = "" if self._quiet or status <= 0 else "; see its message above"
            return ChildLostError(f"ended with {processes.ending(status)}{its_word}")
        self.end()
        return ChildLostError(f"could not be reached any more: {error.strerror or error}")


class _Idle:
    """Watches whether a process takes any processor time, or what it has started does."""

    def __init__(self, pid: int, limit_s: float) -> None:
        self._pid, self._limit_s = pid, limit_s
        self._ticks, self._idle_s, self._looked_s = [b""], 0.0, time.monotonic()

    def look(self) -> None:
        """Once a second or so.

        Raises:
            TimeoutError: it has taken none for too long.
        """
        with suppress(OSError):
            ticks = _ticks(self._pid)
            now_s = time.monotonic()
            # Time in which this process did not run either says nothing: a job may be suspended as a whole.
            self._idle_s = 0.0 if ticks != self._ticks else self._idle_s + min(now_s - self._looked_s, 2.0)
            self._ticks, self._looked_s = ticks, now_s
        if self._idle_s > self._limit_s:
            raise TimeoutError(f"took no processor time for {self._limit_s:g} s (it hangs, or somebody has stopped it)")


def _ticks(pid: int) -> list[bytes]:
    """Processor time of a process, and of all that descend from it.

    Raises:
        OSError: it is not there.
    """
    found = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended meanwhile
            for child in children.read_text().split():
                found += _ticks(int(child))
    return found


def _wait(descriptor: Descriptor, event: int, deadline_s: float, idle: _Idle | None = None) -> None:
    waiter = select.poll()
    waiter.register(descriptor.number, event)
    while not waiter.poll(1e3 * min(1.0, max(0.0, deadline_s - time.monotonic()))):
        if time.monotonic() >= deadline_s:
            raise TimeoutError
        if idle is not None:
            idle.look()
        _ = descriptor.number  # ends a wait for what somebody has closed
