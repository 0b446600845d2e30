"""The estimator on what a real GPU showed; `perseus verify` measures the like on yours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perseus_plugin.profiling.estimator import Activity, ClockRun, Tick, estimate_stage

FILE = Path(__file__).parents[1] / "data" / "verified-gpus" / "h100.json"


def test_counter_and_energies_of_an_h100_are_found() -> None:
    """Against long steady runs; waits amid work are a few watts above long ones, as the GPU is warmer."""
    data = json.loads(FILE.read_text())
    runs = [
        ClockRun(
            run["frequency_mhz"],
            run["begin_s"],
            run["end_s"],
            tuple(Activity(*one) for one in run["activities"]),
            tuple(Tick(*one) for one in run["ticks"]),
            steps=tuple((number, end_s) for number, end_s in run["steps"]),
        )
        for run in data["runs"]
    ]
    estimate = estimate_stage(runs)
    assert not estimate.unresolved
    assert estimate.window_s == pytest.approx(0.1, abs=0.002)
    assert estimate.lag_s == pytest.approx(0.0115, abs=0.003)
    for row in estimate.instructions:
        assert row.energy_j / row.time_s == pytest.approx(data["steady_w"][row.kind], rel=0.025)
    assert estimate.blocking_power_w == pytest.approx(data["steady_w"]["waiting"], rel=0.09)
