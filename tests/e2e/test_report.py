"""A job that is looked at while it runs, by Prometheus and `perseus report`, and what is left when it is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.reporting.report.findings import Options, find
from perseus_plugin.reporting.report.folder import load_folder
from tests.again import hold
from tests.e2e.launching import ENDED_S, JOB_TIMEOUT_S, Probe, perseus_block
from tests.e2e.observed import Observed, look_at_the_observed_job
from tests.waiting import came_true, processes_naming

pytestmark = pytest.mark.e2e


def report(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "perseus_plugin.cli.main", "report", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept_whole(folder: Path) -> bool:
    return (folder / "plan.json").exists() and bool(load_folder(folder).pipeline(("plan",)))


def has_figures(folder: Path) -> bool:
    summary = load_folder(folder).summary
    return summary is not None and None not in (summary.energy_j.full_clock, summary.energy_j.predicted)


def locked(folder: Path) -> list[int | None]:
    """The clock that every GPU is locked at."""
    return [EmulatedGpu(folder / "emulated_gpus" / f"rank{rank}").locked_mhz() for rank in range(2)]


def test_a_job_is_reported_on_while_it_runs_and_after_sigkill_which_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    probe = Probe(tmp_path, perseus_block(out, 2), arguments=("--steps", "100000"))
    with probe.started() as job:
        assert came_true(lambda: kept_whole(out), JOB_TIMEOUT_S, interval_s=0.5)
        said = report(out, "--no-html")
        assert "plan 1" in said
        assert "report.html" not in {path.name for path in out.iterdir()}
        assert came_true(lambda: has_figures(out), JOB_TIMEOUT_S, interval_s=0.5)
        assert came_true(lambda: all(mhz not in (None, 1410) for mhz in locked(out)), JOB_TIMEOUT_S, 0.002), (
            "no clock is lowered"
        )
        assert len(processes_naming(str(out))) == 2
        for pid in job.ranks():
            os.kill(pid, signal.SIGKILL)
        assert came_true(lambda: not processes_naming(str(out)), ENDED_S), "a helper lives on"
        hold(locked(out) == [None, None], "no clock stays locked")
        assert job.wait(30).status != 0
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


@look_at_the_observed_job
def test_a_job_is_scraped_while_it_trains(observed: Observed) -> None:
    """The port is gone when the job has ended."""
    assert 'perseus_energy_joules{figure="predicted"}' in observed.scraped
    assert 'perseus_job_info{backend="nvml",emulated="true"' in observed.scraped
    assert observed.scraped_after == ""
