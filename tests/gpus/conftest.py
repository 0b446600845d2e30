from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]


class VirtualClock:
    """Time that passes only in `sleep`."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self.on_sleep: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 1e-6)
        self.on_sleep()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def gpu(tmp_path: Path, clock: VirtualClock) -> EmulatedGpu:
    """An emulated A100 in virtual time: 5 ms switch latency, no jitter, 20 ms ticks."""
    return EmulatedGpu.create(tmp_path / "gpu", switch_jitter_s=0.0, now=clock.now, sleep=clock.sleep)
