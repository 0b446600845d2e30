"""Running solvers of OR-Tools so that Ctrl-C ends them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

ResultT = TypeVar("ResultT")

_AGAIN_S = 0.05


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
