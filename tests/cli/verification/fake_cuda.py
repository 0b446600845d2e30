"""A stand-in for `torch.cuda` on the CPU: one stream, events with the host's time, graphs that are run by a thread.

Work is done when it is launched, unless it is captured: then it is done at each replay, and what is launched while a
replay runs comes after it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perseus_plugin.cli.verification import bench

CYCLES_PER_S = 1e9
PRODUCT_S = 0.0005


class _Stream:
    def __init__(self) -> None:
        self.captured: list[Callable[[], object]] | None = None
        self._work: queue.Queue[Callable[[], object]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def launch(self, work: Callable[[], object]) -> None:
        """Capture it, queue it behind a replay, or do it."""
        if self.captured is not None:
            self.captured.append(work)
        elif self._thread is not None and self._work.unfinished_tasks:
            self._work.put(work)
        else:
            work()

    def replay(self, captured: list[Callable[[], object]]) -> None:
        """On a thread, as a GPU does beside the host."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        for work in captured:
            self._work.put(work)

    def synchronize(self) -> None:
        """Return once all work is done."""
        self._work.join()

    def _run(self) -> None:
        while True:
            self._work.get()()
            self._work.task_done()


_stream = _Stream()


class Event:
    """Passes when the stream gets to it."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._at_s = 0.0
        self._passed = threading.Event()

    def record(self) -> None:
        self._passed.clear()
        _stream.launch(self._pass)

    def _pass(self) -> None:
        self._at_s = time.monotonic()
        self._passed.set()

    def synchronize(self) -> None:
        assert self._passed.wait(10.0), "an event that was never recorded"

    def elapsed_time(self, end_event: Event) -> float:
        return 1e3 * (end_event._at_s - self._at_s)


class CUDAGraph:
    """What was launched while it was captured."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], object]] = []

    def replay(self) -> None:
        _stream.replay(self.captured)


@contextmanager
def graph(made: CUDAGraph, capture_error_mode: str) -> Iterator[None]:
    """Capture."""
    assert capture_error_mode == "thread_local"
    _stream.captured = made.captured
    yield
    _stream.captured = None


def install(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    """Put it in torch's place, with one device of this UUID (without `GPU-`) that computes on the CPU."""
    side = SimpleNamespace(synchronize=_stream.synchronize)
    properties: Any = SimpleNamespace(uuid=uuid)

    def sleep(seconds: float) -> None:
        _stream.launch(lambda: time.sleep(seconds))

    for name, stand_in in {
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "Stream": lambda: side,
        "stream": lambda one: nullcontext(),
        "set_device": lambda device: None,
        "synchronize": _stream.synchronize,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: sleep(cycles / CYCLES_PER_S),
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: properties,
        "get_device_name": lambda index: "stand-in",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    made = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: made("cpu"))
    for name in ("randn", "zeros"):
        on_device = getattr(torch, name)
        # Neither of a device nor page-locked.
        monkeypatch.setattr(torch, name, lambda *a, _f=on_device, device="", pin_memory=False, **k: _f(*a, **k))
    for name in ("add_", "neg_", "copy_"):
        in_place = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda one, *a, _f=in_place, **k: _stream.launch(lambda: _f(one, *a, **k))
        )
    monkeypatch.setattr(torch, "mm", lambda left, right, out: sleep(PRODUCT_S))
    monkeypatch.setattr(bench, "_MANY", 2)
    monkeypatch.setattr(bench, "_SIDE", 8)
    monkeypatch.setattr(bench, "_ELEMENTS", 8)
