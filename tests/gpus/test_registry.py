from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.registry import candidate_specs, open_gpu


def test_an_emulated_gpu_is_opened_by_its_path(tmp_path: Path) -> None:
    made = EmulatedGpu.create(tmp_path / "gpu:with:colons")
    opened = open_gpu(f"emulated:{tmp_path / 'gpu:with:colons'}")
    assert opened.uuid == made.uuid
    assert opened.emulated


@pytest.mark.parametrize(
    "spec", ["", "emulated:", "cuda:0", "nvml", "zeusd:/run/x.sock", "zeusd:/run/x.sock:a:GPU-1", "auto:GPU-1"]
)
def test_other_specs_are_refused_with_what_is_allowed(spec: str) -> None:
    with pytest.raises(
        GpuError, match=r"allowed: emulated:PATH, nvml:UUID, zeusd:SOCKET:\[INDEX\]:UUID, auto:SOCKET:UUID"
    ):
        open_gpu(spec)


def test_importing_the_helper_imports_no_heavy_module() -> None:
    program = (
        "import sys, perseus_plugin.control.helper.process, perseus_plugin.gpus.emulated.device;"
        "print(*{'numpy', 'torch', 'pynvml', 'pydantic', 'ortools', 'http'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_auto_tries_nvml_and_then_zeusd() -> None:
    assert candidate_specs("auto:/run/z:x.sock:GPU-1") == ("nvml:GPU-1", "zeusd:/run/z:x.sock::GPU-1")
    assert candidate_specs("emulated:/x") == ("emulated:/x",)
