"""`perseus straggler`: tell a running job that a rank is slow, see what it knows, take it back."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from perseus_plugin.cli.destinations import job_folder
from perseus_plugin.cli.job import AsJson
from perseus_plugin.cli.moments import MOMENTS, end_of, on_clock, straggler_factor
from perseus_plugin.cli.terminal import console
from perseus_plugin.errors import ConfigError, PerseusError, shown
from perseus_plugin.leader.job_socket import ask
from perseus_plugin.stragglers.book import Report

STRAGGLERS_SCHEMA = "perseus-stragglers"
STRAGGLERS_VERSION = 1

straggler = typer.Typer(help="Report slow ranks to a running job.", no_args_is_help=True, add_completion=False)

Folder = Annotated[
    Path | None,
    typer.Argument(help="The job's output folder, on the machine of its rank 0.", metavar="FOLDER", show_default=False),
]
Job = Annotated[Path | None, typer.Option(help="The folder, too, in the place of the argument.", show_default=False)]


@straggler.command()
def report(
    rank: Annotated[int, typer.Option(help="Which rank, in the whole job.")],
    folder: Folder = None,
    job: Job = None,
    factor: Annotated[
        str | None,
        typer.Option(
            help="Its instructions take so many times as long: 1.2x; 1x takes the report back.", show_default=False
        ),
    ] = None,
    iteration_time: Annotated[
        float | None,
        typer.Option(help="Or: an iteration of its pipeline takes so many seconds.", show_default=False),
    ] = None,
    until: Annotated[str | None, typer.Option(help=f"When it ends: {MOMENTS}.", show_default=False)] = None,
    lasting: Annotated[
        float | None, typer.Option("--for", help="Or: it lasts so many seconds.", show_default=False)
    ] = None,
    source: Annotated[str, typer.Option(help="Who says so.")] = "cli",
    as_json: AsJson = False,
    slowdown: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Report that a rank is slow."""
    where = job_folder(folder, job)
    if [factor, iteration_time, slowdown].count(None) != 2:
        raise ConfigError("give either --factor or --iteration-time")
    if slowdown is not None:
        print(
            f"perseus: --slowdown {slowdown:g}: is called --factor, and this is the last version that takes both",
            file=sys.stderr,
        )
    times = slowdown if factor is None else straggler_factor(factor, "--factor")
    end = end_of(until, lasting)
    # Unchecked: the job itself says what is wrong with it, as it does to everyone.
    made = Report.model_construct(rank=rank, slowdown=times, iteration_time_s=iteration_time, until=end, source=source)
    ask(where, {"do": "report", "report": made.model_dump()})
    if as_json:
        _print_json([made])
        return
    typer.echo(f"rank {rank}: reported")


@straggler.command("list")
def list_reports(folder: Folder = None, job: Job = None, as_json: AsJson = False) -> None:
    """Show the reports in force, and what the job has seen itself."""
    where = job_folder(folder, job)
    try:
        reports = TypeAdapter(list[Report]).validate_python(ask(where, {"do": "list"}).get("reports"))
    except ValidationError as error:
        raise PerseusError(f"{where}: the job's reply is no list of reports ({shown(str(error))})") from error
    if as_json:
        _print_json(reports)
        return
    if not reports:
        typer.echo("no rank is slow")
        return
    table = Table("rank", "times as long", "iteration time", "source", "since", "until")
    for entry in reports:
        table.add_row(
            str(entry.rank),
            "" if entry.slowdown is None else f"{entry.slowdown:.3f}",
            "" if entry.iteration_time_s is None else f"{entry.iteration_time_s:.4g} s",
            entry.source,
            on_clock(entry.time),
            "" if entry.until is None else on_clock(entry.until),
        )
    console().print(table)


@straggler.command()
def clear(
    folder: Folder = None,
    job: Job = None,
    rank: Annotated[int | None, typer.Option(help="Which rank; default: all.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Take reports back. What the job sees itself stays until it sees otherwise."""
    cleared = ask(job_folder(folder, job), {"do": "clear", "rank": rank}).get("cleared")
    if as_json:
        _print_json([], cleared)
        return
    typer.echo(f"{shown(cleared)} report(s) cleared")


def _print_json(reports: Sequence[Report], cleared: object = 0) -> None:
    rows = [
        {
            "rank": one.rank,
            "factor": one.slowdown,
            "iteration_time_s": one.iteration_time_s,
            "source": one.source,
            "since": one.time,
            "until": one.until,
        }
        for one in reports
    ]
    head = {"schema": STRAGGLERS_SCHEMA, "version": STRAGGLERS_VERSION}
    print(json.dumps({**head, "reports": rows, "cleared": cleared}, indent=2))
