"""Entry point of the `perseus` command. Every subcommand is one module of this package."""

from __future__ import annotations

import sys

import typer

from perseus_plugin.cli.config import config
from perseus_plugin.cli.doctor import doctor
from perseus_plugin.cli.frontier import frontier
from perseus_plugin.cli.plan import plan
from perseus_plugin.cli.report import report, trace
from perseus_plugin.cli.reset import reset
from perseus_plugin.cli.share import share
from perseus_plugin.cli.simulate import simulate
from perseus_plugin.cli.straggler import straggler
from perseus_plugin.cli.target import target
from perseus_plugin.cli.timeline import timeline
from perseus_plugin.cli.verify import verify
from perseus_plugin.errors import PerseusError, os_problem

app = typer.Typer(
    name="perseus",
    help="Less GPU energy at the same speed for pipeline-parallel training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(frontier)
app.command()(simulate)
app.command()(config)
app.command()(doctor)
app.command()(reset)
app.command()(share)
app.add_typer(straggler, name="straggler")
app.command()(target)
app.command()(timeline)
app.command()(report)
app.command()(trace)
app.command()(verify)


def run() -> None:
    """Run the command; an error meant for the user becomes one line on stderr and exit status 2."""
    try:
        app()
    except (PerseusError, OSError) as error:
        print(f"perseus: {os_problem(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
