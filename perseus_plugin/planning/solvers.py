"""Running solvers of OR-Tools so that Ctrl-C ends them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

ResultT = TypeVar("ResultT")

_AGAIN_S = 0.05
_may_end = False


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


def end_on_ctrl_c() -> None:
    """Have Ctrl-C end this process, a command, within `keeping_the_interpreter` too."""
    global _may_end
    _may_end = True


@contextmanager
def keeping_the_interpreter() -> Iterator[None]:
    """Around a call that does not release the interpreter, so that neither Python nor another thread sees a signal.

    Where `end_on_ctrl_c` was called and nobody handles Ctrl-C in a way of their own, it ends the process at once:
    nothing may be half done there that somebody has to undo.
    """
    if not _may_end or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
