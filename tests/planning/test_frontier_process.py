"""The frontier of a running job: the same as in this process, and never in training's way."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_plugin.planning.curve import FRONTIER_FILE
from perseus_plugin.planning.frontier import frontier_to_json, make_frontier
from perseus_plugin.planning.frontier_process import TOLERANCE, BackgroundFrontier, FrontierProcess
from perseus_plugin.planning.process import limits_of, plan_for, planner_for
from tests.planning.test_process import request
from tests.waiting import PATIENCE_S, wait_until


def wait_for(what: Callable[[], bool]) -> None:
    wait_until(what, PATIENCE_S)


def test_it_is_the_frontier_of_the_plan(tmp_path: Path) -> None:
    task = request(stages=2, microbatches=3, margin=0.02)
    process = FrontierProcess(task, tmp_path / FRONTIER_FILE)
    wait_for(lambda: process.ended)
    process.close()
    made = make_frontier(planner_for(task), tolerance=TOLERANCE, limits=limits_of(task))
    assert process.progress.done
    assert process.progress.samples == len(made.points) > 2
    assert process.progress.error <= TOLERANCE
    assert json.loads((tmp_path / FRONTIER_FILE).read_text()) == json.loads(frontier_to_json(made))
    plan = plan_for(task)
    assert min(p.plan.energy_j for p in made.points if p.plan.iteration_time_s <= plan.deadline_s) == pytest.approx(
        plan.energy_j, rel=0.01
    )


def test_a_job_without_a_frontier_is_said_and_leaves_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    background = BackgroundFrontier(tmp_path)
    with caplog.at_level(logging.WARNING, logger="perseus_plugin"):
        background.renew(request(blocking_power_w=[1.0] * 3))  # for two stages
        wait_for(lambda: background.step() or bool(caplog.records))
    background.step()
    (told,) = caplog.messages
    assert "frontier.json" in told
    assert "blocking power" in told
    assert not (tmp_path / FRONTIER_FILE).exists()


def test_a_process_that_is_killed_is_said(tmp_path: Path) -> None:
    process = FrontierProcess(request(stages=8, microbatches=256), tmp_path / FRONTIER_FILE)
    process.close()
    wait_for(lambda: process.ended)
    assert "ended with SIGKILL" in process.progress.failure
    assert not list(tmp_path.iterdir())


def test_a_new_plan_replaces_the_frontier_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / FRONTIER_FILE
    path.write_text("of an older run")
    background = BackgroundFrontier(tmp_path)
    background.renew(request(stages=8, microbatches=256))
    assert not path.exists()
    background.renew(request(stages=2, microbatches=1))
    wait_for(path.exists)
    background.close()
    points = json.loads(path.read_text())["points"]
    assert all(len(point["clocks_mhz"]) == 2 for point in points)


def test_a_folder_that_is_not_there_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    background = BackgroundFrontier(tmp_path / "gone")
    with caplog.at_level(logging.WARNING, logger="perseus_plugin"):
        background.renew(request(stages=2, microbatches=1))
        wait_for(lambda: background.step() or bool(caplog.records))
    assert "frontier.json" in caplog.text
