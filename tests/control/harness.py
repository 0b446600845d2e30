from __future__ import annotations

import subprocess
import sys
import weakref
from typing import TypeVar

from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.ownership import holder_of, lock_path
from perseus_plugin.control.wire import Event
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.waiting import wait_until

E = TypeVar("E")

TRAINER = """
import os, sys, time
from perseus_plugin.control.client import ClockHelper
helper = ClockHelper.start(sys.argv[1])
assert helper.wait_ready(60).can_lock
helper.request(900)
while not helper.drain():
    time.sleep(0.001)
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
elif sys.argv[2] == "raw":  # a child that holds the pipe open, as any fork outside Python's sight would
    import ctypes
    child = ctypes.CDLL(None).fork()
    if child == 0:
        ctypes.CDLL(None).sleep(600)
        os._exit(0)
else:
    child = 0
print(child, flush=True)
if sys.argv[2] == "exception":
    raise RuntimeError("training failed")
if sys.argv[2] == "exit":
    sys.exit(0)
time.sleep(600)
"""


def start_trainer(spec: str, mode: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that has locked the clock; and the pid of its child, if it has one."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, spec, mode], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert trainer.stdout is not None
    return trainer, int(trainer.stdout.readline())


def free_and_unowned(gpu: EmulatedGpu, spec: str) -> bool:
    """Whether the clock is free and no helper holds the GPU."""
    return gpu.locked_mhz() is None and holder_of(lock_path(spec, gpu.uuid)) is None


_backlogs: weakref.WeakKeyDictionary[ClockHelper, list[Event]] = weakref.WeakKeyDictionary()


def wait_for_event(helper: ClockHelper, kind: type[E]) -> E:
    """Take the next event of a kind; others stay for later calls."""
    backlog = _backlogs.setdefault(helper, [])
    found: list[E] = []

    def look() -> bool:
        backlog.extend(helper.drain())
        for position, event in enumerate(backlog):
            if isinstance(event, kind):
                found.append(event)
                del backlog[position]
                return True
        return False

    wait_until(look)
    return found[0]


def other_events(helper: ClockHelper) -> list[Event]:
    """Everything reported that no `wait_for_event` has taken."""
    backlog = _backlogs.setdefault(helper, [])
    backlog.extend(helper.drain())
    return backlog
