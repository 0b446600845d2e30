from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perseus_plugin.control.client import ClockHelper
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import EnergyReading
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]


class ScriptedGpu:
    """A GPU in virtual time whose calls fail as often as they are told to.

    Attributes:
        failures: how many of the next driver calls raise.
        deaf: how many of the next resets are accepted without effect.
        latency_s: until a change takes effect; None: never.
        cap_mhz: what it runs at most at, whatever is asked for.
    """

    name, uuid, emulated = "scripted", "SCRIPTED-0", False

    def __init__(self, clocks_mhz: tuple[int, ...] = (1410, 1005, 840, 420, 210)) -> None:
        self._clocks_mhz = clocks_mhz
        self.cap_mhz = clocks_mhz[0]
        self.now_s = 0.0
        self.failures = self.deaf = 0
        self.latency_s: float | None = 0.004
        self.calls: list[int] = []
        self._clock, self._next, self._next_s = 1410, 1410, 0.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        return self._clocks_mhz

    def lock_clock(self, frequency_mhz: int) -> None:
        self._call(frequency_mhz)
        self._change(frequency_mhz)

    def reset_clock(self) -> None:
        self._call(0)
        if self.deaf:
            self.deaf -= 1
        else:
            self._change(1410)

    def read_clock_mhz(self) -> int:
        return min(self.cap_mhz, self._next if self.now_s >= self._next_s else self._clock)

    def read_energy(self) -> EnergyReading:
        return EnergyReading(self.now_s, 100.0 * self.now_s)

    def lock_mhz(self) -> int | None:
        return None

    def power_limit_w(self) -> float:
        return 400.0

    def close(self) -> None:
        pass

    def _call(self, mhz: int) -> None:
        self.calls.append(mhz)
        if self.failures:
            self.failures -= 1
            raise GpuError("driver says no")

    def _change(self, mhz: int) -> None:
        self._clock = self.read_clock_mhz()
        self._next, self._next_s = mhz, self.now_s + (float("inf") if self.latency_s is None else self.latency_s)


@pytest.fixture
def scripted() -> ScriptedGpu:
    return ScriptedGpu()


@pytest.fixture
def gpu(tmp_path: Path) -> EmulatedGpu:
    """A real-time emulated GPU."""
    return EmulatedGpu.create(tmp_path / "gpu", switch_latency_s=0.002, switch_jitter_s=0.0, tick_period_s=0.01)


@pytest.fixture
def spec(gpu: EmulatedGpu) -> str:
    return f"emulated:{gpu.state.path}"


@pytest.fixture
def helper(spec: str) -> Iterator[ClockHelper]:
    helper = ClockHelper.start(spec)
    assert helper.wait_ready(60) is not None
    yield helper
    helper.close()
