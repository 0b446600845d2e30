from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from perseus_plugin.cli import doctor as doctor_module
from perseus_plugin.cli.doctor import counter_period, doctor
from perseus_plugin.control.ownership import LOCK_DIR_VARIABLE, Ownership, lock_path
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import IGNORE_LOCKS, MIG_ENABLED, NO_PERMISSION

UUIDS = ["GPU-00000000-1111-2222-3333-444444444444", "GPU-55555555-1111-2222-3333-444444444444"]


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_module, "COUNTER_WATCH_S", 0.1)
    monkeypatch.setattr("perseus_plugin.control.latency.TIMEOUT_S", 0.05)
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", "")


@pytest.fixture
def gpus(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGpu]:
    """Two GPUs behind the simulated driver."""
    gpus = [EmulatedGpu.create(tmp_path / uuid, uuid=uuid, switch_latency_s=0.002) for uuid in UUIDS]
    ctypes.CDLL(str(simulated_nvml))
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", os.pathsep.join(str(gpu.state.path) for gpu in gpus))
    return gpus


def test_all_gpus_that_work_give_status_0_and_are_left_free(gpus: list[EmulatedGpu]) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for gpu in gpus:
        assert f"{gpu.name} {gpu.uuid}: would be controlled" in result.output
        assert gpu.locked_mhz() is None
        assert {event.mhz for event in gpu.events()} == {0, 840, 1410}
    for text in ("driver           999.99", "81 from 210 to 1410 MHz", "allowed, through nvml", "moves every 20 ms"):
        assert text in result.output


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (NO_PERMISSION, "CAP_SYS_ADMIN"),
        (IGNORE_LOCKS, "the driver takes locks but the clock does not follow"),
        (MIG_ENABLED, "disable it with `nvidia-smi -mig 0`"),
    ],
)
def test_one_gpu_that_does_not_work_gives_status_1_and_the_remedy(
    gpus: list[EmulatedGpu], fault: int, text: str
) -> None:
    gpus[1].set_faults(fault)
    result = run()
    assert result.exit_code == 1
    assert text in result.output
    assert run("--gpu", UUIDS[0]).exit_code == 0


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
    assert doctor_module.zeusd_state(str(tmp_path / "z.sock")) == f"no socket at {tmp_path / 'z.sock'}"
    (tmp_path / "z.sock").touch()
    assert "does not answer" in doctor_module.zeusd_state(str(tmp_path / "z.sock"))


def test_the_period_of_a_counter_that_stands_still(tmp_path: Path) -> None:
    gpu = EmulatedGpu.create(tmp_path / "gpu", tick_period_s=10.0)
    assert counter_period(gpu).startswith("did not move within")
