from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perseus_plugin.config import PerseusConfig, parse_config
from perseus_plugin.control.selection import Selection, select_gpu, with_facts
from perseus_plugin.control.wire import DeviceFacts
from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.physics import MODELS
from perseus_plugin.gpus.registry import open_gpu
from tests.factories import placement

FACTS = DeviceFacts("NVIDIA A100", "GPU-1", False, (1410, 210), True, "", "", 1, "zeusd", power_limit_w=400.0)


def config(backend: str = "auto", socket: str = "/run/zeusd/zeusd.sock", **emulation: Any) -> PerseusConfig:
    return parse_config({"gpu": {"backend": backend, "zeusd_socket": socket}, "emulation": emulation})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch sees two GPUs whose order is not NVML's."""
    import torch

    names = ["NVIDIA A100", "NVIDIA H100"]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"{index}" * 4, name=names[index])
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])


@pytest.mark.parametrize("backend", ["auto", "emulated"])
def test_without_cuda_a_gpu_is_emulated_for_each_rank(tmp_path: Path, backend: str) -> None:
    made = [select_gpu(config(backend), placement(rank), tmp_path) for rank in range(2)]
    for selection in made:
        assert selection.emulated
        assert selection.backend == "emulated"
        assert selection.spec is not None
        assert selection.emulated_gpu is not None
        opened = open_gpu(selection.spec)
        assert (opened.uuid, opened.name) == (selection.emulated_gpu.uuid, selection.name)
        assert "emulated" in opened.name
    assert made[0].spec != made[1].spec
    again = select_gpu(config(backend), placement(0), tmp_path)
    assert again.spec == made[0].spec


def test_the_emulated_gpu_is_as_configured(tmp_path: Path) -> None:
    selection = select_gpu(config("emulated", switch_latency_s=0.25, counter_period_s=0.1), placement(), tmp_path)
    assert selection.emulated_gpu is not None
    assert selection.emulated_gpu.switch_latency_s() == 0.25
    assert selection.emulated_gpu.tables.tick_period_s == 0.1
    assert selection.poll_interval_s <= 0.1 / 3, "each tick of the counter must be seen close to when it happens"


@pytest.mark.parametrize("name", ["A100", "A40", "H100", "H200", "B200", "B300"])
def test_every_model_that_can_be_configured_is_made_with_its_own_figures(tmp_path: Path, name: str) -> None:
    selection, model = select_gpu(config("emulated", model=name), placement(), tmp_path), MODELS[name.lower()]
    gpu = selection.emulated_gpu
    assert gpu is not None
    assert (gpu.name, gpu.supported_clocks_mhz()) == (model.name, model.clocks_mhz())
    assert (gpu.peek().limit_w, gpu.tables.tick_period_s) == (model.limit_w, model.tick_period_s)


def test_the_emulated_gpus_power_limit_is_as_configured(tmp_path: Path) -> None:
    selection = select_gpu(config("emulated", model="H100", power_limit_w=500.0), placement(), tmp_path)
    assert selection.emulated_gpu is not None
    assert selection.emulated_gpu.peek().limit_w == 500.0
    allowed = re.escape("perseus.emulation.power_limit_w: got 800; allowed: above 74.5 and at most 700 for an emulated")
    with pytest.raises(ConfigError, match=allowed):
        select_gpu(config("emulated", model="H100", power_limit_w=800.0), placement(), tmp_path)


def test_a_relative_output_folder_gives_a_spec_that_other_processes_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    selection = select_gpu(config("emulated"), placement(), Path("out"))
    assert selection.spec is not None
    assert Path(selection.spec.partition(":")[2]).is_absolute()


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_an_emulation_nobody_asked_for_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int, lines: int
) -> None:
    caplog.set_level(logging.INFO, "perseus_plugin")
    select_gpu(config("auto"), placement(rank), tmp_path)
    assert caplog.text.count("no NVIDIA GPU here: an emulated A100 stands in for it") == lines
    caplog.clear()
    select_gpu(config("emulated"), placement(rank), tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize(("device", "name"), [("cpu", "CPU"), ("cuda:1", "GPU")])
def test_off_touches_nothing(tmp_path: Path, device: str, name: str) -> None:
    where = placement().model_copy(update={"device": device})
    assert select_gpu(config("off"), where, tmp_path) == Selection("off", None, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("backend", "spec"),
    [("auto", "auto:/s.sock:GPU-1111"), ("nvml", "nvml:GPU-1111"), ("zeusd", "zeusd:/s.sock::GPU-1111")],
)
def test_a_real_gpu_is_named_by_its_uuid(tmp_path: Path, backend: str, spec: str) -> None:
    where = placement().model_copy(update={"device": "cuda:1"})
    selection = select_gpu(config(backend, "/s.sock"), where, tmp_path)
    assert (selection.backend, selection.spec, selection.name) == (backend, spec, "NVIDIA H100")
    assert not selection.emulated


@pytest.mark.parametrize("backend", ["nvml", "zeusd"])
def test_a_real_backend_without_a_gpu_is_an_error(tmp_path: Path, backend: str) -> None:
    with pytest.raises(ConfigError, match=rf'^perseus\.gpu\.backend: got "{backend}"; allowed: "auto", "emulated" or'):
        select_gpu(config(backend), placement(), tmp_path)


@pytest.mark.parametrize(
    ("backend", "spec"),
    [("emulated", "emulated:{path}"), ("nvml", "nvml:{uuid}"), ("zeusd", "zeusd:/s.sock::{uuid}")],
)
def test_emulated_gpus_made_elsewhere_are_taken_by_local_rank(tmp_path: Path, backend: str, spec: str) -> None:
    gpus = [EmulatedGpu.create(tmp_path / f"gpu{i}", tick_period_s=0.05) for i in range(2)]
    paths = [str(gpu.state.path) for gpu in gpus]
    selection = select_gpu(config(backend, "/s.sock", gpus=paths), placement(1), tmp_path)
    assert selection.spec == spec.format(path=paths[1], uuid=gpus[1].uuid)
    assert selection.emulated
    assert selection.backend == backend
    assert selection.poll_interval_s <= 0.05 / 3
    with pytest.raises(ConfigError, match=r"perseus\.emulation\.gpus: got 1 paths; allowed: one per local rank"):
        select_gpu(config(backend, gpus=paths[:1]), placement(1), tmp_path)
    with pytest.raises(GpuError):
        select_gpu(config(backend, gpus=[str(tmp_path / "missing")]), placement(0), tmp_path)


def test_facts_of_a_gpu_that_can_be_locked_complete_the_selection() -> None:
    chosen = with_facts(Selection("auto", "auto:/s.sock:GPU-1", "?", poll_interval_s=0.25), FACTS)
    assert chosen == Selection("zeusd", "auto:/s.sock:GPU-1", "NVIDIA A100", (1410, 210), 0.25, power_limit_w=400.0)
    assert chosen.why_not == ""


def test_a_gpu_that_cannot_be_locked_is_observed_with_the_reason() -> None:
    selection = Selection("nvml", "nvml:GPU-1", "?")
    refused = with_facts(selection, DeviceFacts("A100", "GPU-1", False, (1410,), False, "needs root", "", 1))
    assert (refused.spec, refused.clocks_mhz, refused.why_not, refused.name) == (None, (), "needs root", "A100")
    silent = with_facts(selection, None)
    assert (silent.spec, silent.clocks_mhz) == (None, ())
    assert "did not answer" in silent.why_not
    assert with_facts(selection, None, "no driver").why_not == "no driver"


@pytest.mark.usefixtures("cuda")
def test_an_amd_gpu_is_observed_and_named_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "AMD Instinct MI300X")
    where = placement().model_copy(update={"device": "cuda:1"})
    selection = select_gpu(config("auto"), where, tmp_path)
    assert (selection.spec, selection.clocks_mhz, selection.name) == (None, (), "AMD Instinct MI300X")
    assert selection.why_not == (
        "AMD Instinct MI300X is an AMD GPU (ROCm 6.4.1), and only clocks of NVIDIA GPUs can be set; nothing needs to "
        "be done"
    )


@pytest.mark.parametrize("device", ["xpu:0", "npu:3", "mps", "hpu"])
def test_other_accelerators_are_observed(tmp_path: Path, device: str) -> None:
    selection = select_gpu(config("auto"), placement().model_copy(update={"device": device}), tmp_path)
    assert selection.spec is None
    assert selection.why_not == f"only clocks of NVIDIA GPUs can be set, and {device} is none; nothing needs to be done"


def test_pynvml_is_imported_only_where_nvidia_gpus_are(tmp_path: Path) -> None:
    """Observing, emulating and planning work where the package nvidia-ml-py is not installed."""
    code = f"""
import sys
sys.modules["pynvml"] = None  # what importing it then meets is an ImportError
import perseus_plugin, perseus_plugin.session.start, perseus_plugin.integrations.loading
import perseus_plugin.cli.main, perseus_plugin.control.helper.process
from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.session.start import start_session
for backend in ("off", "emulated"):
    place = Placement(rank=0, world_size=1, stage=0, stages=2, replica=0, local_rank=0, device="cpu")
    session = start_session(parse_config({{"output_dir": {str(tmp_path)!r}, "gpu": {{"backend": backend}}}}), place)
    print(backend, session.controller is not None)
    session.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n") == ["off False", "emulated True", ""], done.stderr
