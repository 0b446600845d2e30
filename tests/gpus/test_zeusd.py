"""The zeusd backend against a small server that speaks its protocol, with the simulated NVML behind it."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import GpuLostError, GpuPermissionError
from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import NO_PERMISSION
from perseus_plugin.gpus.opening import open_gpu
from perseus_plugin.gpus.zeusd import Zeusd, ZeusdGpu

from .test_nvml import UUID, driver, simulated

__all__ = ["driver", "simulated"]


class FakeZeusd(socketserver.ThreadingUnixStreamServer):
    """Sets clocks on emulated GPUs.

    Attributes:
        token: the bearer token it asks for, empty for none.
        with_addresses: whether `/discover` tells PCI addresses.
        hang_up: close every connection after one answer.
    """

    daemon_threads = True

    def __init__(self, path: Path, gpus: list[EmulatedGpu]) -> None:
        super().__init__(str(path), Handler)
        self.gpus = gpus
        self.token = ""
        self.with_addresses = True
        self.hang_up = False
        self.connections = 0


class Handler(BaseHTTPRequestHandler):
    server: FakeZeusd
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        gpus = []
        for index, gpu in enumerate(self.server.gpus):
            address = {"pci_address": f"0000:{index + 1:02x}:00.0"} if self.server.with_addresses else {}
            gpus.append({"id": index, "name": gpu.name, **address})
        self.answer(200, json.dumps({"gpus": gpus}))

    def do_POST(self) -> None:
        target = urlsplit(self.path)
        query = parse_qs(target.query)
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, "missing token")
        assert query["block"] == ["true"]
        index = int(query["gpu_ids"][0])
        try:
            if target.path == "/gpu/set_gpu_locked_clocks":
                assert query["min_clock_mhz"] == query["max_clock_mhz"]
                self.server.gpus[index].lock_clock(int(query["max_clock_mhz"][0]))
            elif target.path == "/gpu/reset_gpu_locked_clocks":
                self.server.gpus[index].reset_clock()
            else:
                return self.answer(404, "no such path")
        except GpuPermissionError as error:
            return self.answer(403, json.dumps({"errors": {str(index): str(error)}}))
        except GpuError as error:
            return self.answer(400, json.dumps({"errors": {str(index): str(error)}}))
        return self.answer(200, "")

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
        self.close_connection = self.server.hang_up

    def log_message(self, format: str, *args: object) -> None:
        pass


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
    with pytest.raises(GpuError, match="none of its 2 GPUs is at PCI address 0000:02:00.0"):
        ZeusdGpu(socket_path, None, UUID)
    with pytest.raises(GpuPermissionError, match="404 no such path"):
        Zeusd(socket_path).post("/gpu/unknown", gpu_ids=1, block="true")
