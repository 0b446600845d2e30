"""A small server that speaks zeusd's protocol and sets clocks on emulated GPUs."""

from __future__ import annotations

import json
import socketserver
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from perseus_plugin.errors import GpuError
from perseus_plugin.gpus.base import GpuPermissionError
from perseus_plugin.gpus.emulated.device import EmulatedGpu


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

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


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
