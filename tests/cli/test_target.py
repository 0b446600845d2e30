"""`perseus target`, and a client that needs nothing of ours, against the desk of a job."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from perseus_plugin.cli.moments import moment
from perseus_plugin.cli.target import target
from perseus_plugin.errors import ConfigError, PerseusError
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.leader.job_socket import JobSocket
from perseus_plugin.leader.target_book import Entry, TargetBook
from perseus_plugin.leader.target_desk import TargetDesk
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Prices, Target
from perseus_plugin.reporting.live.power import Drawn

CLIENT = Path(__file__).parents[2] / "examples" / "targets" / "client.py"


class Job:
    """Takes targets in a folder; all but a deadline come into force at iteration 40."""

    def __init__(self, folder: Path) -> None:
        self.book = TargetBook(Target.slowdown())
        self.entries: list[Entry] = []
        self.desk = TargetDesk(LocalExchange(), wake=self.aim)
        self.socket = JobSocket(folder, self.desk.request)
        self.aim()

    def aim(self) -> None:
        for entry in self.desk.collect():
            self.entries.append(entry)
            self.book.take(entry)
        if self.book.goal.wish.kind == "deadline":
            self.book.refuse("it is too short")
        self.book.reached(40)
        self.desk.show(self.book, self.book.goal, "following", 38)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.socket.close()


def run(folder: Path, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(target)
    return CliRunner().invoke(app, ["--job", str(folder), *arguments], terminal_width=250, env={"COLUMNS": "250"})


@pytest.mark.parametrize(
    ("arguments", "wish", "limit"),
    [
        (("--slowdown", "0.1"), Target.slowdown(0.1), None),
        (("--slowdown", "10%"), Target.slowdown(0.1), None),
        (("--cheapest",), Target.cheapest(), None),
        (("--full",), Target.full(), None),
        (("--price-kwh", "0.2", "--price-gpu-hour", "2"), Target.money(Prices(0.2, 2.0)), None),
        (("--power-budget", "180kW", "--slowdown", "0"), Target.slowdown(0.0), PowerBudget(180e3)),
    ],
)
def test_what_is_said_is_in_force_from_an_iteration_on(
    tmp_path: Path, job: Job, arguments: tuple[str, ...], wish: Target, limit: PowerBudget | None
) -> None:
    result = run(tmp_path, *arguments, "--for", "600", "--source", "me")
    assert result.output.strip() == "in force from iteration 40 on"
    (entry,) = job.entries
    assert (entry.source, entry.wish, entry.limit) == ("me", wish, limit)
    assert entry.until == pytest.approx(time.time() + 600, abs=60)


def test_shown_and_taken_back(tmp_path: Path, job: Job) -> None:
    run(tmp_path, "--slowdown", "0.1", "--until", "2100-01-01T00:00:00")
    run(tmp_path, "--full", "--source", "other")
    shown = run(tmp_path, "--show").output
    assert "in force: full clocks (following, iteration 38); aimed at: full clocks" in shown
    assert "slowdown 10 %" in shown
    assert "drawn" not in shown
    job.desk.measured(Drawn(812.345, 5.06, 9))
    assert "drawn lately: 812.3 W by all GPUs, over 5.1 s" in run(tmp_path, "--show").output
    assert "2100-01-01 00:00:00" in shown
    assert "it stands behind other" in shown
    assert run(tmp_path, "--clear", "--source", "other").output.strip() == "taken back"
    assert job.book.goal.wish == Target.slowdown(0.1)
    run(tmp_path, "--clear-all")
    assert job.book.goal.wish == Target.slowdown()


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give what to aim at"),
        (("--show", "--full"), "give what to aim at"),
        (("--full", "--slowdown", "0.1"), "allowed: one of slowdown, deadline_s, cheapest, money and full"),
        (("--slowdown", "fast"), '--slowdown: got "fast"; allowed: a share'),
        (("--power-budget", "lots"), '--power-budget: got "lots"; allowed: watts'),
        (("--price-kwh", "0.2"), "give both --price-kwh and --price-gpu-hour, or none"),
        (("--full", "--until", "1000"), "until: got 1000, which has passed"),
        (("--full", "--until", "noon"), "--until: got 'noon'"),
        (("--full", "--for", "-5"), "--for: got -5; allowed: seconds above 0"),
        (("--full", "--for", "nan"), "--for: got nan"),
        (("--full", "--until", "18:30", "--for", "1"), "give either --until or --for"),
        (("--deadline", "0.001"), "refused: it is too short"),
    ],
)
def test_what_is_refused_is_said(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    result = run(tmp_path, *arguments)
    assert isinstance(result.exception, PerseusError), "the command's entry point prints it and exits with status 2"
    assert reason in str(result.exception)


@pytest.mark.parametrize("answer", [{}, {"outcomes": 5}, {"in_force": {}, "entries": [], "outcomes": "\x1b[2J"}])
def test_an_answer_that_no_job_gives_is_said_in_one_line(tmp_path: Path, answer: dict[str, object]) -> None:
    server = JobSocket(tmp_path, lambda request: answer)
    try:
        shown, said = run(tmp_path, "--show"), run(tmp_path, "--full", "--wait", "0.3")
    finally:
        server.close()
    assert "the job's reply says nothing of targets" in str(shown.exception)
    assert str(shown.exception).isprintable()
    assert said.output.strip() == "accepted; it is not in force yet (see --show)"


def test_a_time_of_day_is_the_next_one() -> None:
    for text in ("18:30", "06:05", "7:00"):
        then = datetime.fromtimestamp(moment(text, "--until"))
        assert then.strftime("%H:%M:%S") == f"{text:0>5}:00"
        assert 0 < then.timestamp() - time.time() <= 25 * 3600
    for text in ("25:00", "1:2", ":", "inf", "1e999", ""):
        with pytest.raises(ConfigError):
            moment(text, "--until")


def test_the_example_client_needs_nothing_of_ours(tmp_path: Path, job: Job) -> None:
    def client(said: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(CLIENT), str(tmp_path), json.dumps(said)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert client({"slowdown": "10 %", "for_s": 600}).stdout.strip() == "in force 40"
    assert job.entries[0].wish == Target.slowdown(0.1)
    assert client({"deadline_s": 0.001}).stdout.strip() == "refused None it is too short"
    refused = client({"slow": 1})
    assert refused.returncode == 1
    assert "did you mean 'slowdown'?" in refused.stderr
    assert len(CLIENT.read_text().splitlines()) <= 40
