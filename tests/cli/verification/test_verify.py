"""`perseus verify` as a person runs it: on the emulated GPU, and on a simulated driver with a stand-in for CUDA."""

from __future__ import annotations

import ctypes
import queue
import re
from pathlib import Path
from uuid import uuid4

import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks.verified_gpus import table
from perseus_plugin.cli import verify as verify_module
from perseus_plugin.cli.verification import measuring, peers, running
from perseus_plugin.cli.verify import verify
from perseus_plugin.control.ownership import LOCK_DIR_VARIABLE
from perseus_plugin.errors import ConfigError, GpuError, ReportError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import NO_COUNTER, NO_PERMISSION
from perseus_plugin.reporting.verification import Verification, load_verification
from tests.cli.verification import fake_cuda
from tests.nvml_simulator.building import environment

ROOT = Path(__file__).parents[3]
KEPT = sorted((ROOT / "docs" / "evidence").glob("*.json"))


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, ["--minutes", "0.03", *arguments])


@pytest.fixture(autouse=True)
def _short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(verify_module, "TIMES_S", {"forward": 0.005, "backward": 0.010})
    monkeypatch.setattr(verify_module, "_ROUNDS", 1)
    monkeypatch.setattr(measuring, "_ROUNDS", 1)
    monkeypatch.setattr(measuring, "_POWER_S", 0.1)
    monkeypatch.setattr(running, "_CHANGES", 6)


@pytest.fixture
def real(tmp_path: Path, simulated_nvml: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """A GPU behind the simulated driver, which torch sees, too."""
    # Who holds a GPU is looked for on the whole machine, where the same test may run beside this.
    uuid = f"GPU-{uuid4()}"
    gpu = EmulatedGpu.create(tmp_path / "gpu", uuid=uuid)
    ctypes.CDLL(str(simulated_nvml))
    for name, value in environment(simulated_nvml, [gpu.state.path]).items():
        monkeypatch.setenv(name, value)
    fake_cuda.install(monkeypatch, uuid.removeprefix("GPU-"))

    def refuse(backend: str, devices: tuple[str, str], seconds: float) -> tuple[float, float]:
        raise GpuError(f"{backend}: Duplicate GPU detected: {' and '.join(devices)}")

    monkeypatch.setattr(peers, "wait_for_a_peer", refuse)
    return gpu


def test_without_a_gpu_it_runs_on_an_emulated_one_and_says_so(tmp_path: Path) -> None:
    result = run("--emulated", "--set-clocks", "-o", str(tmp_path / "verify.json"))
    assert result.exception is None, result.output
    assert "Emulated GPU: every figure below is a model's" in result.output
    found = load_verification(tmp_path / "verify.json")
    assert found.machine.emulated
    assert found.machine.gpu == "emulated A100-SXM4-80GB"
    assert found.counter is not None
    assert found.counter.period_ms == pytest.approx(20, abs=1)
    assert found.estimator is not None
    assert [one.kind for one in found.estimator.kinds] == ["forward", "backward"]
    # How far above: in test_arithmetic.py. Here the emulated GPU waits wherever a busy machine lets its work wait.
    waiting_w = found.estimator.steady_waiting_w
    assert waiting_w is not None
    assert all(one.steady_w is not None and one.steady_w > waiting_w for one in found.estimator.kinds)
    assert found.graphs is None
    assert "graphs were not tried" in found.missing["replays of a CUDA graph"]
    assert len(found.switches) == 12
    assert all(one.latency_ms is not None and one.latency_ms.median >= 5 for one in found.switches)
    by_clock = {one.clock_mhz: one.power_w for one in found.waiting_at}
    assert len(by_clock) == 6
    assert by_clock[max(by_clock)] is not None
    page = (tmp_path / "verify.html").read_text()
    assert "Emulated GPU: every figure below is a model" in page
    for title in ("Cost of the hooks", "Energy counter", "Clock changes", "Waiting by clock", "Not measured"):
        assert f"<h2>{title}</h2>" in page
    assert not re.search(r"(src|href)=[\"']http", page), "nothing is fetched"
    assert "(a model, no GPU)" not in table([tmp_path / "verify.json"])
    assert "| GPU | emulated A100-SXM4-80GB |" in table([tmp_path / "verify.json"])


def test_a_real_gpu_is_only_read(real: EmulatedGpu, tmp_path: Path) -> None:
    real.lock_clock(1200)
    result = run("-o", str(tmp_path / "verify.json"))
    assert result.exception is None, result.output
    assert [event.mhz for event in real.events()] == [1200], "somebody else's lock stays, and nothing is reset"
    found = load_verification(tmp_path / "verify.json")
    assert not found.set_clocks
    assert set(found.calls_us) == {"energy counter", "SM clock", "instantaneous power"}
    assert found.boundaries is not None
    assert found.boundaries.drift_ppm is not None
    assert found.hooks is not None
    assert found.graphs is not None, found.missing
    assert found.graphs.marks == 12
    assert found.graphs.replay_ms.median > 12 * 5
    assert found.at_the_limit is not None
    assert {one.how for one in found.waiting} == {"no work", "one spinning thread", "2 spinning kernels"}
    assert "there is one GPU" in found.missing["receive of nccl, peer late"]
    assert "there is one GPU" not in found.missing["receive of gloo, peer late"]
    assert "--set-clocks" in found.missing["clock changes, waiting by clock"]
    assert not found.switches


def test_clocks_that_were_set_are_free_at_the_end(real: EmulatedGpu, tmp_path: Path) -> None:
    result = run("--set-clocks", "-o", str(tmp_path / "verify.json"))
    assert result.exception is None, result.output
    assert len(load_verification(tmp_path / "verify.json").switches) == 12, result.output
    assert {1410, 705} < {event.mhz for event in real.events()}
    assert real.locked_mhz() is None


def test_what_cannot_be_measured_is_named_and_the_rest_is_there(
    real: EmulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(subject: measuring.Subject, seconds: float) -> None:
        raise queue.Empty

    monkeypatch.setattr(measuring, "measure_hooks", fail)
    real.set_faults(NO_COUNTER | NO_PERMISSION)
    result = run("--set-clocks", "-o", str(tmp_path / "verify.json"))
    assert result.exception is None, result.output
    found = load_verification(tmp_path / "verify.json")
    for missing, why in (
        ("energy of instructions", "the energy counter"),
        ("clock changes, waiting by clock", "CAP_SYS_ADMIN"),
        ("cost of the hooks", "Empty"),
    ):
        assert why in found.missing[missing]
        assert f"not measured: {missing}: " in result.output
    assert found.boundaries is not None
    assert found.estimator is None
    assert not found.switches


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--minutes", "0"], "--minutes: got 0"),
        (["-o", "verify.txt"], "ends in .json"),
        (["-o", "no/such/folder/verify.json"], "a folder that is there"),
        (["--emulated", "--gpu", "GPU-1"], "allowed: one of them"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], text: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, ConfigError)
    assert text in str(error)
    assert "\n" not in str(error)


def test_a_gpu_that_torch_does_not_see_is_one_line(real: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    error = run().exception
    assert isinstance(error, GpuError)
    assert "needs torch with CUDA" in str(error)
    assert "sees 0 GPUs" in str(error)


def test_a_gpu_without_memory_is_one_line(real: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 256.00 MiB.\nand more")

    monkeypatch.setattr("torch.cuda.synchronize", out_of_memory)
    error = run().exception
    assert isinstance(error, GpuError)
    assert str(error).endswith("CUDA out of memory. Tried to allocate 256.00 MiB.")


def test_a_process_waits_for_a_late_peer() -> None:
    begin_s, end_s = peers.wait_for_a_peer("gloo", ("cpu", "cpu"), 0.5)
    assert end_s - begin_s >= 0.4


def test_of_all_that_peers_write_the_reason_is_told() -> None:
    nccl = "W1126 warming up\n\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 60\n  at exit\n"
    assert peers.reason(nccl).startswith("Duplicate GPU detected")
    assert peers.reason("Traceback:\n  line\nValueError: no such backend\nbye\n") == "ValueError: no such backend"
    assert peers.reason("") == "the processes did not get together in time"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text('{"schema": "perseus-plan", "version": 1}')
    with pytest.raises(ReportError, match="schema"):
        load_verification(tmp_path / "verify.json")


def test_the_page_of_evidence_has_the_table_of_the_files_beside_it() -> None:
    assert KEPT
    assert all(isinstance(load_verification(file), Verification) for file in KEPT)
    assert table(KEPT) in (ROOT / "docs" / "evidence.md").read_text()
