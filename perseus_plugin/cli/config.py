"""`perseus config`: check a configuration file, or print the reference of all keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perseus_plugin.cli.destinations import source
from perseus_plugin.cli.reference import config_reference
from perseus_plugin.config import load_config


def config(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="DeepSpeed JSON config, or YAML or JSON file to check; - for standard input.", show_default=False
        ),
    ] = None,
) -> None:
    """Check a configuration file; without one, print the reference of every key as Markdown."""
    if file is None:
        print(config_reference(), end="")
        return
    print(load_config(source(file)).model_dump_json(indent=2))
