"""What rank 0 says of itself where it cannot do what is asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from perseus_plugin.config import PerseusConfig, PlannerConfig, parse_config
from perseus_plugin.exchange.messages import STRAGGLERS, TARGETS, WORKS, AnnouncedWork
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.leader.leader import Leader, PlanningProcesses
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.planning.request import PlanRequest
from tests.factories import BLOCKING_W, job_of, profile
from tests.waiting import came_true

REQUEST = PlanRequest("1F1B", one_f_one_b(2, 2), {}, profile(2), [BLOCKING_W] * 2)
QUIET: dict[str, Any] = {"refine_s": 0, "frontier": False}


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


def test_everything_that_plans_runs_in_the_python_that_is_named(tmp_path: Path) -> None:
    python, ran = tmp_path / "python", tmp_path / "ran"
    python.write_text(f'#!/bin/sh\necho "$2" >> {ran}\n')  # its module; then it ends
    python.chmod(0o755)
    config = PerseusConfig(planner=PlannerConfig(python=str(python)))
    job = job_of(config, LocalExchange(), tmp_path, Timetable(Round(0, (1410, 810)), 1, 2))
    answered = Event()

    def started() -> list[str]:
        return ran.read_text().replace("perseus_plugin.planning.", "").split() if ran.exists() else []

    made = PlanningProcesses.of(job, answered.set)
    assert came_true(lambda: started() == ["process"]), "ahead of the first plan"
    assert made.refiner is not None
    assert made.frontier is not None
    made.refiner.submit(REQUEST)
    assert answered.wait(60)
    made.frontier.renew(REQUEST)
    assert came_true(lambda: "frontier_process" in started())
    made.frontier.close()
    answered.clear()
    batches = made.batches()
    batches.plan([[1.0]], iteration=3, base=1)
    assert answered.wait(60)
    for part in (made.planner, made.refiner, batches):
        part.close()
    assert sorted(started()) == ["batch_process", "frontier_process", "process", "process"]


@pytest.mark.parametrize(("settings", "refines", "draws"), [({}, True, True), (QUIET, False, False)])
def test_what_is_not_wanted_is_not_made(tmp_path: Path, settings: dict[str, Any], refines: bool, draws: bool) -> None:
    job = job_of(parse_config(settings), LocalExchange(), tmp_path, Timetable(Round(0, (1410, 810)), 1, 2))
    made = PlanningProcesses.of(job, Event().set)
    made.planner.close()
    assert (made.refiner is not None, made.frontier is not None) == (refines, draws)


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
