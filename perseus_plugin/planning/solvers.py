"""Running solvers of OR-Tools so that Ctrl-C ends them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

ResultT = TypeVar("ResultT")

_AGAIN_S = 0.05
_SWALLOWED_S = 0.3  # after which what Ctrl-C raised, and is not being dealt with, was swallowed
_heard = False


def interruptible(solve: Callable[[], ResultT], stop: Callable[[], object]) -> ResultT:
    """What `solve` returns, run beside: Python sees a signal between its own steps only, and a solver's takes hours.

    Args:
        solve: releases the interpreter while it works.
        stop: makes it return soon.

    Raises:
        KeyboardInterrupt: of Ctrl-C, or whatever `solve` raises; it has ended then.
    """
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(solve)
        try:
            return running.result()
        except BaseException:
            while not running.done():  # one that has not begun yet does not hear it
                stop()
                wait([running], _AGAIN_S)
            raise


@contextmanager
def ending_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Around a command, on the main thread: the first Ctrl-C ends it, whatever becomes of what that raises.

    Pydantic takes a `KeyboardInterrupt` for a value that is wrong, where it has Python say what a value is, and nobody
    hears of one within a `__del__`: it is raised again then. Within `keeping_the_interpreter` the process ends at once.
    Where Ctrl-C is ignored, or handled in a way of somebody's own, that stays.

    Yields:
        Whether there was a Ctrl-C.
    """
    global _heard
    _heard = False
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield lambda: _heard
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: object) -> None:
    global _heard
    _heard = True
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, _SWALLOWED_S)
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:  # else it is on its way, and what it passes tidies up
        raise KeyboardInterrupt


@contextmanager
def keeping_the_interpreter() -> Iterator[None]:
    """Around a call that does not release the interpreter, so that neither Python nor another thread sees a signal.

    Within `ending_on_ctrl_c` Ctrl-C ends the process at once: nothing may be half done there that somebody has to undo.
    """
    if signal.getsignal(signal.SIGINT) is not _interrupt:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupt)
