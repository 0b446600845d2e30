"""`perseus share`: several jobs under one power budget."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.cli.sharing.member import Look, Member
from perseus_plugin.cli.sharing.table import Round, Table, parse_weights
from perseus_plugin.errors import ConfigError, PlanError, os_problem
from perseus_plugin.files import read_text
from perseus_plugin.iteration.words import parse_watts

_SOON_S = 0.5
"""Until jobs are looked at again that have yet to do what they were told."""
_MOST_BYTES = 4096
STDIN = "-"


def share(
    jobs: Annotated[
        list[str],
        typer.Argument(
            metavar="JOB...", help="Output folders of jobs, or quoted patterns such as 'runs/*'.", show_default=False
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(help="Power of all GPUs of all jobs: 500kW; -: a line of standard input each time it changes."),
    ] = None,
    budget_file: Annotated[
        Path | None, typer.Option(help="Or: a file that says it, read again in every round.")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="JOB=2: an iteration of this job counts twice. More than once.")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds from one round to the next.", min=0.1)] = 5.0,
    lasting: Annotated[
        float, typer.Option(help="Seconds for which a job keeps its budget when it is not told again.")
    ] = 60.0,
    rounds: Annotated[int | None, typer.Option(help="End after so many rounds.", min=1, show_default=False)] = None,
) -> None:
    """Split a power budget between running jobs, so that together they train most, for as long as this runs.

    It can be ended and started again at any time: jobs keep what they were told last until that has expired.
    """
    if (budget is None) == (budget_file is None):
        raise ConfigError("give either --budget or --budget-file")
    if lasting < 2 * every:
        raise ConfigError(f"--lasting: got {lasting:g}; allowed: at least twice --every, {2 * every:g} here")
    table = Table(jobs, parse_weights(weight or []), lambda folder, counts: Member(folder, counts, lasting))
    said: list[str] = []
    left = rounds
    for budget_w in _budgets(budget, budget_file):
        done = table.round(budget_w)
        lines = list(told(done))
        if lines != said:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), *lines, sep="\n  ", flush=True)
        said = lines
        left = None if left is None else left - 1
        if left == 0:
            return
        time.sleep(min(every, _SOON_S) if done.on_the_way else every)


def told(done: Round) -> Iterator[str]:
    """What a round has come to, a line each."""
    yield f"budget {_watts(done.budget_w)}; all together may draw {_watts(done.held_w)}"
    if done.shortfall_w > 0:
        yield (
            f"this is {_watts(done.shortfall_w)} too little for what cannot be told and the lowest budgets of all "
            "others, which these are set to; end a job, or raise the budget"
        )
    for name, look in done.looks.items():
        yield f"{name}: {_of(look, done.told_w.get(name), done.problems.get(name, ''))}"


def _of(look: Look, told_w: float | None, problem: str) -> str:
    job, held_w = look.holding.job, look.holding.held_w
    if problem:
        return f"does not take {_watts(told_w or 0.0)}: {problem}"
    if job is None or told_w is None:
        kept = f", {_watts(held_w)} kept for it" if held_w else ", nothing kept for it"
        why = "" if look.state == "silent" else f" ({look.reason})" if look.reason else ""
        return "ended" if look.state == "ended" else f"{look.state}{kept}{why}"
    beyond = f"; was seen to draw {_watts(look.holding.beyond_w)} more than it may" if look.holding.beyond_w else ""
    return f"{_watts(told_w)}, {job.curve.speed_at(told_w):.1%} of its speed at full clocks{beyond}"


def _watts(watts: float) -> str:
    return f"{watts / 1000:.2f} kW" if watts >= 10_000 else f"{watts:.0f} W"


def _budgets(budget: str | None, file: Path | None) -> Iterator[float]:
    """The budget of each round, for ever.

    Raises:
        ConfigError: there is none at the beginning.
    """
    if file is not None:
        yield from _from_file(file)
    elif budget == STDIN:
        yield from _from_input()
    else:
        watts = _parsed(str(budget), "--budget")
        while True:
            yield watts


def _parsed(text: str, what: str) -> float:
    watts = parse_watts(text.strip(), what)
    if not watts > 0:
        raise PlanError(f"{what}: got {text.strip()!r}; allowed: watts above 0, such as 500kW")
    return watts


def _from_file(file: Path) -> Iterator[float]:
    watts, said = None, ""
    while True:
        problem = ""
        try:
            watts = _parsed(read_text(file, _MOST_BYTES), f"--budget-file {file}")
        except (OSError, ValueError, PlanError) as error:
            problem = os_problem(error) if isinstance(error, OSError) else str(error)
        if watts is None:
            raise ConfigError(problem)
        if problem and problem != said:
            print(f"perseus: {problem}; the budget stays {_watts(watts)}", file=sys.stderr, flush=True)
        said = problem
        yield watts


def _from_input() -> Iterator[float]:
    """Lines are read beside; the newest that says a budget holds, after the end of the input too."""
    first = threading.Event()
    newest: list[float] = []

    def read() -> None:
        for line in sys.stdin:
            try:
                newest[:] = [_parsed(line, "budget")]
                first.set()
            except PlanError as error:
                print(f"perseus: {error}; the budget stays", file=sys.stderr, flush=True)
        first.set()

    threading.Thread(target=read, name="budgets", daemon=True).start()
    first.wait()
    if not newest:
        raise ConfigError("--budget -: got no budget on standard input; allowed: a line such as 500kW")
    while True:
        yield newest[0]
