"""All subcommands of `perseus`: each is a module of this package, which is imported when it is run."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from perseus_plugin._version import __version__

COMMANDS = {
    "plan": "Choose a clock for every instruction so that the iteration ends in time with the least energy.",
    "frontier": "Sample the least energy for every iteration time, each sample with its plan and its distance to the "
    "bound.",
    "simulate": "Say what saving to expect; several values per option are combined, each combination with each target.",
    "config": "Check a configuration file; without one, print the reference of every key as Markdown.",
    "doctor": "Say for each GPU what works: of those named, or of all that CUDA_VISIBLE_DEVICES leaves.",
    "reset": "Free the SM clocks of GPUs: of those named, or of all that CUDA_VISIBLE_DEVICES leaves.",
    "share": "Split a power budget between running jobs, so that together they train most, for as long as this runs.",
    "target": "Tell a running job what to aim at from now on.",
    "timeline": "Draw a job's plan beside full clocks: stages as rows, instructions coloured by clock (needs "
    "matplotlib).",
    "report": "Report on a job, running or ended: a summary here, and a page with pictures that works offline.",
    "trace": "Write the iterations that were kept whole as a Chrome trace, for Perfetto (ui.perfetto.dev).",
    "verify": "Measure, on a GPU that nothing else uses, what plans rest on: times, energies, waiting, clock changes.",
    "straggler": "Report slow ranks to a running job.",
}
"""Each with the first paragraph of its help, which the list of all shows without importing them."""
_MODULES = {"trace": "report"}  # where it is not called as the command is


def command(name: str) -> Any:
    """A command with its options; imports all that it needs."""
    found = getattr(import_module(f"perseus_plugin.cli.{_MODULES.get(name, name)}"), name)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        found = alone
    made = typer.main.get_command(found)
    made.name = name
    return made


class Commands(TyperGroup):
    """The group of all commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the one that is run."""
        if args[0] in self.commands:
            self.commands[args[0]] = command(args[0])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="perseus",
    cls=Commands,
    help="Less GPU energy at the same speed for pipeline-parallel training.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perseus {__version__}")
        raise typer.Exit


@app.callback()
def perseus(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and end.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """What stands before every command."""
