"""The planner is lost, and asked again."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.exchange.processes import ending
from perseus_plugin.planning.child import Child, ChildLostError
from perseus_plugin.planning.planner_process import PlannerProcess, why_no_planner
from tests.planning.test_process import answer, request
from tests.waiting import PATIENCE_S, pipes_here, stop_process, wait_until

PLANNER = "perseus_plugin.planning.process"


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="perseus_plugin")
    return caplog


def test_a_planner_that_was_killed_is_started_again_and_the_cause_is_said(heard: pytest.LogCaptureFixture) -> None:
    planner = PlannerProcess(pauses_s=(0.01,))
    pid = planner.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    got = answer(planner, request())
    assert got.plan is not None
    assert planner.pid != pid
    (told,) = heard.messages
    assert "SIGKILL, as the kernel sends when memory runs out" in told
    assert "limits" not in told
    planner.close()
    planner.close()


def test_one_that_is_stopped_is_ended_and_started_again(heard: pytest.LogCaptureFixture) -> None:
    planner = PlannerProcess(pauses_s=(0.0,), idle_s=8.0)
    pid = planner.pid
    assert pid is not None
    stop_process(pid)
    assert answer(planner, request()).plan is not None
    assert "took no processor time for 8 s (it hangs, or somebody has stopped it) and was ended" in heard.messages[0]
    assert not Path(f"/proc/{pid}").exists()
    planner.close()


def test_one_that_takes_too_long_is_ended(heard: pytest.LogCaptureFixture) -> None:
    planner = PlannerProcess(pauses_s=(0.0,), limit_s=0.2)
    pid = planner.pid
    assert pid is not None
    stop_process(pid)
    got = answer(planner, request(8, 64))  # takes longer than that to be planned, too
    assert (got.plan, got.lost) == (None, True)
    assert "lost 2 times" in got.error
    assert "took longer than 0.2 s and was ended" in got.error
    assert "took longer than 0.2 s and was ended" in heard.messages[0]
    assert not Path(f"/proc/{pid}").exists()
    planner.close()


def test_one_that_is_lost_each_time_is_a_failure_with_its_cause(heard: pytest.LogCaptureFixture) -> None:
    planner = PlannerProcess(pauses_s=())
    pid = planner.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    got = answer(planner, request())
    assert (got.plan, got.lost) == (None, True)
    assert "lost 1 times; at last it ended with SIGKILL" in got.error
    assert not heard.messages
    assert answer(planner, request()).plan is not None, "the next request has a process again"
    planner.close()


def test_one_that_cannot_be_started_is_tried_again(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))] * 2
    really = subprocess.Popen

    def started(*arguments: Any, **more: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return really(*arguments, **more)

    monkeypatch.setattr("subprocess.Popen", started)
    planner = PlannerProcess(pauses_s=(0.01,))
    assert planner.pid is None
    assert answer(planner, request()).plan is not None
    assert "raise the limit of processes" in heard.messages[0]
    planner.close()


def test_closing_ends_the_process_and_a_wait_for_it(heard: pytest.LogCaptureFixture) -> None:
    planner = PlannerProcess(pauses_s=(600.0,))
    pid = planner.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    planner.submit(request())
    wait_until(lambda: bool(heard.messages), PATIENCE_S)
    planner.close()
    wait_until(lambda: not planner.busy, PATIENCE_S)
    assert planner.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_what_the_script_has_opened_in_place_of_our_pipes_is_left_alone(tmp_path: Path) -> None:
    """As a script does that closes all that it does not know."""
    before = pipes_here()
    planner = PlannerProcess(pauses_s=(0.0,))
    pipes = [number for number, pipe in pipes_here().items() if before.get(number) != pipe]
    assert len(pipes) == 2
    theirs = tmp_path / "theirs"
    theirs.write_text("untouched")
    for number in pipes:
        opened = os.open(theirs, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    try:
        assert answer(planner, request()).plan is not None, "it is started again"
        planner.close()
        assert theirs.read_text() == "untouched"
        assert [os.lseek(number, 0, os.SEEK_CUR) for number in pipes] == [0, 0], "nothing was read, and none closed"
    finally:
        for number in pipes:
            os.close(number)


def test_one_that_refines_is_there_for_its_request_alone_and_takes_what_nobody_else_wants() -> None:
    refiner = PlannerProcess(pauses_s=(), ahead=False)
    assert refiner.pid is None
    refiner.submit(replace(request(), refine_s=30.0))
    wait_until(lambda: refiner.pid is not None or not refiner.busy, PATIENCE_S)
    with suppress(OSError):  # it may have ended
        wait_until(lambda: not refiner.busy or os.getpriority(os.PRIO_PROCESS, refiner.pid or 0) == 19, PATIENCE_S)
    wait_until(lambda: not refiner.busy, PATIENCE_S)
    got = refiner.poll()
    assert got is not None
    assert got.plan is not None, got.error
    assert refiner.pid is None
    refiner.close()


def test_when_memory_runs_out_the_planner_goes_before_the_trainer() -> None:
    planner = PlannerProcess()
    score = Path(f"/proc/{planner.pid}/oom_score_adj")
    wait_until(lambda: score.read_text().strip() == "1000")
    planner.close()


def test_a_line_without_end_is_given_up_in_time() -> None:
    child = Child(PLANNER, str(os.getpid()))
    stop_process(child.pid)
    with pytest.raises(ChildLostError, match=r"took longer than 0\.2 s"):
        child.tell(["x" * 2**20] * 2, limit_s=0.2)
    child.end()
    assert not child.running


@pytest.mark.repeated
def test_a_python_that_is_a_script_is_not_idle_while_what_it_runs_works(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n(while :; do :; done) & worker=$!\nsleep 9\nkill $worker\necho done\n")
    python.chmod(0o755)
    child = Child(PLANNER, str(os.getpid()), python=str(python))
    assert child.hear(limit_s=60.0, idle_s=5.0) == "done"
    child.end()


def test_what_a_python_that_is_a_script_runs_ends_with_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 600 <&- >&- & echo $!\nwait\n")
    python.chmod(0o755)
    child = Child(PLANNER, str(os.getpid()), python=str(python))
    worker = Path(f"/proc/{child.hear(limit_s=60.0)}/stat")
    assert worker.exists()
    child.end()
    wait_until(lambda: not worker.exists() or b") Z " in worker.read_bytes())


@pytest.mark.parametrize(
    ("status", "said"), [(0, "status 0"), (3, "status 3"), (-15, "SIGTERM"), (-9, "SIGKILL, as"), (-200, "signal 200")]
)
def test_how_a_process_ended_is_said_by_name(status: int, said: str) -> None:
    assert ending(status).startswith(said)


def test_a_python_that_can_plan_and_this_one() -> None:
    assert why_no_planner(None) == ""
    assert why_no_planner(sys.executable) == ""


def test_without_the_solver_in_this_environment_its_remedies_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools", None)
    assert why_no_planner(None) == (
        "the planner needs ortools, which is not installed (pip install 'perseus-plugin[planner]'); or name the "
        "Python of another environment that has it (perseus.planner.python)"
    )


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ('exec {python} -S -E "$@"', "ModuleNotFoundError: No module named 'numpy'"),
        ("exit 3", "status 3"),
        ("kill -KILL $$", "SIGKILL, as the kernel sends"),
        (None, "No such file or directory"),
    ],
)
def test_a_python_that_cannot_plan_is_named_with_the_reason(tmp_path: Path, script: str | None, why: str) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text("#!/bin/sh\n" + script.format(python=sys.executable) + "\n")
        python.chmod(0o755)
    said = why_no_planner(str(python))
    assert said.startswith(f'perseus.planner.python: "{python}" cannot run the planner ({why}')
    assert said.endswith(f"({python} -m pip install 'perseus-plugin[planner]')")
