"""`perseus report` and `perseus trace`: what a job's output folder tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from perseus_plugin.errors import ConfigError
from perseus_plugin.files import write_atomically
from perseus_plugin.reporting.report.findings import Findings, Options, find
from perseus_plugin.reporting.report.folder import load_folder, state_of
from perseus_plugin.reporting.report.phrases import (
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

Folder = Annotated[Path, typer.Argument(help="A job's output folder.", show_default=False)]


def report(
    folder: Folder,
    html: Annotated[
        Path | None, typer.Option(help="Page to write (default: report.html in the folder).", show_default=False)
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Only the terminal summary.")] = False,
    no_frontier: Annotated[bool, typer.Option("--no-frontier", help="Leave out the frontier, to be faster.")] = False,
    price: Annotated[
        float | None, typer.Option(help="Price of a kWh; without, no money is stated.", show_default=False)
    ] = None,
    price_gpu_hour: Annotated[
        float | None,
        typer.Option(help="Price of an hour of one GPU: with --price, the plan that costs least.", show_default=False),
    ] = None,
    currency: Annotated[str, typer.Option(help="Of the price.")] = "USD",
    intensity: Annotated[float, typer.Option(help="Grams of CO2 per kWh.")] = WORLD_INTENSITY_G,
    pue: Annotated[float, typer.Option(help="Energy of the site per energy of its computers.")] = AVERAGE_PUE,
    hours: Annotated[float, typer.Option(help="Hours to project savings to, beside a day.")] = HOURS_PER_YEAR,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to project savings to (default: the job's).", show_default=False)
    ] = None,
    tokens_per_sample: Annotated[
        int | None, typer.Option(help="Sequence length, for figures per token.", min=1, show_default=False)
    ] = None,
) -> None:
    """Report on a job, running or ended: a summary here, and a page with pictures that works offline."""
    if html is not None and no_html:
        raise ConfigError("got --html and --no-html; allowed: one of them")
    rates = Rates(price, currency, intensity, pue, price_gpu_hour)
    options = Options(rates, hours, gpus, tokens_per_sample, frontier=not (no_frontier or no_html))
    console = Console()
    found = find(load_folder(folder), options)
    if not no_html:
        # Loads plotly, which the summary does without.
        from perseus_plugin.reporting.report.page import page

        html = folder / "report.html" if html is None else html
        write_atomically(html, page(found))
    show(found, console)
    if html is not None:
        console.print(f"wrote {html}", highlight=False, soft_wrap=True)


def trace(
    folder: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write.")] = Path("trace.json"),
) -> None:
    """Write the iterations that were kept whole as a Chrome trace, for Perfetto (ui.perfetto.dev)."""
    loaded = load_folder(folder)
    if not any(record.samples for record in loaded.records.values()):
        raise ConfigError(f"{folder}: no iteration was kept whole (yet), so there is nothing to trace")
    made = trace_of(loaded)
    write_atomically(output, json.dumps(made, allow_nan=False, separators=(",", ":")) + "\n")
    print(f"wrote {output}: {len(made['traceEvents'])} events of {len(loaded.records)} ranks")


def show(found: Findings, console: Console) -> None:
    """Print the summary."""
    folder = found.folder
    said: list[str] = [f"perseus: {job_line(folder)} · {state_of(folder)}"]
    if folder.emulated:
        said.append("Emulated GPUs: figures are a model's, not a GPU's.")
    for line in said:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for name, value, more in headline(found):
        text = f"  {name}: {value}" + (f" ({more})" if more else "")
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    for rows in (comparison(folder), budget_rows(found), valued_rows(found), worth_rows(found)):
        if rows:
            console.print(_table(rows))
    if worth_rows(found):
        console.print(rates_line(found.options.rates), highlight=False, markup=False)
    if line := least_cost_line(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if found.marks:
        told = "; ".join(f"{mark.iteration}: {mark.text}" for mark in found.marks)
        console.print(f"What happened, by iteration: {told}", highlight=False, markup=False)
    for text in found.origin:
        console.print(text, highlight=False, markup=False)
    for text in folder.missing:
        console.print(f"missing: {text}", style="yellow", highlight=False, markup=False)


def _table(rows: Rows) -> Table:
    table = Table()
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
