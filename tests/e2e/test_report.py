"""A job that is looked at while it runs, by Prometheus and `perseus report`, and after it was killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from perseus_plugin.reporting.report.findings import Options, find
from perseus_plugin.reporting.report.folder import load_folder
from tests.e2e.launching import Probe, perseus_block
from tests.waiting import came_true

pytestmark = pytest.mark.e2e


def report(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "perseus_plugin.cli.main", "report", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept_whole(folder: Path) -> bool:
    return (folder / "plan.json").exists() and bool(load_folder(folder).pipeline(("plan",)))


def has_figures(folder: Path) -> bool:
    summary = load_folder(folder).summary
    return summary is not None and None not in (summary.energy_j.full_clock, summary.energy_j.predicted)


def scraped(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, OSError):
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_job_is_reported_on_while_it_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    probe = Probe(tmp_path, perseus_block(out, 2), arguments=("--steps", "100000"))
    with probe.started() as job:
        assert came_true(lambda: kept_whole(out), timeout_s=180, interval_s=0.5)
        said = report(out, "--no-html")
        assert "plan 1" in said
        assert "report.html" not in {path.name for path in out.iterdir()}
        assert came_true(lambda: has_figures(out), timeout_s=120, interval_s=0.5)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    said = report(out)
    assert (out / "report.html").exists()
    assert re.search(r"energy saved, (as run|predicted): -?[\d.]+ % \([\d,]+ J → [\d,]+ J per iteration", said), said
    assert re.search(r"used in [\d,]+ iterations: \S+ k?(J|Wh) \(-?\S+ k?(J|Wh) saved under plans\)", said), said
    found = find(load_folder(out, now_s=time.time() + 3600), Options(frontier=False))
    assert any("it has probably died" in text for text in found.folder.missing)
    assert found.series is not None
    assert found.so_far is not None
    assert found.so_far.saved_j is not None
    assert found.so_far.left_out == 0
    assert {"warm-up", "profiling", "plan"} <= {stretch.sort.state for stretch in found.series.stretches}
    assert found.lanes[-1].title.startswith("Plan, as iteration")


def test_a_job_is_scraped_while_it_trains(tmp_path: Path) -> None:
    """The port is gone when the job has ended."""
    pytest.importorskip("prometheus_client")
    port, seen = free_port(), ""
    block = perseus_block(tmp_path / "out", 2, prometheus={"port": port})
    probe = Probe(tmp_path, block, [("end", str(tmp_path / "scraped"))], ("--steps", "100000"))

    def predicted() -> bool:
        nonlocal seen
        seen = scraped(port) or seen
        return 'perseus_energy_joules{figure="predicted"}' in seen

    with probe.started() as job:
        assert came_true(predicted, timeout_s=180, interval_s=0.1), seen
        (tmp_path / "scraped").touch()
        job.wait().check()
    assert 'perseus_job_info{backend="emulated",emulated="true"' in seen
    assert scraped(port) == ""
