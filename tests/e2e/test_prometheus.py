"""A real job is scraped while it trains; the port is gone when it has ended."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .launching import BASE_CONFIG, SMALL, TRAIN, perseus_block, started_job

pytestmark = pytest.mark.e2e
pytest.importorskip("prometheus_client")


def scraped(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def test_a_job_is_scraped_while_it_trains(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    block = perseus_block(tmp_path / "out", 2, prometheus={"port": port})
    seen = ""
    with started_job(
        TRAIN, 2, {**BASE_CONFIG, "perseus": block}, tmp_path, *SMALL, "--stages", "2", "--steps", "80"
    ) as job:
        while job.poll() is None and 'perseus_energy_joules{figure="predicted"}' not in seen:
            seen = scraped(port) or seen
            time.sleep(0.1)
        output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    assert 'perseus_energy_joules{figure="predicted"}' in seen, output
    assert 'perseus_job_info{backend="emulated",emulated="true"' in seen
    assert scraped(port) == ""
