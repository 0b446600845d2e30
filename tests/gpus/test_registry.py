from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perseus_plugin.cli.app import app
from perseus_plugin.cli.targets import gpu_targets
from perseus_plugin.config import parse_config
from perseus_plugin.control.selection import select_gpu
from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.registry import backend, backends, candidate_specs, names, open_gpu
from tests.factories import placement


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
        GpuError, match=r"allowed: nvml:UUID, zeusd:SOCKET:\[INDEX\]:UUID, .*emulated:PATH, .*auto:SOCKET:UUID$"
    ):
        open_gpu(spec)


def test_a_helper_that_opens_a_gpu_imports_no_heavy_module(tmp_path: Path) -> None:
    EmulatedGpu.create(tmp_path / "gpu")
    program = (
        "import sys, perseus_plugin.control.helper.process;"
        f"perseus_plugin.gpus.registry.open_gpu({f'emulated:{tmp_path}/gpu'!r}).close();"
        "heavy = {'numpy', 'torch', 'pynvml', 'pydantic', 'ortools', 'http', 'importlib.metadata'};"
        "print(*heavy & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_auto_tries_nvml_and_then_zeusd() -> None:
    assert candidate_specs("auto:/run/z:x.sock:GPU-1") == ("nvml:GPU-1", "zeusd:/run/z:x.sock::GPU-1")
    assert candidate_specs("emulated:/x") == ("emulated:/x",)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another package with two backends, one of which cannot be loaded, and one whose name is taken."""
    folder = tmp_path / "packages"
    about = folder / "other_gpus-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-gpus\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[perseus_plugin.gpus]\nother = other_gpus:Other\nbroken = other_gpus:Missing\nnvml = other_gpus:Missing\n"
    )
    (folder / "other_gpus.py").write_text(
        textwrap.dedent("""
            from perseus_plugin.gpus.base import FoundGpu, GpuBackend, ListedGpu
            class Other(GpuBackend):
                devices, maker = ("xpu",), "Other"
                def open(self, rest):
                    return f"opened {rest}"
                def listed(self):
                    return [ListedGpu(0, "OTHER-1", "Other 9000"), ListedGpu(1, problem="GPU 1 is lost")]
                def find(self, device):
                    return FoundGpu("OTHER-1", "Other 9000") if device == "xpu:1" else None
        """)
    )
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.usefixtures("outside")
def test_a_backend_of_another_package_is_one_like_ours(tmp_path: Path) -> None:
    assert names()[-2:] == ("other", "broken")
    assert {"nvml", "zeusd", "emulated"} <= set(names()[:-2])
    assert open_gpu("other:OTHER-1") == "opened OTHER-1"  # type: ignore[comparison-overlap]
    assert type(backend("nvml")).__module__ == "perseus_plugin.gpus.nvml"
    xpu = placement().model_copy(update={"device": "xpu:1"})
    for chosen in ("other", "auto"):
        selection = select_gpu(parse_config({"gpu": {"backend": chosen}}), xpu, tmp_path)
        assert (selection.backend, selection.spec, selection.name) == (chosen, "other:OTHER-1", "Other 9000")
    elsewhere = placement().model_copy(update={"device": "mps"})
    selection = select_gpu(parse_config({"gpu": {"backend": "other"}}), elsewhere, tmp_path)
    assert selection.why_not == "only clocks of Other GPUs can be set, and mps is none; nothing needs to be done"
    with pytest.raises(ConfigError, match=r'allowed: "auto", "nvml", "zeusd", "emulated", "other", "broken" or "off"$'):
        parse_config({"gpu": {"backend": "another"}})


@pytest.mark.usefixtures("outside")
def test_a_backend_that_cannot_be_loaded_says_so_and_is_loaded_by_nobody_else(tmp_path: Path) -> None:
    with pytest.raises(GpuError, match="GPU backend 'broken': other_gpus:Missing cannot be loaded: AttributeError"):
        list(backends())
    assert select_gpu(parse_config({"gpu": {"backend": "emulated"}}), placement(), tmp_path).spec is not None
    EmulatedGpu.create(tmp_path / "gpu")
    result = CliRunner().invoke(app, ["doctor", "--no-control", "--emulated", str(tmp_path / "gpu")])
    assert "backend broken   GPU backend 'broken': other_gpus:Missing cannot be loaded" in result.output
    assert "emulated A100" in result.output


@pytest.mark.usefixtures("outside")
def test_commands_are_about_its_gpus_too() -> None:
    """Also where there is no NVIDIA driver."""
    targets = gpu_targets([], [], "/s.sock")
    assert [(target.name, target.spec, target.problem) for target in targets] == [
        ("OTHER-1", "other:OTHER-1", ""),
        ("GPU 1", None, "GPU 1 is lost"),
    ]
    assert [target.spec for target in gpu_targets(["OTHER"], [], "/s.sock")] == ["other:OTHER-1"]


def test_every_backend_of_ours_says_what_its_specs_look_like() -> None:
    for name, one in backends():
        assert one.form, name
        with pytest.raises(GpuError, match="allowed: nvml:"):
            open_gpu(f"{name}:")
