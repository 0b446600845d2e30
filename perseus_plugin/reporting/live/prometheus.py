"""The metrics that go to the framework's monitor, for Prometheus: scraped over HTTP, or from a textfile-collector file.

Off unless the configuration asks for it; needs `prometheus_client` (the extra `prometheus`). Nothing here raises or
waits: what cannot be published is said once, and training goes on.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from perseus_plugin.config import PrometheusConfig
from perseus_plugin.errors import lacking
from perseus_plugin.exchange.serving import BoundedHttp
from perseus_plugin.files import remove, write_atomically

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Gauge

logger = logging.getLogger(__name__)

FIGURES = ("full_clock", "predicted", "measured", "measured_low", "measured_high", "recent", "in_force", "aimed_at")
"""Last parts of event names that become the label `figure`."""
WISHES = "perseus_target_in_force"
"""The metric whose events' last part becomes the label `wish`."""

_UNITS = {"_s": "_seconds", "_j": "_joules", "_w": "_watts"}
Event = tuple[str, float]


def metric_of(event_name: str) -> tuple[str, dict[str, str]]:
    """Metric of an event such as `Perseus/energy_j/measured`, and its label, if any, with its value."""
    *parts, last = event_name.lower().split("/")
    labels = {"figure": last} if last in FIGURES else {"wish": last} if "_".join(parts) == WISHES else {}
    name = "_".join(parts if labels else [*parts, last])
    for short, long in _UNITS.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    return name, labels


class PrometheusPublisher:
    """Publishes rank 0's events until it is closed; may be called from any thread.

    Args:
        config: the `prometheus` block; without a port and a textfile nothing is done.
        facts: labels of `perseus_job_info` (GPU, backend, whether it is emulated).
    """

    def __init__(self, config: PrometheusConfig, facts: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._textfile = None if config.textfile is None else Path(config.textfile)
        self._address = (config.address, config.port)
        self._server: Any = None
        self._gauges: dict[str, Gauge] = {}
        self._registry: CollectorRegistry | None = None
        if config.port is None and self._textfile is None:
            return
        try:
            self._open(facts)
        except ImportError as error:
            self._off(lacking(error))
        except Exception as error:
            self._off(f"{error}")

    def __call__(self, events: Sequence[Event]) -> None:
        """Publish the newest values."""
        with self._lock:
            if self._registry is None:
                return
            try:
                self._publish(events)
            except Exception as error:
                self._off(f"{error}")

    def close(self) -> None:
        """Free the port and remove the file: figures of a job that has ended are in its summary."""
        with self._lock:
            self._registry = None
            self._close_server()
            if self._textfile is not None:
                with suppress(OSError):
                    remove(self._textfile)

    def _open(self, facts: Mapping[str, Any]) -> None:
        from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

        registry = CollectorRegistry()
        labels = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in facts.items()}
        info = Gauge("perseus_job_info", "What the job runs on; always 1", list(labels), registry=registry)
        info.labels(**labels).set(1)
        address, port = self._address
        if port is not None:
            try:
                self._server = _served(address, port, make_wsgi_app(registry))
            except OSError as error:
                trouble = _port_trouble(address, port, error)
                if self._textfile is None:
                    raise OSError(trouble) from error
                logger.warning("prometheus: %s; the textfile is written all the same", trouble)
        self._registry = registry

    def _publish(self, events: Sequence[Event]) -> None:
        from prometheus_client import generate_latest

        assert self._registry is not None  # checked by the caller
        for name, value in [*events, ("Perseus/last_update_timestamp_s", time.time())]:
            metric, labels = metric_of(name)
            gauge = self._gauge(metric, list(labels))
            (gauge.labels(**labels) if labels else gauge).set(value)
        if self._textfile is not None:
            write_atomically(self._textfile, generate_latest(self._registry).decode())

    def _gauge(self, metric: str, labels: list[str]) -> Gauge:
        from prometheus_client import Gauge

        if metric not in self._gauges:
            text = f"{metric.removeprefix('perseus_').replace('_', ' ')}; see docs/metrics.md"
            self._gauges[metric] = Gauge(metric, text, labels, registry=self._registry)
        return self._gauges[metric]

    def _off(self, why: str) -> None:
        self._registry = None
        self._close_server()
        logger.warning("prometheus: nothing is published from here on: %s; training goes on", why)

    def _close_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()


class _Server(BoundedHttp, WSGIServer):
    def __init__(self, address: str, port: int) -> None:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, where = found[0]
        super().__init__(where[:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """With what WSGI wants to know of the address."""
        super().server_bind()
        self.setup_environ()

    def lost(self, why: str) -> None:
        """Said once."""
        logger.warning("prometheus: nobody can scrape any more: %s; training goes on", why)


class _Handler(WSGIRequestHandler):
    timeout = 5.0  # between what a caller says and the next

    def log_message(self, *_: Any) -> None:
        """A scrape is no news."""


def _served(address: str, port: int, app: Any) -> _Server:
    server = _Server(address, port)
    server.set_app(app)
    server.start("perseus-prometheus")
    return server


def _port_trouble(address: str, port: int, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot listen on {address}:{port}: {reason}; choose another perseus.prometheus.port, or use textfile"
