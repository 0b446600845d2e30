"""A stand-in for `torch.cuda` on the CPU: a stream that is always done, events with the host's time."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perseus_plugin.cli.verification import bench

CYCLES_PER_S = 1e9
PRODUCT_S = 0.0005


class Event:
    """Passes when it is recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = time.monotonic()

    def synchronize(self) -> None:
        assert self._at_s, "an event that was never recorded"

    def elapsed_time(self, end_event: Event) -> float:
        return 1e3 * (end_event._at_s - self._at_s)


def install(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    """Put it in torch's place, with one device of this UUID (without `GPU-`) that computes on the CPU."""
    stream = SimpleNamespace(synchronize=lambda: None)
    properties: Any = SimpleNamespace(uuid=uuid)
    for name, stand_in in {
        "Event": Event,
        "Stream": lambda: stream,
        "stream": lambda one: nullcontext(),
        "set_device": lambda device: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: time.sleep(cycles / CYCLES_PER_S),
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
        monkeypatch.setattr(torch, name, lambda *a, _f=on_device, device, **k: _f(*a, **k))
    monkeypatch.setattr(torch, "mm", lambda left, right, out: time.sleep(PRODUCT_S))
    monkeypatch.setattr(bench, "_MANY", 2)
    monkeypatch.setattr(bench, "_SIDE", 8)
    monkeypatch.setattr(bench, "_ELEMENTS", 8)
