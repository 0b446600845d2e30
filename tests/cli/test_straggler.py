from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from perseus_plugin.cli.straggler import straggler
from perseus_plugin.config import StragglersConfig
from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.leader.job_socket import JobSocket
from perseus_plugin.reporting.live.events import EventLog
from perseus_plugin.stragglers.desk import StragglerDesk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[StragglerDesk]:
    """A job of 8 ranks that takes reports in this folder."""
    desk = StragglerDesk(StragglersConfig(), LocalExchange(), world_size=8, stages=2, events=EventLog(tmp_path))
    socket = JobSocket(tmp_path, desk.request)
    yield desk
    socket.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(straggler, list(arguments), terminal_width=200)


def report(folder: Path, *arguments: str) -> Result:
    return run("report", "--job", str(folder), *arguments)


def test_report_list_and_clear(tmp_path: Path, desk: StragglerDesk) -> None:
    assert run("list", "--job", str(tmp_path)).output.strip() == "no rank is slow"
    assert report(tmp_path, "--rank", "5", "--factor", "1.25x", "--for", "600").exit_code == 0
    assert report(tmp_path, "--rank", "6", "--iteration-time", "0.8", "--source", "me").exit_code == 0
    first, second = desk.book.live(time.time())
    assert (first.rank, first.slowdown, first.source) == (5, 1.25, "cli")
    assert first.until == pytest.approx(time.time() + 600, abs=60)
    assert (second.rank, second.iteration_time_s, second.until) == (6, 0.8, None)
    listed = run("list", "--job", str(tmp_path)).output
    assert "1.250" in listed
    assert "0.8 s" in listed
    assert run("clear", "--job", str(tmp_path), "--rank", "5").output.strip() == "1 report(s) cleared"
    assert [r.rank for r in desk.book.live(time.time())] == [6]
    assert run("clear", "--job", str(tmp_path)).output.strip() == "1 report(s) cleared"
    assert desk.book.live(time.time()) == []


@pytest.mark.usefixtures("desk")
def test_the_folder_can_be_the_argument_and_the_answer_json(tmp_path: Path) -> None:
    folder = str(tmp_path)
    made = run("report", folder, "--rank", "5", "--factor", "1.25x", "--json")
    told = json.loads(run("list", folder, "--json").output)
    assert (told["schema"], told["version"]) == ("perseus-stragglers", 1)
    assert [(one["rank"], one["factor"], one["source"]) for one in told["reports"]] == [(5, 1.25, "cli")]
    assert json.loads(made.output)["reports"][0]["rank"] == 5
    assert json.loads(run("clear", folder, "--json").output)["cleared"] == 1
    assert "allowed: one, the job's output folder" in str(run("list").exception)


def test_a_slowdown_is_taken_as_a_factor_with_a_note(tmp_path: Path, desk: StragglerDesk) -> None:
    result = report(tmp_path, "--rank", "5", "--slowdown", "1.25")
    assert "--slowdown 1.25: is called --factor" in result.stderr
    assert desk.book.live(time.time())[0].slowdown == 1.25


def test_until_is_unix_seconds_or_a_date(tmp_path: Path, desk: StragglerDesk) -> None:
    soon = int(time.time()) + 100
    dated = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(soon))
    for text in (str(soon), dated):
        assert report(tmp_path, "--rank", "5", "--factor", "1.25", "--until", text).exit_code == 0
        assert desk.book.live(time.time())[0].until == soon


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rank", "8", "--factor", "1.25"), "rank: got 8; allowed: 0 to 7"),
        (("--rank", "1", "--slowdown", "0.5"), "slowdown: got 0.5; allowed: 1 to 100"),
        (("--rank", "1", "--factor", "0.5"), "--factor: got '0.5'; allowed: times full clocks from 1 to 100"),
        (("--rank", "1", "--factor", "25%"), "--factor: got '25%'; allowed: times full clocks"),
        (("--rank", "1", "--factor", "nan"), "--factor: got 'nan'"),
        (("--rank", "1", "--factor", "2", "--until", "1000"), "until: got 1000, which has passed"),
        (("--rank", "1", "--factor", "2", "--until", "soon"), "--until: got 'soon'"),
        (("--rank", "1", "--factor", "2", "--until", "nan"), "--until: got 'nan'"),
        (("--rank", "1", "--factor", "2", "--until", "1", "--for", "1"), "either --until or --for"),
        (("--rank", "1"), "either --factor or --iteration-time"),
        (("--rank", "1", "--factor", "2", "--iteration-time", "2"), "either --factor or --iteration-time"),
        (("--rank", "1", "--factor", "2", "--source", "detection"), "which is the session's own"),
    ],
)
def test_what_is_refused_is_said(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    result = report(tmp_path, *arguments)
    assert isinstance(result.exception, PerseusError), "the command's entry point prints it and exits with status 2"
    assert reason in str(result.exception)


@pytest.mark.parametrize(
    ("answer", "command", "reason"),
    [
        ({"reports": 5}, "list", "the job's reply is no list of reports"),
        ({}, "list", "the job's reply is no list of reports"),
        ({"cleared": "\x1b[2J"}, "clear", ""),
        ({"ok": False, "error": "\x1b[2Jfree\nfree"}, "list", r"\x1b[2Jfree\nfree"),
    ],
)
def test_an_answer_that_no_job_gives_is_said_in_one_line(
    tmp_path: Path, answer: dict[str, object], command: str, reason: str
) -> None:
    """Where others can write in the folder, one of them may serve there."""
    server = JobSocket(tmp_path, lambda request: answer)
    try:
        result = run(command, "--job", str(tmp_path))
    finally:
        server.close()
    told = str(result.exception) if isinstance(result.exception, PerseusError) else result.output.rstrip("\n")
    assert reason in told
    assert told.isprintable()


def test_without_a_job_it_says_so(tmp_path: Path) -> None:
    result = report(tmp_path, "--rank", "1", "--factor", "2")
    assert "no running job answers here" in str(result.exception)
