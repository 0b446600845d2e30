from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import GpuLostError, GpuPermissionError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import A40, A100, FORWARD_LIKE, H100
from perseus_plugin.gpus.emulated.state import (
    GPU_LOST,
    IGNORE_LOCKS,
    LOG_CAPACITY,
    NO_PERMISSION,
    NOT_SUPPORTED,
)
from tests.gpus.conftest import VirtualClock


def test_a_lock_takes_effect_after_the_latency_and_a_reset_too(gpu: EmulatedGpu, clock: VirtualClock) -> None:
    gpu.lock_clock(1005)
    assert gpu.read_clock_mhz() == 1410
    assert gpu.locked_mhz() == 1005
    clock.sleep(0.0051)
    assert gpu.read_clock_mhz() == 1005
    gpu.reset_clock()
    assert gpu.locked_mhz() is None
    clock.sleep(0.0051)
    assert gpu.read_clock_mhz() == 1410
    assert [(e.mhz, e.pid, e.refused) for e in gpu.events()] == [(1005, os.getpid(), False), (0, os.getpid(), False)]


def test_a_clock_off_the_list_is_refused_with_the_nearest(gpu: EmulatedGpu) -> None:
    with pytest.raises(GpuError, match=r"clock 1000 MHz is not supported; the nearest one is 1005 MHz"):
        gpu.lock_clock(1000)
    assert gpu.events() == []


def test_the_counter_moves_in_ticks(gpu: EmulatedGpu, clock: VirtualClock) -> None:
    values = []
    for _ in range(100):
        clock.sleep(0.001)
        values.append(gpu.read_energy().energy_j)
    steps = [b - a for a, b in itertools.pairwise(values) if b > a]
    assert len(steps) in (4, 5)
    # The first tick's period had begun before the GPU was made.
    assert steps[1:] == pytest.approx([0.02 * A100.blocking_w] * (len(steps) - 1))
    assert gpu.exact_energy_j() == pytest.approx(0.1 * A100.blocking_w)


def test_another_opening_of_the_file_is_the_same_gpu(gpu: EmulatedGpu, clock: VirtualClock) -> None:
    other = EmulatedGpu(gpu.state.path, now=clock.now)
    other.lock_clock(900)
    clock.sleep(0.01)
    assert gpu.read_clock_mhz() == 900
    assert (other.uuid, other.name) == (gpu.uuid, gpu.name)
    assert other.tables == gpu.tables


def test_create_keeps_what_is_there_and_replaces_what_is_described_differently(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "gpu"
    EmulatedGpu.create(path).lock_clock(900)
    assert EmulatedGpu.create(path).locked_mhz() == 900
    replaced = EmulatedGpu.create(path, model=A40)
    assert replaced.locked_mhz() is None
    assert replaced.supported_clocks_mhz()[0] == 1740
    assert EmulatedGpu.create(path, model=A40, switch_latency_s=0.1).switch_latency_s() == 0.1
    EmulatedGpu.create(path, model=H100).set_power_limit(500.0)
    assert EmulatedGpu.create(path, model=H100).peek().limit_w == 500.0
    assert EmulatedGpu.create(path, model=H100, power_limit_w=400.0).peek().limit_w == 400.0
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tick_period_s": 0.0}, "tick period 0.0 s"),
        ({"tick_window_s": 0.5}, "window 0.5 s"),
        ({"switch_latency_s": -1.0}, "switch latency -1.0 s"),
        ({"power_limit_w": 500.0}, "power limit 500 W; allowed: above 51.45 W, at most 476.65 W"),
    ],
)
def test_bad_descriptions_are_refused(tmp_path: Path, options: dict[str, float], named: str) -> None:
    with pytest.raises(GpuError, match=named):
        EmulatedGpu.create(tmp_path / "gpu", **options)  # type: ignore[arg-type]


def test_its_folder_s_name_need_not_be_unicode(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9" / "rank0"
    gpu = EmulatedGpu.create(path, A100)
    gpu.lock_clock(810)
    assert EmulatedGpu(path).locked_mhz() == 810


def test_opening_what_is_no_gpu_says_so(tmp_path: Path) -> None:
    with pytest.raises(GpuError, match="cannot open the emulated GPU"):
        EmulatedGpu(tmp_path / "missing")
    (tmp_path / "short").write_bytes(b"x" * 100)
    with pytest.raises(GpuError, match="its size is 100 bytes"):
        EmulatedGpu(tmp_path / "short")


def test_a_file_from_before_the_last_boot_is_refused_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perseus_plugin.gpus.emulated.state.boot_id", lambda: "another-boot")
    EmulatedGpu.create(tmp_path / "gpu").lock_clock(900)
    monkeypatch.undo()
    with pytest.raises(GpuError, match="before the last boot"):
        EmulatedGpu(tmp_path / "gpu")
    assert EmulatedGpu.create(tmp_path / "gpu").locked_mhz() is None


@pytest.mark.parametrize(
    ("fault", "error"), [(NO_PERMISSION, GpuPermissionError), (NOT_SUPPORTED, GpuError), (GPU_LOST, GpuLostError)]
)
def test_injected_refusals_raise_and_are_logged(gpu: EmulatedGpu, fault: int, error: type[GpuError]) -> None:
    gpu.set_faults(fault)
    with pytest.raises(error):
        gpu.lock_clock(900)
    assert gpu.locked_mhz() is None
    assert [e.refused for e in gpu.events()] == [True]
    if fault == GPU_LOST:
        with pytest.raises(GpuLostError):
            gpu.read_clock_mhz()
    else:
        assert gpu.read_clock_mhz() == 1410


def test_ignored_locks_are_accepted_without_effect(gpu: EmulatedGpu, clock: VirtualClock) -> None:
    gpu.set_faults(IGNORE_LOCKS)
    gpu.lock_clock(900)
    clock.sleep(0.1)
    assert gpu.locked_mhz() == 900
    assert gpu.read_clock_mhz() == 1410


def test_slow_driver_calls_take_their_time(gpu: EmulatedGpu, clock: VirtualClock) -> None:
    gpu.set_faults(0, call_s=2.0)
    before_s = clock.now()
    gpu.lock_clock(900)
    assert clock.now() == pytest.approx(before_s + 2.0)


def test_slowdown_of_one_kind_leaves_the_others(gpu: EmulatedGpu) -> None:
    gpu.set_slowdown(1.5, "forward")
    assert gpu.peek().slowdown == [1.0, 1.5, 1.0, 1.0]
    gpu.set_slowdown(1.0)
    assert gpu.peek().slowdown == [1.0] * 4
    with pytest.raises(GpuError, match=r"slowdown 0; allowed: above 0"):
        gpu.set_slowdown(0)


def test_the_log_keeps_the_newest_calls(gpu: EmulatedGpu) -> None:
    with gpu.state.update() as d:
        for number in range(LOG_CAPACITY + 5):
            gpu.state.log(d, float(number), 900, False)
    events = gpu.events()
    assert len(events) == LOG_CAPACITY
    assert (events[0].time_s, events[-1].time_s) == (5.0, float(LOG_CAPACITY + 4))


def test_a_failed_update_changes_nothing(gpu: EmulatedGpu) -> None:
    before = gpu.peek()
    with pytest.raises(RuntimeError, match="on purpose"), gpu.changing() as d:  # noqa: PT012
        d.energy_j = 1e9
        raise RuntimeError("on purpose")
    assert gpu.peek() == before


def test_state_survives_a_round_trip(gpu: EmulatedGpu) -> None:
    with gpu.changing() as d:
        d.begin_work(gpu.tables, FORWARD_LIKE, 0.5, 390.0, 0.0)
        d.cap_mhz, d.capped_s, d.slowdown = 1200, 0.25, [1.0, 2.0, 3.0, 4.0]
        d.change_clock(900, 900, d.at_s + 1.0)
        d.change_clock(1200, 0, d.at_s + 2.0)
    assert gpu.peek() == d


HOLDER = """
import sys, time
from perseus_plugin.gpus.emulated.device import EmulatedGpu
gpu = EmulatedGpu(sys.argv[1])
with gpu.changing() as d:
    d.energy_j = 1e9
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_holder_that_is_killed_within_an_update_blocks_nobody_and_changes_nothing(tmp_path: Path) -> None:
    gpu = EmulatedGpu.create(tmp_path / "gpu")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "gpu")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holding\n"
        assert gpu.read_clock_mhz() == 1410  # readers do not wait for the writer
        holder.send_signal(signal.SIGKILL)
    gpu.lock_clock(900)
    assert gpu.locked_mhz() == 900
    assert gpu.exact_energy_j() < 1e8


def _lock_many(path: Path, mhz: int, times: int) -> None:
    _repeat(EmulatedGpu(path), mhz, times)


def _repeat(gpu: EmulatedGpu, mhz: int, times: int) -> None:
    for _ in range(times):
        gpu.lock_clock(mhz)


def test_processes_and_forked_children_do_not_lose_each_others_updates(tmp_path: Path) -> None:
    gpu = EmulatedGpu.create(tmp_path / "gpu")
    context = multiprocessing.get_context("fork")
    # The first child uses the forked object, the second opens its own.
    children = [
        context.Process(target=_repeat, args=(gpu, 900, 200)),
        context.Process(target=_lock_many, args=(tmp_path / "gpu", 1200, 200)),
    ]
    for child in children:
        child.start()
    _lock_many(tmp_path / "gpu", 1005, 200)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    seen = [e.mhz for e in gpu.events()]
    assert sorted(seen) == [900] * 200 + [1005] * 200 + [1200] * 200


def test_a_file_of_the_script_in_place_of_the_gpus_is_neither_locked_nor_closed(tmp_path: Path) -> None:
    gpu = EmulatedGpu.create(tmp_path / "gpu")
    own = next(
        int(entry.name)
        for entry in Path("/proc/self/fd").iterdir()
        if entry.exists() and entry.resolve() == (tmp_path / "gpu").resolve()
    )
    theirs = os.open(tmp_path / "theirs", os.O_RDWR | os.O_CREAT)
    os.dup2(theirs, own)
    gpu.lock_clock(1005)
    assert gpu.locked_mhz() == 1005
    gpu.close()
    assert os.fstat(own).st_ino == os.fstat(theirs).st_ino
    os.close(own)
    os.close(theirs)


def test_a_change_takes_as_long_as_the_clock_it_goes_to_and_a_call_its_own_time(
    tmp_path: Path, clock: VirtualClock
) -> None:
    gpu = EmulatedGpu.create(tmp_path / "h100", H100, switch_jitter_s=0.0, now=clock.now, sleep=clock.sleep)
    for mhz, rises in ((900, False), (1500, True), (345, False), (1980, True)):
        began_s = clock.now()
        gpu.lock_clock(mhz)
        assert clock.now() - began_s == pytest.approx(H100.set_call_s)
        rise_s, drop_s = H100.switch_times_s(mhz)
        taken_s = rise_s if rises else drop_s
        clock.sleep(0.99 * taken_s)
        assert gpu.read_clock_mhz() != mhz
        clock.sleep(0.02 * taken_s)
        assert gpu.read_clock_mhz() == mhz
    began_s = clock.now()
    gpu.read_energy()
    assert clock.now() - began_s == pytest.approx(H100.energy_call_s)


def test_a_power_limit_that_is_set_holds_from_then_on(tmp_path: Path, clock: VirtualClock) -> None:
    gpu = EmulatedGpu.create(tmp_path / "a100", now=clock.now, sleep=clock.sleep)
    with gpu.changing() as dynamics:
        dynamics.begin_work(gpu.tables, FORWARD_LIKE, 10.0, gpu.tables.dynamic_w[FORWARD_LIKE], 0.0)
    clock.sleep(1.0)
    assert (gpu.read_clock_mhz(), gpu.read_energy().capped_s) == (1410, 0.0)
    gpu.set_power_limit(300.0)
    clock.sleep(1.0)
    reading = gpu.read_energy()
    assert gpu.read_clock_mhz() < 1410
    assert gpu.read_power_w() <= 300.0
    assert reading.capped_s == pytest.approx(1.0)
    assert gpu.power_limit_w() == A100.most_w
    with pytest.raises(GpuError, match=r"power limit 500 W; allowed: above 51\.45 W, at most 476\.65 W"):
        gpu.set_power_limit(500.0)
