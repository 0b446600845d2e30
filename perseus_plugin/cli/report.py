"""`perseus report` and `perseus trace`: what a job's output folder tells."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from perseus_plugin.cli.destinations import STANDARD, check_alone, check_writable, write, written
from perseus_plugin.cli.job import OUTPUT, POWER, AsJson
from perseus_plugin.cli.terminal import console, say, working
from perseus_plugin.errors import ConfigError
from perseus_plugin.planning.solvers import keeping_the_interpreter
from perseus_plugin.reporting.report.data import report_to_json
from perseus_plugin.reporting.report.document import check_plotly
from perseus_plugin.reporting.report.findings import Findings, Options, find
from perseus_plugin.reporting.report.folder import ONE_GRAPH_SEEN, load_folder, state_of
from perseus_plugin.reporting.report.phrases import (
    DRY_RUN,
    Rows,
    budget_rows,
    comparison,
    headline,
    job_line,
    least_cost_line,
    rates_line,
    valued_rows,
    worth_rows,
)
from perseus_plugin.reporting.report.trace import trace_of
from perseus_plugin.reporting.report.worth import AVERAGE_PUE, HOURS_PER_YEAR, WORLD_INTENSITY_G, Rates

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Folder = Annotated[Path, typer.Argument(help="A job's output folder.", show_default=False)]


def report(
    folder: Folder,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Page to write, - for standard output (default: report.html in the folder).",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    no_html: Annotated[
        bool, typer.Option("--no-html", help="Only the terminal summary.", rich_help_panel=OUTPUT)
    ] = False,
    no_frontier: Annotated[
        bool, typer.Option("--no-frontier", help="Leave out the frontier, to be faster.", rich_help_panel=OUTPUT)
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(help="Price of a kWh; without, no money is stated.", show_default=False, rich_help_panel=POWER),
    ] = None,
    price_gpu_hour: Annotated[
        float | None,
        typer.Option(
            help="Price of an hour of one GPU: with --price, the plan that costs least.",
            show_default=False,
            rich_help_panel=POWER,
        ),
    ] = None,
    currency: Annotated[str, typer.Option(help="Of the price.", rich_help_panel=POWER)] = "USD",
    intensity: Annotated[float, typer.Option(help="Grams of CO2 per kWh.", rich_help_panel=POWER)] = WORLD_INTENSITY_G,
    pue: Annotated[
        float, typer.Option(help="Energy of the site per energy of its computers.", rich_help_panel=POWER)
    ] = AVERAGE_PUE,
    hours: Annotated[float, typer.Option(help="Hours to project savings to, beside a day.")] = HOURS_PER_YEAR,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to project savings to (default: the job's).", show_default=False)
    ] = None,
    tokens_per_sample: Annotated[
        int | None, typer.Option(help="Sequence length, for figures per token.", min=1, show_default=False)
    ] = None,
    serve: Annotated[
        int | None,
        typer.Option(
            help="Serve the page on this port of this machine, following the job until Ctrl-C; 0: on any.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report on a job, running or ended: a summary here, and a page with pictures that works offline."""
    if sum((html is not None, no_html, serve is not None)) > 1:
        raise ConfigError("got more than one of --html, --no-html and --serve; allowed: one of them")
    check_alone("--html - or --serve, and --json", html == STANDARD or serve is not None, as_json)
    if html is None and not no_html and serve is None and folder.is_dir():
        html = folder / "report.html"
    check_writable(html, "--html", of=folder)
    if not no_html:
        check_plotly("report")
    rates = Rates(price, currency, intensity, pue, price_gpu_hour)
    options = Options(rates, hours, gpus, tokens_per_sample, frontier=not (no_frontier or no_html))
    if serve is not None:
        follow(folder, options, serve)
    with working("reading"):
        found = find(load_folder(folder), options)
    if not no_html:
        # Loads plotly, which the summary does without.
        from perseus_plugin.reporting.report.page import page

        assert html is not None  # the folder is there: it was read
        write(html, page(found), "--html")
    if as_json:
        write(STANDARD, report_to_json(found))
        return
    to = console(stderr=html == STANDARD)
    show(found, to)
    say(written(html), to)


def follow(folder: Path, options: Options, port: int) -> NoReturn:
    """Serve the page until Ctrl-C ends the process.

    Raises:
        ConfigError: there is no such folder, or the port cannot be had.
    """
    from perseus_plugin.reporting.report.following import Followed, Server

    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; give a job's output folder (perseus.output_dir)")
    server = Server(Followed(folder, options), port)
    server.start("perseus-report")
    print(f"following {folder} at {server.url} until Ctrl-C", flush=True)
    while True:
        with keeping_the_interpreter():  # as making a page may, on another thread
            threading.Event().wait()


def trace(
    folder: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write; - for standard output.")] = Path(
        "trace.json"
    ),
) -> None:
    """Write the iterations that were kept whole as a Chrome trace, for Perfetto (ui.perfetto.dev)."""
    check_writable(output, of=folder)
    loaded = load_folder(folder)
    if not any(record.samples for record in loaded.records.values()):
        if loaded.one_graph:
            raise ConfigError(f"{folder}: {ONE_GRAPH_SEEN}, so there is nothing to trace")
        raise ConfigError(f"{folder}: no iteration was kept whole{loaded.yet}, so there is nothing to trace")
    made = trace_of(loaded)
    write(output, json.dumps(made, allow_nan=False, separators=(",", ":")) + "\n")
    if output != STANDARD:
        print(f"{written(output)}: {len(made['traceEvents'])} events of {len(loaded.records)} ranks")


def show(found: Findings, to: Console) -> None:
    """Print the summary."""
    folder = found.folder
    say(f"perseus: {job_line(folder)} · {state_of(folder)}", to)
    if folder.emulated:
        say("Emulated GPUs: figures are a model's, not a GPU's.", to)
    if folder.dry_run:
        say(DRY_RUN, to)
    for name, value, more in headline(found):
        say(f"  {name}: {value}" + (f" ({more})" if more else ""), to)
    for text in found.explained:
        to.print(text)
    for rows in (comparison(folder), budget_rows(found), valued_rows(found), worth_rows(found)):
        if rows:
            to.print(_table(rows))
    if worth_rows(found):
        to.print(rates_line(found.options.rates))
    say(least_cost_line(found), to)
    if found.marks:
        to.print("What happened, by iteration: " + "; ".join(f"{mark.iteration}: {mark.text}" for mark in found.marks))
    for text in found.origin:
        to.print(text)
    for text in folder.missing:
        to.print(f"missing: {text}", style="yellow")


def _table(rows: Rows) -> Table:
    from rich.table import Table

    table = Table()
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
