"""`perseus verify` as a person runs it: on the emulated GPU, and on a simulated driver with a stand-in for CUDA."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from perseus_plugin.cli.verify import verify
from perseus_plugin.control.ownership import LOCK_DIR_VARIABLE
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from tests.cli.verification import fake_cuda
from tests.nvml_simulator.building import environment

# Who holds a GPU is looked for on the whole machine: no two of these at once.
pytestmark = pytest.mark.xdist_group("nvml helpers")

UUID = "GPU-77777777-1111-2222-3333-444444444444"


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_real_gpu_is_only_read(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = EmulatedGpu.create(tmp_path / "gpu", uuid=UUID)
    ctypes.CDLL(str(simulated_nvml))
    for name, value in environment(simulated_nvml, [gpu.state.path]).items():
        monkeypatch.setenv(name, value)
    fake_cuda.install(monkeypatch, UUID.removeprefix("GPU-"))
    result = run("--minutes", "0.05", "-o", str(tmp_path / "verify.json"))
    assert result.exception is None, result.output
    print(result.output)
