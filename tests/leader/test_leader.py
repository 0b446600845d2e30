"""What rank 0 says of itself where it cannot do what is asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from perseus_plugin.config import PerseusConfig
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.leader.leader import Leader
from perseus_plugin.leader.signals.desk import SignalDesk
from tests.factories import job_of


def test_what_signals_ask_for_where_no_clock_is_set_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("perseus_plugin").propagate = True
    day, hours = tmp_path / "day.csv", [0.0]
    day.write_text("time,power_budget_w\n1970-01-01T01:00Z,900\n1970-01-01T02:00Z,800\n")
    signals = SignalDesk([{"source": "schedule", "file": str(day)}], now=lambda: 3600.0 * hours[-1])
    job = job_of(PerseusConfig(), LocalExchange(), tmp_path, Timetable(Round(0, ()), 1, 2))
    leader = Leader(replace(job, signals=signals), lambda figures: None, wake=lambda: None)
    assert not leader.coordinates
    for hour in (0.5, 1.0, 1.5, 2.0):
        hours.append(hour)
        leader.step(0, {}, None)
    leader.close()
    assert [record.message for record in caplog.records] == [
        "what perseus.signals ask for (900 W) cannot be done, as no clock is set. See the reason above; energy is "
        "accounted for where it is measured"
    ]
