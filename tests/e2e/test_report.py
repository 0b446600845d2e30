"""A report on a real job: while it runs, and after it was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perseus_plugin.reporting.report.findings import Options, find
from perseus_plugin.reporting.report.folder import load_folder

from .launching import BASE_CONFIG, SMALL, TRAIN, perseus_block, started_job, wait_until

pytestmark = pytest.mark.e2e

STAGES = 2


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


def test_a_job_is_reported_on_while_it_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = {**BASE_CONFIG, "perseus": perseus_block(out, STAGES)}
    with started_job(TRAIN, STAGES, config, tmp_path, *SMALL, "--stages", str(STAGES), "--steps", "100000") as job:
        assert wait_until(lambda: kept_whole(out), timeout_s=180, interval_s=0.5)
        said = report(out, "--no-html")
        assert "plan 1" in said
        assert "report.html" not in {path.name for path in out.iterdir()}
        assert wait_until(lambda: has_figures(out), timeout_s=120, interval_s=0.5)
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
