"""Waiting for what other threads and processes do, and finding them; a limit only bounds a test that fails anyway."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 300.0
"""For processes that give way to all others: on a busy machine they take minutes to load a solver."""


def came_true(condition: Callable[[], bool], timeout_s: float = 120.0, interval_s: float = 0.005) -> bool:
    """Whether the condition came true in time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(interval_s)
    return condition()


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Fail the test unless the condition comes true in time."""
    assert came_true(condition, timeout_s, 0.001), "it never happened"


def stop_process(pid: int) -> None:
    """Stop a process as SIGSTOP does, and wait for that: until each of its threads has had its turn, it may go on."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(_state(thread) in ("T", "") for thread in Path(f"/proc/{pid}/task").iterdir()))


def _state(thread: Path) -> str:
    """Its letter; none of a thread that has ended."""
    with suppress(OSError):
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    return ""


def processes_naming(word: str, among: Sequence[str] = ("perseus_plugin.control.helper",)) -> list[int]:
    """Processes on whose command line both `word` and one of `among` stand."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if word in line and any(name in line for name in among):
                    found.append(int(folder.name))
    return found


def pipes_here() -> dict[int, str]:
    """This process's pipes by their numbers."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found[int(entry.name)] = os.readlink(entry)  # noqa: PTH115
    return {number: name for number, name in found.items() if name.startswith("pipe:")}
