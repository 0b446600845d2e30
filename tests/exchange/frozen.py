"""A store whose host is a process of its own, which can be stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.waiting import stop_process

_HOST = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class StoreHost:
    """The host.

    Attributes:
        port: of the store.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process, self.port = process, int(process.stdout.readline())

    def freeze(self) -> None:
        """It answers no more, and its connections stay."""
        stop_process(self._process.pid)


@contextmanager
def store_host() -> Iterator[StoreHost]:
    """A host, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield StoreHost(process)
    finally:
        process.kill()
        process.communicate()
