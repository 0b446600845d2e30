"""The process that a helper serves."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path


class Parent:
    """The process that is served: its death ends the helper, even while a fork of it holds the pipe open."""

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

    def stopped(self) -> bool:
        """Whether it is stopped, by a signal or a debugger."""
        return is_stopped(self._pid)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t")
