"""One job that tests look at from all sides: its output, its GPUs, its report's page."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launching import JOB_TIMEOUT_S, Probe
from tests.e2e.simulation import Simulation
from tests.ports import free_port
from tests.waiting import came_true

STAGES, MICROBATCHES = 4, 4
FORWARD_S = [0.008, 0.010, 0.012, 0.014]

# Of all tests that look at it: it runs once where they run in one process.
look_at_the_observed_job = pytest.mark.xdist_group("observed job")


@dataclass(frozen=True)
class Observed:
    """A job that has ended well.

    Attributes:
        probe: how it ran; its output folder is `out` in its folder.
        machine: what it ran on.
        monitor: the folder of DeepSpeed's CSV files.
        scraped: Prometheus's figures while it trained, when there was a plan.
        scraped_after: and when it had ended.
    """

    probe: Probe
    machine: Simulation
    monitor: Path
    scraped: str
    scraped_after: str

    @property
    def out(self) -> Path:
        """Its output folder."""
        return self.probe.folder / "out"


def observe(library: Path, folder: Path) -> Observed:
    """Run it: four stages on a simulated NVML, with all that is written and served switched on."""
    machine, port, seen = Simulation(library, folder, STAGES), free_port(), folder / "scraped"
    # What is recorded under the plan is kept every so often.
    do = [("nothing", "plan 1 for"), ("nothing", "frontier: "), ("nothing", str(seen)), ("end", "+16")]
    # Nobody catches up, so that the clocks are the plan's however busy this machine is.
    emulation = {"forward_time_s": FORWARD_S, "backward_time_s": [2 * time_s for time_s in FORWARD_S]}
    switched_on: dict[str, Any] = {"frontier": True, "prometheus": {"port": port}, "catch_up": False}
    probe = machine.job(folder, *do, steps=100_000, emulation=emulation, **switched_on)
    monitor = {"enabled": True, "output_path": str(folder / "monitor"), "job_name": "job"}
    probe = replace(probe, config={"gradient_accumulation_steps": MICROBATCHES, "csv_monitor": monitor})
    scraped = ""

    def predicted() -> bool:
        nonlocal scraped
        scraped = _scraped(port) or scraped
        return 'perseus_energy_joules{figure="predicted"}' in scraped or job.poll() is not None

    with probe.started(**machine.environment) as job:
        came_true(predicted, JOB_TIMEOUT_S, 0.1)
        seen.touch()
        job.wait().check()
    return Observed(probe, machine, folder / "monitor" / "job", scraped, _scraped(port))


def _scraped(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, OSError):
        return ""
