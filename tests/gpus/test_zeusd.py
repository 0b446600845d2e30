"""The zeusd backend against a fake daemon, with readings from the simulated NVML."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseus_plugin.control.client import STUCK_AFTER_S
from perseus_plugin.control.helper.heartbeat import HEARTBEAT_S
from perseus_plugin.errors import GpuError
from perseus_plugin.gpus import zeusd
from perseus_plugin.gpus.base import GpuLostError, GpuPermissionError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import NO_PERMISSION
from perseus_plugin.gpus.registry import open_gpu
from perseus_plugin.gpus.zeusd import Zeusd, ZeusdGpu

from .fake_zeusd import FakeZeusd, Handler
from .test_nvml import UUID, driver, simulated

__all__ = ["driver", "simulated"]


@pytest.fixture
def daemon(tmp_path: Path, simulated: list[EmulatedGpu]) -> Iterator[FakeZeusd]:
    with FakeZeusd(tmp_path / "zeusd.sock", simulated) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def socket_path(daemon: FakeZeusd) -> str:
    return str(daemon.server_address)


def test_clocks_go_through_the_daemon_and_readings_do_not(
    socket_path: str, driver: EmulatedGpu, daemon: FakeZeusd
) -> None:
    gpu = open_gpu(f"zeusd:{socket_path}::{UUID}")  # found by its PCI address
    assert isinstance(gpu, ZeusdGpu)
    assert (gpu.uuid, gpu.name, gpu.emulated) == (UUID, driver.name, False)
    assert gpu.supported_clocks_mhz() == driver.supported_clocks_mhz()
    gpu.lock_clock(1005)
    assert driver.locked_mhz() == 1005
    gpu.reset_clock()
    assert driver.locked_mhz() is None
    assert gpu.read_clock_mhz() in (1005, 1410)
    assert gpu.read_energy().energy_j >= 0
    assert daemon.connections == 1
    gpu.close()


def test_the_daemons_refusals_are_told_apart(socket_path: str, driver: EmulatedGpu) -> None:
    gpu = ZeusdGpu(socket_path, 1, UUID)
    driver.set_faults(NO_PERMISSION)
    with pytest.raises(GpuPermissionError, match=r"403 GPU 1: .*no permission.*the daemon needs root"):
        gpu.lock_clock(1005)
    driver.set_faults(0)
    with pytest.raises(GpuError, match=r"400 GPU 1: .*1000 MHz is not supported"):
        gpu.lock_clock(1000)
    gpu.close()


def test_a_token_is_sent_where_there_is_one(
    socket_path: str, driver: EmulatedGpu, daemon: FakeZeusd, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.token = "secret"
    gpu = ZeusdGpu(socket_path, 1, UUID)
    with pytest.raises(GpuPermissionError, match="401 missing token"):
        gpu.lock_clock(1005)
    monkeypatch.setenv("ZEUSD_TOKEN", "secret")
    gpu.lock_clock(1005)
    assert driver.locked_mhz() == 1005
    gpu.close()


@pytest.mark.parametrize("token", ["caf\udce9", "größe", "two\nlines"])
def test_a_token_that_is_none_is_said_and_not_sent(
    token: str, socket_path: str, driver: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEUSD_TOKEN", token)
    with pytest.raises(GpuPermissionError, match=r"ZEUSD_TOKEN: .*; allowed: printable ASCII"):
        ZeusdGpu(socket_path, 1, UUID).lock_clock(1005)
    assert driver.locked_mhz() is None


def test_a_connection_that_the_daemon_closed_is_made_again(
    socket_path: str, driver: EmulatedGpu, daemon: FakeZeusd
) -> None:
    daemon.hang_up = True
    gpu = ZeusdGpu(socket_path, 1, UUID)
    for mhz in (900, 1005, 1200):
        gpu.lock_clock(mhz)
    assert [e.mhz for e in driver.events()] == [900, 1005, 1200]
    gpu.close()


def test_no_daemon_is_told(tmp_path: Path, simulated: list[EmulatedGpu]) -> None:
    gpu = ZeusdGpu(str(tmp_path / "nobody.sock"), 1, UUID)
    with pytest.raises(GpuLostError, match=r"nobody\.sock does not answer"):
        gpu.lock_clock(900)
    gpu.close()


def test_a_daemon_that_tells_no_addresses_needs_the_index(socket_path: str, daemon: FakeZeusd) -> None:
    daemon.with_addresses = False
    with pytest.raises(GpuError, match=r"none of its 2 GPUs is at PCI address 0000:02:00\.0"):
        ZeusdGpu(socket_path, None, UUID)
    with pytest.raises(GpuPermissionError, match="404 no such path"):
        Zeusd(socket_path).post("/gpu/unknown", gpu_ids=1, block="true")


@pytest.mark.parametrize(
    "answer",
    [
        '{"gpus": [1]}',
        '{"gpus": 1}',
        '{"gpus": {"a": 1}}',
        '{"gpus": [{"pci_address": 3}]}',
        '{"gpus": [{"id": true}]}',
        '{"gpus": [{"id": -1}]}',
        '{"gpus": [{"id": 1e999}]}',
        '{"gpus": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"gpus": ' + "9" * 10_000 + "}",
        "[]",
        "\x1b[2J",
    ],
)
def test_an_answer_that_is_none_is_said_in_one_line(
    daemon: FakeZeusd, socket_path: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpus.fake_zeusd.Handler.do_GET", lambda handler: handler.answer(200, answer))
    with pytest.raises(GpuError, match=r"/discover answered .*; is that a zeusd\?") as caught:
        ZeusdGpu(socket_path, None, UUID)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_an_answer_without_end_is_not_kept(
    daemon: FakeZeusd, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpus.fake_zeusd.Handler.do_GET", lambda handler: handler.answer(200, " " * 2**21))
    with pytest.raises(GpuLostError, match="its answer has more than"):
        Zeusd(socket_path).discover()


def test_what_a_daemon_says_does_nothing_to_a_terminal(
    daemon: FakeZeusd, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = '{"errors": {"0": "\\u001b[2J\\nthe clock is free"}}'
    monkeypatch.setattr("tests.gpus.fake_zeusd.Handler.do_POST", lambda handler: handler.answer(500, said))
    with pytest.raises(GpuError) as caught:
        Zeusd(socket_path).post("/gpu/reset_gpu_locked_clocks")
    assert str(caught.value).isprintable()


def test_a_daemon_that_hangs_is_asked_once_and_given_up_before_the_helper_counts_as_silent(
    daemon: FakeZeusd, socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zeusd.TIMEOUT_S < STUCK_AFTER_S - HEARTBEAT_S
    monkeypatch.setattr(zeusd, "TIMEOUT_S", 0.2)
    client = Zeusd(socket_path)
    client.discover()
    asked: list[int] = []
    goes_on = threading.Event()

    def hang(handler: Handler) -> None:
        asked.append(1)
        goes_on.wait(20)
        handler.close_connection = True

    monkeypatch.setattr(Handler, "do_POST", hang)
    with pytest.raises(GpuLostError, match="timed out"):
        client.post("/gpu/reset_gpu_locked_clocks")
    assert asked == [1]
    goes_on.set()
