"""What rank 0 says of itself where it cannot do what is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import ClassVar

import pytest

from perseus_plugin.config import PerseusConfig, PlannerConfig
from perseus_plugin.exchange.messages import STRAGGLERS, TARGETS, WORKS, AnnouncedWork
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.leader import leader as leader_module
from perseus_plugin.leader.leader import Leader
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.planning.request import PlanRequest
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


class Started:
    """In the place of the processes that plan: who runs them."""

    pythons: ClassVar[list[str | None]] = []
    pid, busy = None, False

    def __init__(self, *arguments: object, python: str | None = None, **more: object) -> None:
        self.pythons.append(next((str(one) for one in arguments if isinstance(one, str)), python))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **more: None


def test_everything_that_plans_runs_in_the_python_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Started, "pythons", [])
    for name in ("PlannerProcess", "BackgroundFrontier", "BatchProcess"):
        monkeypatch.setattr(leader_module, name, Started)
    exchange = LocalExchange()
    config = PerseusConfig(planner=PlannerConfig(python="/opt/planner/bin/python"))
    leader = Leader(
        job_of(config, exchange, tmp_path, Timetable(Round(0, (1410, 810)), 1, 2)),
        lambda figures: None,
        wake=Event().set,
    )
    exchange.append(WORKS, AnnouncedWork(iteration=3, replica=0, work=(1.0,)).model_dump())
    leader.step(0, {}, None)
    leader.close()
    assert len(Started.pythons) == 4
    assert set(Started.pythons) == {"/opt/planner/bin/python"}


class OnePlanner:
    """That which a leader is given."""

    busy, closed = False, False

    def submit(self, request: PlanRequest) -> None:
        raise AssertionError("nothing is asked")

    def drop(self) -> None:
        pass

    def poll(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


def test_a_leader_that_cannot_be_made_leaves_no_planner_behind(tmp_path: Path) -> None:
    job = job_of(PerseusConfig(frontier=False), LocalExchange(), tmp_path, Timetable(Round(0, (1410, 810)), 1, 2))
    planner = OnePlanner()
    with pytest.raises(AttributeError, match="survey"):
        Leader(replace(job, known=None), lambda figures: None, wake=Event().set, planner=planner)  # type: ignore[arg-type]
    assert planner.closed


def test_what_ranks_say_where_no_clock_is_set_is_refused_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("perseus_plugin").propagate = True
    exchange = LocalExchange()
    leader = Leader(
        job_of(PerseusConfig(), exchange, tmp_path, Timetable(Round(0, ()), 1, 2)),
        lambda figures: None,
        wake=Event().set,
    )
    leader.step(0, {}, None)
    assert not caplog.records
    for _ in range(2):
        exchange.append(TARGETS, {"slowdown": 0.1, "source": "python"})
        exchange.append(STRAGGLERS, {"rank": 1, "slowdown": 1.5, "source": "python"})
        leader.step(0, {}, None)
    leader.close()
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("targets and straggler reports are refused, as no clock is set (logged once).")
    assert exchange.take_new(TARGETS) == exchange.take_new(STRAGGLERS) == []


def test_announced_work_does_not_pile_up_where_nothing_is_planned(tmp_path: Path) -> None:
    exchange = LocalExchange()
    leader = Leader(
        job_of(PerseusConfig(), exchange, tmp_path, Timetable(Round(0, ()), 1, 2)),
        lambda figures: None,
        wake=Event().set,
    )
    exchange.append(WORKS, AnnouncedWork(iteration=3, replica=0, work=(1.0,)).model_dump())
    leader.step(0, {}, None)
    leader.close()
    assert exchange.take_new(WORKS) == []
