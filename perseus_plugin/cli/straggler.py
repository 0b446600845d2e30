"""`perseus straggler`: tell a running job that a rank is slow, see what it knows, take it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from perseus_plugin.cli.moments import MOMENTS, end_of, on_clock
from perseus_plugin.errors import ConfigError, PerseusError, shown
from perseus_plugin.leader.job_socket import ask
from perseus_plugin.stragglers.book import Report

straggler = typer.Typer(help="Report slow ranks to a running job.", no_args_is_help=True, add_completion=False)

Job = Annotated[Path, typer.Option(help="The job's output folder, on the machine of its rank 0.")]


@straggler.command()
def report(
    job: Job,
    rank: Annotated[int, typer.Option(help="Which rank, in the whole job.")],
    slowdown: Annotated[
        float | None, typer.Option(help="Its instructions take so many times as long; 1 takes the report back.")
    ] = None,
    iteration_time: Annotated[
        float | None, typer.Option(help="Or: an iteration of its pipeline takes so many seconds.")
    ] = None,
    until: Annotated[str | None, typer.Option(help=f"When it ends: {MOMENTS}.")] = None,
    lasting: Annotated[float | None, typer.Option("--for", help="Or: it lasts so many seconds.")] = None,
    source: Annotated[str, typer.Option(help="Who says so.")] = "cli",
) -> None:
    """Report that a rank is slow."""
    if (slowdown is None) == (iteration_time is None):
        raise ConfigError("give either --slowdown or --iteration-time")
    end = end_of(until, lasting)
    # Unchecked: the job itself says what is wrong with it, as it does to everyone.
    made = Report.model_construct(
        rank=rank, slowdown=slowdown, iteration_time_s=iteration_time, until=end, source=source
    )
    ask(job, {"do": "report", "report": made.model_dump()})
    typer.echo(f"rank {rank}: reported")


@straggler.command("list")
def list_reports(job: Job) -> None:
    """Show the reports in force, and what the job has seen itself."""
    try:
        reports = TypeAdapter(list[Report]).validate_python(ask(job, {"do": "list"}).get("reports"))
    except ValidationError as error:
        raise PerseusError(f"{job}: the job's reply is no list of reports ({shown(str(error))})") from error
    if not reports:
        typer.echo("no rank is slow")
        return
    table = Table("rank", "slowdown", "iteration time", "source", "since", "until")
    for entry in reports:
        table.add_row(
            str(entry.rank),
            "" if entry.slowdown is None else f"{entry.slowdown:.3f}",
            "" if entry.iteration_time_s is None else f"{entry.iteration_time_s:.4g} s",
            entry.source,
            on_clock(entry.time),
            "" if entry.until is None else on_clock(entry.until),
        )
    Console().print(table)


@straggler.command()
def clear(
    job: Job,
    rank: Annotated[int | None, typer.Option(help="Which rank; default: all.")] = None,
) -> None:
    """Take reports back. What the job sees itself stays until it sees otherwise."""
    typer.echo(f"{shown(ask(job, {'do': 'clear', 'rank': rank}).get('cleared'))} report(s) cleared")
