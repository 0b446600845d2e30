from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from perseus_plugin.cli import doctor as doctor_module
from perseus_plugin.cli.doctor import doctor
from perseus_plugin.control.ownership import LOCK_DIR_VARIABLE, Ownership, holder_of, lock_path
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import GPU_LOST, IGNORE_LOCKS, MIG_ENABLED, NO_COUNTER, NO_FIELDS, NO_PERMISSION
from tests.waiting import wait_until

# Who holds a GPU is looked for on the whole machine: no two of these at once.
pytestmark = pytest.mark.xdist_group("nvml helpers")

UUIDS = ["GPU-00000000-1111-2222-3333-444444444444", "GPU-55555555-1111-2222-3333-444444444444"]


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_module, "COUNTER_WATCH_S", 0.1)
    monkeypatch.setattr("perseus_plugin.control.examination.COUNTER_WATCH_S", 0.2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", "")


@pytest.fixture
def gpus(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGpu]:
    """Two GPUs behind the simulated driver."""
    gpus = [EmulatedGpu.create(tmp_path / uuid, uuid=uuid, switch_latency_s=0.002) for uuid in UUIDS]
    ctypes.CDLL(str(simulated_nvml))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(simulated_nvml.parent), prepend=os.pathsep)
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", os.pathsep.join(str(gpu.state.path) for gpu in gpus))
    return gpus


def test_all_gpus_that_work_give_status_0_and_are_left_free(gpus: list[EmulatedGpu]) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for gpu in gpus:
        assert f"{gpu.name} {gpu.uuid}: would be controlled" in result.output
        assert gpu.locked_mhz() is None
        assert {event.mhz for event in gpu.events()} == {0, 840, 1410}
    assert result.output.count("MIG            not in the way") == len(gpus)
    assert "in force: 477 W, highest that can be set: 477 W" in result.output
    for text in ("driver           999.99", "81 from 210 to 1410 MHz", "allowed, through nvml", "moves every 20 ms"):
        assert text in result.output


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (NO_PERMISSION, "CAP_SYS_ADMIN"),
        (IGNORE_LOCKS, "the driver takes locks but the clock does not follow"),
        (MIG_ENABLED, "disable it with `nvidia-smi -mig 0`"),
        (NO_COUNTER, "the energy counter cannot be read"),
        (GPU_LOST, "GPU 1: GPU is lost"),
    ],
)
def test_one_gpu_that_does_not_work_gives_status_3_and_the_remedy(
    gpus: list[EmulatedGpu], fault: int, text: str
) -> None:
    gpus[1].set_faults(fault)
    result = run()
    assert result.exit_code == 3
    assert text in result.output
    assert run("--gpu", UUIDS[0]).exit_code == 0
    result = run("--gpu", UUIDS[1])
    assert result.exit_code == 1
    if fault == GPU_LOST:
        assert "1 more do not tell theirs (GPU 1: GPU is lost" in result.output


def test_a_counter_that_stands_still_is_seen(gpus: list[EmulatedGpu], tmp_path: Path) -> None:
    EmulatedGpu.create(tmp_path / "frozen", tick_period_s=1000.0)
    result = run("--emulated", str(tmp_path / "frozen"))
    assert result.exit_code == 1
    assert "MIG" not in result.output, "only of GPUs that can be divided"
    assert "would NOT be controlled" in result.output
    assert "the energy counter read 0 J for 0.2 s, so no energies can be measured" in result.output


def test_without_field_values_the_counter_is_read_by_its_own_function(gpus: list[EmulatedGpu]) -> None:
    for gpu in gpus:
        gpu.set_faults(NO_FIELDS)
    assert run().exit_code == 0


@pytest.mark.parametrize(
    ("value", "seen"),
    [("1", [1]), ("GPU-5555", [1]), ("1,0", [0, 1]), ("", []), ("-1,0", []), ("0,7,1", [0]), ("0,0", [])],
)
def test_cuda_visible_devices_is_obeyed(
    gpus: list[EmulatedGpu], monkeypatch: pytest.MonkeyPatch, value: str, seen: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    result = run("--no-control")
    assert [i for i, uuid in enumerate(UUIDS) if uuid in result.output] == seen
    if not seen:
        assert "no GPU here, or none that CUDA_VISIBLE_DEVICES leaves" in result.output


def test_the_beginning_of_a_uuid_is_enough(gpus: list[EmulatedGpu]) -> None:
    for beginning in ("GPU-5555", "5555"):
        result = run("--gpu", beginning)
        assert result.exit_code == 0
        assert f"{UUIDS[1]}: would be controlled" in result.output
    result = run("--gpu", "GPU-9")
    assert result.exit_code == 1
    assert f"--gpu: got 'GPU-9', which is no GPU here; allowed: one of {UUIDS[0]}, {UUIDS[1]}" in result.output
    result = run("--gpu", "GPU-9", "--gpu", UUIDS[0])
    assert result.exit_code == 3, "one that is not there does not keep the doctor from the others"


def test_a_gpu_in_use_is_not_touched(gpus: list[EmulatedGpu]) -> None:
    owner = Ownership(lock_path(f"nvml:{UUIDS[0]}", UUIDS[0]), os.getpid())
    gpus[0].lock_clock(900)
    result = run("--gpu", UUIDS[0])
    assert result.exit_code == 1
    assert f"held by process {os.getpid()}" in result.output
    assert gpus[0].locked_mhz() == 900
    owner.release()


def test_without_control_nothing_is_set(gpus: list[EmulatedGpu]) -> None:
    result = run("--no-control")
    assert result.exit_code == 1
    assert "not tried" in result.output
    assert gpus[0].events() == []


def test_a_lock_left_behind_is_found_and_freed(gpus: list[EmulatedGpu]) -> None:
    dead = Ownership(lock_path(f"nvml:{UUIDS[0]}", UUIDS[0]), 4711)
    dead.mark(locked=True)
    dead.release()
    gpus[0].lock_clock(900)
    result = run("--gpu", UUIDS[0])
    assert result.exit_code == 0
    assert "left locked by process 4711" in result.output
    assert gpus[0].locked_mhz() is None


def test_a_doctor_that_is_killed_leaves_no_clock_locked(tmp_path: Path) -> None:
    gpu = EmulatedGpu.create(tmp_path / "gpu", switch_latency_s=0.3)
    command = [sys.executable, "-m", "perseus_plugin.cli.main", "doctor", "--emulated", str(gpu.state.path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: gpu.locked_mhz() not in (None, 1410))
        process.kill()
    wait_until(lambda: gpu.locked_mhz() is None)
    wait_until(lambda: holder_of(lock_path(f"emulated:{gpu.state.path}", gpu.uuid)) is None)


def test_json_holds_the_same(tmp_path: Path) -> None:
    EmulatedGpu.create(tmp_path / "gpu")
    result = run("--json", "--emulated", str(tmp_path / "gpu"))
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["schema"] == "perseus-doctor/1"
    assert set(found["software"]) == {"driver", "torch", "deepspeed", "megatron-core", "ortools", "nvidia-ml-py"}
    (gpu,) = found["gpus"]
    assert (gpu["controlled"], gpu["remedy"]) == (True, "")
    assert gpu["facts"]["control"] == "allowed, through emulated"


def test_no_gpu_and_a_wrong_file_give_status_1(tmp_path: Path) -> None:
    result = run("--emulated", str(tmp_path / "missing"))
    assert result.exit_code == 1
    assert "allowed: the state file of an emulated GPU" in result.output


def test_no_socket_and_no_daemon_are_told_apart(tmp_path: Path) -> None:
    socket = tmp_path / "z.sock"
    assert f"zeusd            no socket at {socket}\n" in run("--zeusd-socket", str(socket)).output
    socket.touch()
    found = json.loads(run("--json", "--zeusd-socket", str(socket)).output)
    assert "does not answer" in found["zeusd"]
