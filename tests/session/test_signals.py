"""A whole job that follows a signal, and accounts for its energy at the signal's values."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.live_targets import PLUGIN
from tests.one_job import OneJob, Step

from .test_one_job import SHORT


def test_a_job_follows_its_signal_and_says_what_its_energy_was_worth(tmp_path: Path) -> None:
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    grid = tmp_path / "grid.csv"
    grid.write_text(f"time,grams_per_kwh\n{yesterday.isoformat()},100\n")
    signals = [
        {"source": "carbon", "file": str(grid), "stretch": [[0, 80, 0.0], [80, 200, 0.25]], "after_last": "hold"}
    ]
    log, left = tmp_path / "job" / "events.jsonl", iter(range(16))

    def followed_for_a_while() -> bool:
        return log.exists() and '"in force"' in log.read_text() and next(left, None) is None

    plugin = {**PLUGIN, "profiling": SHORT["profiling"], "signals": signals}
    job = OneJob(tmp_path / "job", [Step()] * 10_000, plugin=plugin, until=followed_for_a_while)
    summary = job.run().summary
    lines = log.read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "target"]
    assert {event["source"] for event in events} == {"signals"}
    assert events[-1]["state"] == "in force"
    assert summary["targets"].keys() <= {"slowdown 25 %", "full clocks"}
    assert summary["targets"]["slowdown 25 %"] > 0
    worth = summary["worth"]
    carbon = worth["carbon_kg"]
    assert carbon["known_percent"] == pytest.approx(100.0)
    assert carbon["total"] == pytest.approx(worth["energy_kwh"] * 0.1)
    assert worth["energy_kwh"] == pytest.approx(sum(job.ran.energies_j) / 3.6e6, rel=0.05)
    assert 0 < carbon["under_plans"] < carbon["full_clocks"]
    assert worth["money"]["total"] is None
