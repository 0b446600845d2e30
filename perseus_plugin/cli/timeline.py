"""`perseus timeline`: the picture of a plan beside full clocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.cli.destinations import STANDARD, check_writable, write, written
from perseus_plugin.reporting.report.still import check_drawable
from perseus_plugin.reporting.report.timeline import draw_timeline


def timeline(
    folder: Annotated[Path, typer.Argument(help="A job's output folder, with plan.json and profile.csv.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Picture to write; - for standard output, as PNG.")
    ] = Path("timeline.png"),
) -> None:
    """Draw a job's plan beside full clocks: stages as rows, instructions coloured by clock (needs matplotlib)."""
    check_writable(output, of=folder)
    check_drawable(output, "--output")
    write(output, draw_timeline(folder, output))
    if output != STANDARD:
        print(written(output))
