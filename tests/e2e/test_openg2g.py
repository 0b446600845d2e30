"""A foreign program takes power from a job that trains, and gives it back: OpenG2G, as `examples/openg2g` has it do.

`make test-all` has OpenG2G in a folder of its own, beside the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perseus_plugin.gpus.emulated.physics import A100, WAITING, load_class
from perseus_plugin.profiling.profile import Measurement, Profile, save_profile
from perseus_plugin.reporting.report.findings import Options, find
from perseus_plugin.reporting.report.folder import load_folder
from tests import live_targets
from tests.one_job import OneJob, Step
from tests.waiting import came_true

pytestmark = [pytest.mark.e2e, pytest.mark.repeated]

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".openg2g"

CLOCKS_MHZ = (1410, 1305, 1200, 1095, 990, 885, 780)
TIMES = {"forward": (0.040, 0.050), "backward": (0.080, 0.100)}


def settings(folder: Path) -> dict[str, Any]:
    """Of a job whose profile is the emulated GPU's own: a sweep on a busy machine would not know it well enough."""
    rows = [
        (
            stage,
            kind,
            Measurement(
                frequency_mhz=clock,
                time_s=time_s * A100.stretch(load_class(kind), clock),
                energy_j=time_s * A100.stretch(load_class(kind), clock) * A100.power_w(load_class(kind), clock),
                blocking_power_w=A100.power_w(WAITING, clock),
            ),
        )
        for kind, times_s in TIMES.items()
        for stage, time_s in enumerate(times_s)
        for clock in CLOCKS_MHZ
    ]
    save_profile(Profile.from_rows(rows), folder / "known.csv")
    profiling = {"warmup_steps": 2, "load": str(folder / "known.csv")}
    # What is drawn is the plan's alone: nothing at full clocks amid it.
    return {**live_targets.PLUGIN, "profiling": profiling, "watch": {"tolerance": 1.0, "reference_share": 0.0}}


@pytest.mark.skipif(
    not (INSTALLED / "openg2g").is_dir() or not (INSTALLED / "opendssdirect").is_dir(),
    reason="OpenG2G is not installed in .openg2g (make .openg2g/.installed; there may be no wheel for this Python)",
)
def test_a_grid_event_lowers_the_budget_and_the_job_follows_and_is_back(tmp_path: Path) -> None:
    folder, over, failed = tmp_path / "job", threading.Event(), list[BaseException]()
    job = OneJob(
        folder,
        [Step()] * 100_000,
        forward_s=TIMES["forward"],
        backward_s=TIMES["backward"],
        plugin=settings(tmp_path),
        until=over.is_set,
    )

    def run() -> None:
        try:
            job.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert came_true(lambda: (folder / "plan.json").exists() or not thread.is_alive(), 600.0)
        times = ("--begin", "10", "--end", "45", "--seconds", "75", "--works-mw", "2.8")
        done = subprocess.run(
            [sys.executable, ROOT / "examples/openg2g/drive.py", folder, *times, "--log", tmp_path / "log"],
            env={**os.environ, "PYTHONPATH": str(INSTALLED)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        over.set()
        thread.join()
    assert failed == []
    assert done.returncode == 0, done.stderr
    seconds = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    before, event, after = seconds[5:10], seconds[10:45], seconds[65:]
    followed = event[-15:]  # figures of what is drawn come some seconds late

    # The word: given when the works has taken the voltage below its limit, taken back once it is turned off.
    assert min(second["voltage"] for second in before) > 0.95 > event[0]["voltage"]
    assert [second["budget_mw"] is None for second in before + after] == [True] * (len(before) + len(after))
    assert all(second["budget_mw"] is not None and "within" in second["says"] for second in followed)
    assert {second["says"] for second in before + after} == {before[0]["says"]} != {event[-1]["says"]}
    # The job follows, which helps the voltage, and is back. On a busy machine what it draws varies.
    assert mean(followed, "site_mw") < 0.97 * mean(before + after, "site_mw")
    assert mean(followed, "voltage") > event[0]["voltage"]
    assert mean(after, "voltage") == pytest.approx(mean(before, "voltage"), abs=0.01)
    # As its own events have it.
    found = find(load_folder(folder), Options(frontier=False)).reigns
    assert [np.isnan(reign.budget_w) for reign in found] == [True, False, True]
    assert found[0].says == found[2].says
    assert found[1].power_ratio < found[0].power_ratio == pytest.approx(found[2].power_ratio, rel=0.01)


def mean(seconds: list[dict[str, Any]], what: str) -> float:
    return float(np.mean([second[what] for second in seconds]))
