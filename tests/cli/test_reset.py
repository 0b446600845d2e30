from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from perseus_plugin.cli.reset import reset
from perseus_plugin.control import lock_folder
from perseus_plugin.control.client import ClockHelper
from perseus_plugin.control.ownership import LOCK_DIR_VARIABLE, Ownership, lock_path, read_record
from perseus_plugin.errors import ConfigError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import GPU_LOST, NO_PERMISSION
from tests.nvml_simulator.building import simulated_nvml
from tests.waiting import wait_until

__all__ = ["simulated_nvml"]


# Who holds a GPU is looked for on the whole machine: no two of these at once.
pytestmark = pytest.mark.xdist_group("nvml helpers")


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(reset)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def gpu(tmp_path: Path) -> EmulatedGpu:
    """A GPU that a dead run left locked."""
    gpu = EmulatedGpu.create(tmp_path / "gpu")
    gpu.lock_clock(900)
    owner = owner_of(gpu)
    owner.mark(locked=True)
    owner.release()
    return gpu


def owner_of(gpu: EmulatedGpu) -> Ownership:
    return Ownership(lock_path(f"emulated:{gpu.state.path}", gpu.uuid), os.getpid())


def test_it_frees_what_a_dead_run_left(gpu: EmulatedGpu) -> None:
    result = run("--emulated", str(gpu.state.path))
    assert result.exit_code == 0
    assert f"{gpu.name} {gpu.uuid}: free (it was left locked by process {os.getpid()}" in result.output
    assert gpu.locked_mhz() is None
    assert read_record(lock_path(f"emulated:{gpu.state.path}", gpu.uuid))["clock"] == "free"
    again = run("--emulated", str(gpu.state.path))
    assert again.output.strip() == f"{gpu.name} {gpu.uuid}: free"


def test_a_running_jobs_gpu_is_freed_only_by_force(gpu: EmulatedGpu) -> None:
    owner = owner_of(gpu)
    result = run("--emulated", str(gpu.state.path))
    assert result.exit_code == 1
    assert "controls this GPU" in result.output
    assert "--force" in result.output
    assert gpu.locked_mhz() == 900
    assert run("--emulated", str(gpu.state.path), "--force").exit_code == 0
    assert gpu.locked_mhz() is None
    owner.release()


def test_what_cannot_be_freed_gives_status_1(gpu: EmulatedGpu, tmp_path: Path) -> None:
    gpu.set_faults(NO_PERMISSION)
    result = run("--emulated", str(gpu.state.path))
    assert result.exit_code == 1
    assert "not freed: emulated A100-SXM4-80GB: no permission to set clocks" in result.output
    assert isinstance(run("--emulated", str(tmp_path / "missing")).exception, ConfigError)


def test_what_others_have_put_where_its_lock_file_is_to_be_does_not_hold_it_up(gpu: EmulatedGpu) -> None:
    path = lock_path(f"emulated:{gpu.state.path}", gpu.uuid)
    path.unlink()
    os.mkfifo(path)
    result = run("--emulated", str(gpu.state.path))
    assert result.exit_code == 1
    assert "cannot use the GPU's lock file: it is no regular file; remove it" in result.output
    assert run("--emulated", str(gpu.state.path), "--force").exit_code == 0
    assert gpu.locked_mhz() is None


def test_a_forged_record_prints_no_line_of_its_own(gpu: EmulatedGpu) -> None:
    path = lock_path(f"emulated:{gpu.state.path}", gpu.uuid)
    record = {**json.loads(path.read_text()), "clock": "locked", "command": "x)\n\x1b[1A\rGPU-1: free"}
    path.write_text(json.dumps(record))
    result = run("--emulated", str(gpu.state.path))
    assert len(result.output.splitlines()) == 1
    assert "\x1b" not in result.output


# Behind the simulated driver.

UUIDS = [f"GPU-{digit * 8}-1111-2222-3333-444444444444" for digit in "0567"]


@pytest.fixture
def gpus(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGpu]:
    """Four locked GPUs."""
    gpus = [EmulatedGpu.create(tmp_path / uuid, uuid=uuid, switch_latency_s=0.002) for uuid in UUIDS]
    for gpu in gpus:
        gpu.lock_clock(900)
    ctypes.CDLL(str(simulated_nvml))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(simulated_nvml.parent), prepend=os.pathsep)
    monkeypatch.setenv("PERSEUS_SIMULATED_GPUS", os.pathsep.join(str(gpu.state.path) for gpu in gpus))
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return gpus


def test_a_lock_folder_that_others_can_write_is_not_used(
    gpus: list[EmulatedGpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_folder, "ROOTS_LOCK_DIR", str(tmp_path / "run" / "perseus"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    planted = tmp_path / "locks"
    planted.mkdir()
    planted.chmod(0o1777)
    for uuid in UUIDS:
        os.mkfifo(planted / f"{uuid}.lock")
    result = run()
    assert result.exit_code == 0
    assert [gpu.locked_mhz() for gpu in gpus] == [None] * 4
    assert f"the GPU's lock file is in {tmp_path}/run/perseus, as {planted} can be written by others" in result.output


def test_one_lost_gpu_does_not_keep_the_others_locked(gpus: list[EmulatedGpu]) -> None:
    gpus[1].set_faults(GPU_LOST)
    result = run()
    assert result.exit_code == 3
    assert [gpu.locked_mhz() for gpu in gpus] == [None, 900, None, None]
    assert "GPU 1: not freed: GPU 1: GPU is lost" in result.output
    assert run("--gpu", UUIDS[0], "--gpu", UUIDS[2]).exit_code == 0
    for gpu in gpus:
        gpu.set_faults(GPU_LOST)
    assert run().exit_code == 1


def test_a_job_with_a_lock_folder_of_its_own_keeps_its_gpu(
    gpus: list[EmulatedGpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = ClockHelper.start(f"nvml:{UUIDS[0]}")
    facts = helper.wait_ready(60)
    assert facts is not None
    assert facts.can_lock
    helper.request(1005)
    wait_until(lambda: gpus[0].locked_mhz() == 1005)
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "others"))
    result = run("--gpu", UUIDS[0])
    assert result.exit_code == 1
    assert f"its helper is process {helper.pid}" in result.output
    assert "--force frees it all the same" in result.output
    assert gpus[0].locked_mhz() == 1005
    second = ClockHelper.start(f"nvml:{UUIDS[0]}")
    refused = second.wait_ready(60)
    assert refused is not None
    assert not refused.can_lock
    second.close()
    assert run("--gpu", UUIDS[0], "--force").exit_code == 0
    assert gpus[0].locked_mhz() is None
    helper.close()
    assert run("--gpu", UUIDS[0]).exit_code == 0
