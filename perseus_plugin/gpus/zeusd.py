"""A GPU whose clock the zeusd daemon sets for us: for jobs without privilege.

The daemon (of the Zeus project) runs as root and takes HTTP requests on a unix socket. It keeps no lease: if
its client dies the clock stays locked, so the helper's reset is needed here as much as with NVML. Readings
need no privilege and come from NVML directly.
"""

from __future__ import annotations

import http.client
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from perseus_plugin.errors import GpuError
from perseus_plugin.files import parse_json
from perseus_plugin.gpus.base import EnergyReading, FoundGpu, GpuBackend, GpuLostError, GpuPermissionError
from perseus_plugin.gpus.nvml import NvmlGpu, cuda_gpu

TIMEOUT_S = 5.0
"""Less than after which a helper that waits for the daemon counts as silent itself."""
_MOST_BYTES = 2**20  # of an answer
TOKEN_VARIABLE = "ZEUSD_TOKEN"


class ZeusdGpu:
    """One NVIDIA GPU, clocks through zeusd. Implements `perseus_plugin.gpus.base.Gpu`.

    Args:
        socket_path: the daemon's unix socket.
        index: the GPU's number on the host, as zeusd counts; None: found by its PCI address.
        uuid: as for `NvmlGpu`.

    Raises:
        GpuError: no daemon there, or the GPU cannot be found.
    """

    emulated = False

    def __init__(self, socket_path: str, index: int | None, uuid: str) -> None:
        self._readings = NvmlGpu(uuid)
        self.name, self.uuid, self.driver = self._readings.name, self._readings.uuid, self._readings.driver
        self._daemon = Zeusd(socket_path)
        try:
            self._index = self._find() if index is None else index
        except BaseException:
            self.close()
            raise

    def supported_clocks_mhz(self) -> tuple[int, ...]:
        """SM clocks that can be locked, falling."""
        return self._readings.supported_clocks_mhz()

    def lock_clock(self, frequency_mhz: int) -> None:
        """Ask the daemon for a clock; it answers when the driver has taken the request."""
        clocks = {"min_clock_mhz": frequency_mhz, "max_clock_mhz": frequency_mhz}
        self._daemon.post("/gpu/set_gpu_locked_clocks", gpu_ids=self._index, **clocks, block="true")

    def reset_clock(self) -> None:
        """Have the daemon give up the lock."""
        self._daemon.post("/gpu/reset_gpu_locked_clocks", gpu_ids=self._index, block="true")

    def read_clock_mhz(self) -> int:
        """The SM clock now."""
        return self._readings.read_clock_mhz()

    def read_energy(self) -> EnergyReading:
        """The energy counter."""
        return self._readings.read_energy()

    def lock_mhz(self) -> int | None:
        """zeusd does not tell."""
        return None

    def power_limit_w(self) -> float:
        """The highest power limit that can be set."""
        return self._readings.power_limit_w()

    def enforced_limit_w(self) -> float:
        """The power limit in force."""
        return self._readings.enforced_limit_w()

    def mig_enabled(self) -> bool:
        """Whether the GPU is partitioned."""
        return self._readings.mig_enabled()

    def close(self) -> None:
        """Hang up; does not reset the clock."""
        self._daemon.close()
        self._readings.close()

    def _find(self) -> int:
        gpus = self._daemon.gpus()
        address = self._readings.pci_address()
        for index, its_address in gpus:
            if its_address.lower() == address:
                return index
        raise GpuError(
            f"zeusd at {self._daemon.socket_path}: none of its {len(gpus)} GPUs is at PCI address {address}; "
            "a zeusd that tells PCI addresses (0.5 or later) on this host is needed"
        )


class ZeusdBackend(GpuBackend):
    """NVIDIA GPUs, whose clocks the daemon sets. NVML lists them."""

    maker = "NVIDIA"
    form = "SOCKET:[INDEX]:UUID"

    def open(self, rest: str) -> ZeusdGpu:
        """By UUID, on the daemon's socket, with its number of the GPU if that is known."""
        socket_path, index, uuid = rest.rsplit(":", 2)
        if not (socket_path and uuid and (index.isdigit() or not index)):
            raise ValueError(rest)
        return ZeusdGpu(socket_path, int(index) if index else None, uuid)

    def rest_of(self, uuid: str, socket: str) -> str:
        """Without its number: it is found by its PCI address."""
        return f"{socket}::{uuid}"

    def find(self, device: str) -> FoundGpu | None:
        """As NVML."""
        return cuda_gpu(device)

    def service(self, socket: str) -> str:
        """Whether a zeusd answers there."""
        if not Path(socket).exists():
            return f"no socket at {socket}"
        try:
            found = Zeusd(socket).discover()
        except GpuError as error:
            return str(error)
        groups = found.get("enabled_api_groups")
        names = ", ".join(map(str, groups)) if isinstance(groups, list) else ""
        return f"answers at {socket}" + (f", API groups {_line(names)}" if names else "")


class Zeusd:
    """Requests to the daemon over one kept connection, made again when it was lost.

    Args:
        socket_path: its unix socket.
    """

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._connection: _UnixConnection | None = None

    def discover(self) -> dict[str, Any]:
        """What the daemon offers.

        Raises:
            GpuError: no daemon there, or no zeusd.
        """
        answer = self._request("GET", "/discover")
        with suppress(ValueError):
            if isinstance(found := parse_json(answer), dict):
                return found
        raise self._not_understood(answer)

    def gpus(self) -> list[tuple[int, str]]:
        """Number and PCI address, empty if it does not tell, of each GPU that the daemon offers.

        Raises:
            GpuError: no daemon there, or no zeusd.
        """
        found = self.discover().get("gpus", [])
        try:
            told = [(gpu["id"], str(gpu.get("pci_address", ""))) for gpu in found]
        except (TypeError, KeyError, AttributeError):
            told = [(None, "")]
        if all(type(index) is int and index >= 0 for index, _ in told):
            return told
        raise self._not_understood(repr(found).encode())

    def post(self, path: str, **parameters: str | int) -> None:
        """A request that changes something.

        Raises:
            GpuPermissionError: the daemon may not, or does not let us.
            GpuLostError: the daemon does not answer.
            GpuError: the request failed.
        """
        self._request("POST", f"{path}?{urlencode(parameters)}")

    def _not_understood(self, answer: bytes) -> GpuError:
        return GpuError(f"zeusd at {self.socket_path}: /discover answered {answer[:80]!r}; is that a zeusd?")

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(self, method: str, target: str) -> bytes:
        for attempt in (1, 2):
            fresh = self._connection is None
            try:
                connection = self._connection = self._connection or _UnixConnection(self.socket_path)
                connection.request(method, target, headers=_headers())
                response = connection.getresponse()
                body = response.read(_MOST_BYTES + 1)
                if len(body) > _MOST_BYTES:
                    raise OSError(f"its answer has more than {_MOST_BYTES} bytes")
                break
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A daemon may close a connection that was idle; setting a clock twice does no harm.
                if fresh or attempt == 2 or isinstance(error, TimeoutError):
                    raise GpuLostError(f"zeusd at {self.socket_path} does not answer: {error}") from error
        if response.status == 200:
            return body
        reason = f"zeusd at {self.socket_path}: {method} {target.partition('?')[0]}: {response.status} {_reason(body)}"
        if response.status in (401, 403, 404):
            remedy = "; the daemon needs root, the API group gpu-control, and with authentication ZEUSD_TOKEN"
            raise GpuPermissionError(reason + remedy)
        raise GpuError(reason)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _headers() -> dict[str, str]:
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not (token.isascii() and token.isprintable()):
        raise GpuPermissionError(f"{TOKEN_VARIABLE}: it has letters that no token has; allowed: printable ASCII")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _reason(body: bytes) -> str:
    """The message in an answer: per GPU as JSON, or plain text."""
    try:
        errors = parse_json(body)["errors"]
        return _line("; ".join(f"GPU {index}: {message}" for index, message in errors.items()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _line(body.decode(errors="replace"))


def _line(text: str) -> str:
    """What a daemon says, in one line that does nothing to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:200]).strip()
