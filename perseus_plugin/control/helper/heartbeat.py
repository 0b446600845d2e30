"""Telling the parent that the helper lives and gets on: between driver calls, so that one that hangs is seen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from perseus_plugin.control.wire import HEARTBEAT, pack_reply
from perseus_plugin.gpus.base import Gpu

HEARTBEAT_S = 1.0


class Heartbeat:
    """Sends a heartbeat once a second, if it is given the chance.

    Args:
        outlet: file descriptor of the replies, non-blocking.

    Attributes:
        next_s: when the next one is due.
    """

    def __init__(self, outlet: int) -> None:
        self._outlet = outlet
        self.next_s = 0.0

    def beat(self) -> None:
        """Send one if it is due; dropped if the parent does not read."""
        now_s = time.monotonic()
        if now_s >= self.next_s:
            self.next_s = now_s + HEARTBEAT_S
            with suppress(OSError):
                os.write(self._outlet, pack_reply(HEARTBEAT))


def with_heartbeat(gpu: Gpu, beat: Callable[[], None]) -> Gpu:
    """The GPU, with a heartbeat before each of its calls."""
    return cast(Gpu, _Beating(gpu, beat))


class _Beating:
    def __init__(self, gpu: Gpu, beat: Callable[[], None]) -> None:
        self._gpu, self._beat = gpu, beat

    def __getattr__(self, name: str) -> Any:
        self._beat()
        return getattr(self._gpu, name)
