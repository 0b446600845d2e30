"""The helper on NVML, simulated at its ABI: whatever dies or fails, the driver is told to free the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from perseus_plugin.control import client
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.ownership import LOCK_DIR_VARIABLE
from perseus_plugin.control.wire import Applied, Deviation, Mark, SwitchLatency, Tick, Trouble
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import GPU_LOST, IGNORE_LOCKS, NO_PERMISSION
from tests.gpus.fake_zeusd import FakeZeusd
from tests.waiting import stop_process, wait_until

from .harness import free_and_unowned, other_events, start_trainer, wait_for_event

# Who holds a GPU is looked for on the whole machine, where other tests run beside.
UUID = f"GPU-{uuid.uuid4()}"


@pytest.fixture
def gpu(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """What the simulated driver holds."""
    gpu = EmulatedGpu.create(
        tmp_path / "gpu", uuid=UUID, switch_latency_s=0.002, switch_jitter_s=0.0, tick_period_s=0.01
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(simulated_nvml.parent), prepend=os.pathsep)
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", str(gpu.state.path))
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    return gpu


@pytest.fixture
def spec(gpu: EmulatedGpu) -> str:
    return f"nvml:{UUID}"


def lock(helper: ClockHelper, mhz: int) -> None:
    helper.request(mhz)
    assert wait_for_event(helper, Applied).frequency_mhz == mhz


def test_clocks_latency_and_energy_come_from_the_driver(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    facts = helper.wait_ready(0)
    assert facts is not None
    assert (facts.backend, facts.uuid, facts.emulated) == ("nvml", UUID, False)
    helper.measure_latency(1)
    assert wait_for_event(helper, SwitchLatency).timeouts == 0
    before = len(gpu.events())
    for mhz in (900, 1005, 1410):
        lock(helper, mhz)
    assert [(e.mhz, e.pid) for e in gpu.events()[before:]] == [(mhz, helper.pid) for mhz in (900, 1005, 1410)]
    helper.poll_energy(0.001)
    tick = wait_for_event(helper, Tick)
    assert tick.energy_j == pytest.approx(gpu.read_energy().energy_j, rel=0.5)
    assert tick.capped_s == 0.0


@pytest.mark.parametrize("mode", ["plain", "raw", "exception"])
def test_a_dead_trainer_leaves_no_lock(spec: str, gpu: EmulatedGpu, mode: str) -> None:
    trainer, child = start_trainer(spec, mode)
    if mode != "exception":
        assert gpu.locked_mhz() == 900
        trainer.kill()
    trainer.wait()
    try:
        wait_until(lambda: free_and_unowned(gpu, spec))
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
        assert trainer.stdout is not None
        trainer.stdout.close()
    assert gpu.events()[-1].mhz == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_dead_helper_leaves_no_lock(helper: ClockHelper, gpu: EmulatedGpu, spec: str, number: int) -> None:
    lock(helper, 900)
    os.kill(helper.pid or 0, number)
    wait_until(lambda: gpu.locked_mhz() is None)
    wait_until(lambda: not helper.alive)
    wait_until(lambda: free_and_unowned(gpu, spec))


def test_permission_taken_away_and_given_back(helper: ClockHelper, gpu: EmulatedGpu, spec: str) -> None:
    lock(helper, 900)
    gpu.set_faults(NO_PERMISSION)
    helper.request(1005)
    trouble = wait_for_event(helper, Trouble)
    assert trouble.code == "lock_failed"
    assert "CAP_SYS_ADMIN" in trouble.text
    gpu.set_faults(0)
    assert helper.close(20)
    assert free_and_unowned(gpu, spec)


def test_a_lost_gpu_is_reported_and_what_can_be_done_is_done(helper: ClockHelper, gpu: EmulatedGpu, spec: str) -> None:
    lock(helper, 900)
    gpu.set_faults(GPU_LOST)
    helper.request(1005)
    trouble = wait_for_event(helper, Trouble)
    assert (trouble.code, "GPU is lost" in trouble.text) == ("lock_failed", True)
    assert not helper.close(0.2)  # it goes on trying
    gpu.set_faults(0)
    wait_until(lambda: free_and_unowned(gpu, spec))


def test_slow_driver_calls_never_block_the_trainer_and_the_newest_request_wins(
    helper: ClockHelper, gpu: EmulatedGpu, spec: str
) -> None:
    gpu.set_faults(0, call_s=0.5)
    before = len(gpu.events())
    begin_s = time.monotonic()
    for mhz in (900, 1005, 1200, 1290):
        helper.request(mhz)
        time.sleep(0.001)
    assert time.monotonic() - begin_s < 1.5  # four driver calls take 2 s
    wait_until(lambda: gpu.locked_mhz() == 1290)
    applied = [event.mhz for event in gpu.events()[before:]]
    assert len(applied) < 4
    assert applied[-1] == 1290
    gpu.set_faults(0)
    assert helper.close(20)
    assert free_and_unowned(gpu, spec)


def test_locks_that_are_not_honoured_are_seen(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    gpu.set_faults(IGNORE_LOCKS)
    helper.request(900)
    found = wait_for_event(helper, Deviation)
    assert (found.requested_mhz, found.read_mhz) == (900, 1410)


def test_a_power_cap_is_seen(helper: ClockHelper, gpu: EmulatedGpu) -> None:
    gpu.set_cap(1200)
    helper.request(1410)
    found = wait_for_event(helper, Deviation)
    assert (found.requested_mhz, found.read_mhz) == (1410, 1200)
    helper.mark(1)
    assert wait_for_event(helper, Mark).capped_s > 0


def test_two_jobs_on_one_gpu(helper: ClockHelper, spec: str, gpu: EmulatedGpu) -> None:
    lock(helper, 900)
    second = ClockHelper.start(spec)
    facts = second.wait_ready(60)
    assert facts is not None
    assert not facts.can_lock
    assert f"process {os.getpid()} of user id" in facts.why_not
    second.request(1200)
    assert second.close(20)
    assert gpu.locked_mhz() == 900  # the first job's clock was not touched
    assert other_events(second) == []


def test_no_permission_names_every_way_out(spec: str, gpu: EmulatedGpu, tmp_path: Path) -> None:
    gpu.set_faults(NO_PERMISSION)
    helper = ClockHelper.start(f"auto:{tmp_path / 'zeusd.sock'}:{UUID}")
    facts = helper.wait_ready(60)
    assert facts is not None
    assert (facts.can_lock, facts.backend) == (False, "")
    for part in ("root", "CAP_SYS_ADMIN", "--cap-add SYS_ADMIN", f"zeusd at {tmp_path / 'zeusd.sock'} does not answer"):
        assert part in facts.why_not
    helper.mark(3)
    assert wait_for_event(helper, Mark).tag == 3
    assert helper.close(20)


def test_auto_falls_back_to_zeusd(spec: str, gpu: EmulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSEUS_SIMULATED_UNPRIVILEGED", "1")
    path = tmp_path / "zeusd.sock"
    with FakeZeusd(path, [gpu]) as daemon:
        thread = threading.Thread(target=daemon.serve_forever, args=(0.01,))
        thread.start()
        helper = ClockHelper.start(f"auto:{path}:{UUID}")
        facts = helper.wait_ready(60)
        assert facts is not None
        assert (facts.can_lock, facts.backend, facts.why_not) == (True, "zeusd", "")
        lock(helper, 900)
        assert gpu.locked_mhz() == 900
        os.kill(helper.pid or 0, signal.SIGKILL)  # the daemon keeps no lease, the next helper frees the clock
        wait_until(lambda: free_and_unowned(gpu, spec))
        daemon.shutdown()
        thread.join()


def test_no_driver_is_one_trouble(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", "")
    helper = ClockHelper.start(spec)
    assert helper.wait_ready(60) is None
    wait_until(lambda: not helper.alive)
    (trouble,) = (event for event in helper.drain() if isinstance(event, Trouble))
    assert (trouble.code, "no NVIDIA driver here" in trouble.text) == ("helper_failed", True)


@pytest.mark.parametrize("faults", [0, IGNORE_LOCKS])
def test_a_driver_that_takes_its_time_with_every_call_is_no_silent_helper(
    gpu: EmulatedGpu, spec: str, monkeypatch: pytest.MonkeyPatch, faults: int
) -> None:
    """Not at the start, where the counter is watched, and not while a GPU never reads the clock it was asked for."""
    monkeypatch.setattr(client, "STUCK_AFTER_S", 2.0)
    gpu = EmulatedGpu.create(gpu.state.path, uuid=UUID, switch_latency_s=0.002, tick_period_s=60.0)
    gpu.set_faults(faults, call_s=0.1)
    helper = ClockHelper.start(spec)
    assert helper.wait_ready(60) is not None
    helper.measure_latency()
    latency = wait_for_event(helper, SwitchLatency)
    assert latency.timeouts == (3 if faults else 0)
    helper.request(900)
    wait_for_event(helper, Applied)
    assert [event for event in other_events(helper) if isinstance(event, Trouble)] == []
    gpu.set_faults(0)
    assert helper.close(20)


def test_a_stopped_helper_is_ended_and_its_clock_freed(
    helper: ClockHelper, gpu: EmulatedGpu, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STUCK_AFTER_S", 1.5)
    lock(helper, 705)
    stop_process(helper.pid or 0)
    trouble = wait_for_event(helper, Trouble)
    assert (trouble.code, trouble.free) == ("helper_stuck", True)
    assert gpu.locked_mhz() is None
    wait_until(lambda: free_and_unowned(gpu, spec))
