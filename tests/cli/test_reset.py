from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from perseus_plugin.cli.reset import reset
from perseus_plugin.control.ownership import Ownership, lock_path, read_record
from perseus_plugin.errors import ConfigError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import NO_PERMISSION


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
