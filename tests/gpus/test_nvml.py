from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import GpuLostError, GpuPermissionError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import GPU_LOST, MIG_ENABLED, NO_PERMISSION, NOT_SUPPORTED
from perseus_plugin.gpus.nvml import NvmlGpu, text_of
from tests.nvml_simulator.building import environment
from tests.waiting import wait_until

UUID = "GPU-00000000-1111-2222-3333-444444444444"
OTHER_UUID = "GPU-55555555-1111-2222-3333-444444444444"


@pytest.fixture
def simulated(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGpu]:
    """Two GPUs behind the simulated driver, loaded into this process in the place of the real one."""
    gpus = [
        EmulatedGpu.create(tmp_path / uuid, uuid=uuid, switch_latency_s=0.001, switch_jitter_s=0.0)
        for uuid in (OTHER_UUID, UUID)
    ]
    ctypes.CDLL(str(simulated_nvml))  # the loader finds it by its SONAME from now on
    listed = environment(simulated_nvml, [gpu.state.path for gpu in gpus])["PERSEUS_SIMULATED_GPUS"]
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", listed)
    return gpus


@pytest.fixture
def nvml(simulated: list[EmulatedGpu]) -> Iterator[NvmlGpu]:
    gpu = NvmlGpu(UUID)
    yield gpu
    gpu.close()


@pytest.fixture
def driver(simulated: list[EmulatedGpu]) -> EmulatedGpu:
    """What the simulated driver holds for `UUID`."""
    return simulated[1]


def test_a_gpu_is_found_by_its_uuid_and_described(nvml: NvmlGpu, driver: EmulatedGpu) -> None:
    assert (nvml.uuid, nvml.name, nvml.emulated) == (UUID, driver.name, False)
    assert nvml.supported_clocks_mhz() == driver.supported_clocks_mhz()
    assert nvml.pci_address() == "0000:02:00.0"
    without_prefix = NvmlGpu(UUID.removeprefix("GPU-"))
    assert without_prefix.uuid == UUID
    without_prefix.close()


def test_what_the_driver_says_is_text_whatever_it_is() -> None:
    assert [text_of(said) for said in (b"H100", "H100", b"H100 \xe9")] == ["H100", "H100", "H100 \ufffd"]


def test_locks_and_resets_reach_that_gpu_only(nvml: NvmlGpu, simulated: list[EmulatedGpu]) -> None:
    nvml.lock_clock(1005)
    assert [gpu.locked_mhz() for gpu in simulated] == [None, 1005]
    wait_until(lambda: nvml.read_clock_mhz() == 1005)
    nvml.reset_clock()
    nvml.reset_clock()
    assert simulated[1].locked_mhz() is None
    assert [(e.mhz, e.pid) for e in simulated[1].events()] == [(mhz, os.getpid()) for mhz in (1005, 0, 0)]
    assert simulated[0].events() == []


def test_energy_and_capped_time_are_read(nvml: NvmlGpu, driver: EmulatedGpu) -> None:
    first = nvml.read_energy()
    driver.set_cap(900)
    wait_until(lambda: nvml.read_energy().energy_j > first.energy_j)
    reading = nvml.read_energy()
    assert reading.time_s > first.time_s
    assert first.capped_s == 0.0
    assert 0.0 < reading.capped_s <= driver.peek().capped_s
    assert reading.energy_j == pytest.approx(driver.read_energy().energy_j, abs=5.0)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (NO_PERMISSION, GpuPermissionError, "cannot lock the SM clock: no permission; run as root"),
        (NOT_SUPPORTED, GpuError, "does not support it"),
        (GPU_LOST, GpuLostError, "Xid"),
    ],
)
def test_driver_errors_become_ours(
    nvml: NvmlGpu, driver: EmulatedGpu, fault: int, error: type[GpuError], text: str
) -> None:
    driver.set_faults(fault)
    with pytest.raises(error, match=text):
        nvml.lock_clock(900)
    if fault == GPU_LOST:
        with pytest.raises(GpuLostError):
            nvml.read_energy()
    driver.set_faults(0)
    nvml.lock_clock(900)
    assert [e.refused for e in driver.events()] == [True, False]


def test_mig_is_refused(simulated: list[EmulatedGpu], driver: EmulatedGpu) -> None:
    driver.set_faults(MIG_ENABLED)
    with pytest.raises(GpuError, match="MIG is enabled"):
        NvmlGpu(UUID)
    with pytest.raises(GpuError, match="a MIG partition has no clock of its own"):
        NvmlGpu("MIG-00000000-1111-2222-3333-444444444444")
    driver.set_faults(0)
    NvmlGpu(UUID).close()


def test_an_unknown_gpu_and_a_missing_driver_say_so(
    simulated: list[EmulatedGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GpuError, match="no such GPU is visible here"):
        NvmlGpu("GPU-99999999-1111-2222-3333-444444444444")
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", "")
    with pytest.raises(GpuError, match="no NVIDIA driver here"):
        NvmlGpu(UUID)


@pytest.mark.parametrize("name", ["nvmlDeviceGetSupportedMemoryClocks", "nvmlDeviceGetSupportedGraphicsClocks"])
def test_a_gpu_that_lists_no_clocks_is_refused(
    simulated: list[EmulatedGpu], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(f"pynvml.{name}", lambda *_: [])
    with pytest.raises(GpuError, match="the driver lists no SM clocks that can be locked"):
        NvmlGpu(UUID)


def test_the_driver_tells_the_power_limits_and_takes_another(nvml: NvmlGpu, driver: EmulatedGpu) -> None:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByUUID(UUID.encode())
    most_mw = int(1000 * driver.power_limit_w())
    assert nvml.power_limit_w() == pytest.approx(driver.power_limit_w(), abs=0.001)
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) == most_mw
    pynvml.nvmlDeviceSetPowerManagementLimit(handle, 300_000)
    assert pynvml.nvmlDeviceGetPowerManagementLimit(handle) == 300_000
    assert driver.peek().limit_w == nvml.enforced_limit_w() == driver.enforced_limit_w() == 300.0
    for wrong_mw in (most_mw + 1000, 1000):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            pynvml.nvmlDeviceSetPowerManagementLimit(handle, wrong_mw)
    driver.set_faults(NO_PERMISSION)
    with pytest.raises(pynvml.NVMLError_NoPermission):
        pynvml.nvmlDeviceSetPowerManagementLimit(handle, 200_000)
    with driver.changing() as dynamics:
        dynamics.begin_work(driver.tables, 1, 10.0, driver.tables.dynamic_w[1], 0.0)
    assert nvml.read_clock_mhz() < 1410
    assert nvml.read_power_w() <= 300.0
    before_s = nvml.read_energy().capped_s
    wait_until(lambda: nvml.read_energy().capped_s > before_s)
