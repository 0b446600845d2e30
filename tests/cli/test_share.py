"""`perseus share` as a command; what it decides is tested in `sharing/`."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import Perseus
from tests.cli.sharing.job_at_socket import JobAtSocket

POINTS = ((800.0, 1.0), (600.0, 1.05), (500.0, 1.3))


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[list[JobAtSocket]]:
    made = [JobAtSocket(tmp_path / name, POINTS, 4, time.time) for name in ("a", "b")]
    yield made
    for job in made:
        job.end()


def told_w(jobs: list[JobAtSocket]) -> list[float | None]:
    for job in jobs:
        job.step()
    limits = [job.book.goal.limit for job in jobs]
    return [None if limit is None else limit.job_w for limit in limits]


def test_jobs_are_told_what_they_may_draw_and_for_how_long(jobs: list[JobAtSocket], perseus: Perseus) -> None:
    before_s = time.time()
    done = perseus("share", "--budget", "2.8kW", "--weight", "a=2", "--rounds", 1, *(job.folder for job in jobs))
    assert done.returncode == 0, done.stderr
    assert told_w(jobs) == [1600.0, pytest.approx(1200.0)]
    until = jobs[0].book.entries[1].until
    assert until is not None
    assert before_s + 60 <= until <= time.time() + 60
    lines = done.stdout.splitlines()
    assert lines[1:] == [
        "  budget 2800 W; all together may draw 3200 W",
        f"  {jobs[0].folder}: 1600 W, 100.0% of its speed at full clocks",
        f"  {jobs[1].folder}: 1200 W, 95.2% of its speed at full clocks",
    ]


def test_what_cannot_be_done_is_said(jobs: list[JobAtSocket], perseus: Perseus, tmp_path: Path) -> None:
    jobs[0].give_up()
    jobs[0].step()
    jobs[1].end()
    (tmp_path / "c").mkdir()
    done = perseus("share", "--budget", "900 W", "--rounds", 1, f"{tmp_path}/*", tmp_path / "d")
    assert done.stdout.splitlines()[1:] == [
        "  budget 900 W; all together may draw 1600 W",
        "  this is 700 W too little for what cannot be told and the lowest budgets of all others, which these are set "
        "to; end a job, or raise the budget",
        f"  {tmp_path}/a: cannot be told, 1600 W kept for it (it stays at full clocks)",
        f"  {tmp_path}/b: ended",
        f"  {tmp_path}/c: ended",
        f"  {tmp_path}/d: ended",
    ]


def test_a_file_that_says_the_budget_is_read_in_every_round(
    jobs: list[JobAtSocket], perseus: Perseus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "budget"
    file.write_text("2.4 kW\n")
    says = iter(["2 kW", "plenty", "3000"])

    def sleep(seconds: float) -> None:
        for job in jobs:
            for _ in range(4):
                job.step()
        file.write_text(next(says))

    monkeypatch.setattr(time, "sleep", sleep)
    done = perseus("share", "--budget-file", file, "--rounds", 4, *(job.folder for job in jobs))
    said = [line.partition(";")[0].strip() for line in done.stdout.splitlines() if "budget" in line]
    assert said == ["budget 2400 W", "budget 2000 W", "budget 2000 W", "budget 3000 W"]
    assert done.stderr.count("\n") == 1
    assert f'--budget-file {file}: got "plenty"; allowed: watts' in done.stderr
    assert "; the budget stays 2000 W" in done.stderr
    assert sum(watts or 0.0 for watts in told_w(jobs)) == pytest.approx(3000.0)


def test_a_budget_comes_by_standard_input(
    jobs: list[JobAtSocket], perseus: Perseus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("plenty\n2.6kW\n"))
    done = perseus("share", "--budget", "-", "--rounds", 1, *(job.folder for job in jobs))
    assert done.returncode == 0, done.stderr
    assert sum(watts or 0.0 for watts in told_w(jobs)) == pytest.approx(2600.0)
    assert 'budget: got "plenty"' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either --budget or --budget-file"),
        (["--budget", "1kW", "--budget-file", "x"], "give either --budget or --budget-file"),
        (["--budget", "much"], '--budget: got "much"; allowed: watts'),
        (["--budget", "0"], "allowed: watts above 0"),
        (["--budget-file", "/nowhere/budget"], "/nowhere/budget: No such file or directory"),
        (["--budget", "1kW", "--every", "40"], "--lasting: got 60; allowed: at least twice --every, 80 here"),
        (["--budget", "1kW", "--weight", "a"], "--weight: got 'a'; allowed: JOB=NUMBER"),
    ],
)
def test_wrong_use_is_one_line(perseus: Perseus, arguments: list[str], said: str) -> None:
    done = perseus("share", *arguments, "--rounds", 1, "somewhere")
    assert done.returncode == 2
    assert said in done.stderr


def test_an_end_of_the_input_without_a_budget_is_wrong_use(perseus: Perseus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "got no budget on standard input" in perseus("share", "--budget", "-", "somewhere").stderr
