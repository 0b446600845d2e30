"""`perseus target`: tell a running job what to aim at, see what it aims at, take it back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from perseus_plugin.cli.destinations import job_folder
from perseus_plugin.cli.job import parse_slowdown
from perseus_plugin.cli.moments import MOMENTS, end_of, on_clock
from perseus_plugin.cli.terminal import console
from perseus_plugin.errors import ConfigError, PerseusError, plain, shown
from perseus_plugin.iteration.words import parse_watts
from perseus_plugin.leader.job_socket import ask

_LOOK_EVERY_S = 0.1


def target(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="The job's output folder, on the machine of its rank 0.", metavar="FOLDER", show_default=False
        ),
    ] = None,
    job: Annotated[
        Path | None, typer.Option(help="The folder, too, in the place of the argument.", show_default=False)
    ] = None,
    slowdown: Annotated[
        str | None, typer.Option(help="An iteration may be longer than at full clocks by this share: 0.1 or 10%.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Or: an iteration may take so many seconds.")] = None,
    cheapest: Annotated[bool, typer.Option("--cheapest", help="Or: least energy.")] = False,
    price_kwh: Annotated[float | None, typer.Option(help="Or: least cost, at this price of a kWh ...")] = None,
    price_gpu_hour: Annotated[float | None, typer.Option(help="... and this price of a GPU-hour.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Or: full clocks, nothing is slowed.")] = False,
    power_budget: Annotated[
        str | None, typer.Option(help="Average power that the job may draw, whatever is wished: 180kW, 900 W.")
    ] = None,
    until: Annotated[str | None, typer.Option(help=f"When it ends: {MOMENTS}.")] = None,
    lasting: Annotated[float | None, typer.Option("--for", help="Or: it lasts so many seconds.")] = None,
    source: Annotated[str, typer.Option(help="Who says so: a source's newest word replaces what it said.")] = "cli",
    clear: Annotated[bool, typer.Option("--clear", help="Take back what this source has said.")] = False,
    clear_all: Annotated[bool, typer.Option("--clear-all", help="Take back what all sources have said.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show what is aimed at, and what became of it.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the answer; 0: do not wait.")] = 30.0,
) -> None:
    """Tell a running job what to aim at from now on."""
    where = job_folder(folder, job)
    if (price_kwh is None) != (price_gpu_hour is None):
        raise ConfigError("give both --price-kwh and --price-gpu-hour, or none")
    said: dict[str, Any] = {
        "slowdown": None if slowdown is None else parse_slowdown(slowdown),
        "deadline_s": deadline,
        "cheapest": cheapest or None,
        "money": None if price_kwh is None else {"per_kwh": price_kwh, "per_gpu_hour": price_gpu_hour},
        "full": full or None,
        "power_budget_w": None if power_budget is None else parse_watts(power_budget, "--power-budget"),
    }
    said = {name: value for name, value in said.items() if value is not None}
    if bool(said) + clear + clear_all + show != 1:
        raise ConfigError(
            "give what to aim at (--slowdown, --deadline, --cheapest, --price-kwh, --full, --power-budget), or one of "
            "--clear, --clear-all and --show"
        )
    if show:
        _show(ask(where, {"do": "targets"}))
    elif said:
        end = end_of(until, lasting)
        number = ask(where, {"do": "target", "target": {**said, "until": end, "source": source}}).get("number")
        _wait_for(where, number, wait)
    else:
        ask(where, {"do": "clear_target", "source": None if clear_all else source})
        typer.echo("taken back")


def _wait_for(job: Path, number: object, wait_s: float) -> None:
    """Say what becomes of it, as soon as that is known."""
    give_up_s = time.monotonic() + wait_s
    while True:
        outcome = _outcome(job, number) if wait_s > 0 else {}
        state, reason = outcome.get("state", "waiting"), plain(str(outcome.get("reason", "")))
        if state == "refused":
            raise PerseusError(f"refused: {reason}")
        if state == "in force":
            typer.echo(f"in force from iteration {shown(outcome.get('iteration'))} on")
            return
        if state != "waiting":
            typer.echo(f"{plain(str(state))}: {reason}")
            return
        if time.monotonic() > give_up_s:
            typer.echo("accepted; it is not in force yet (see --show)")
            return
        time.sleep(_LOOK_EVERY_S)


def _outcome(job: Path, number: object) -> dict[str, Any]:
    outcomes = ask(job, {"do": "targets"}).get("outcomes")
    found = [one for one in outcomes if isinstance(one, dict)] if isinstance(outcomes, list) else []
    return next((one for one in found if one.get("number") == number), {})


def _show(told: dict[str, Any]) -> None:
    in_force, entries, outcomes = told.get("in_force"), told.get("entries"), told.get("outcomes")
    if not isinstance(in_force, dict) or not isinstance(entries, list) or not isinstance(outcomes, list):
        raise PerseusError(f"the job's reply says nothing of targets ({shown(told)})")
    typer.echo(
        f"in force: {plain(str(in_force.get('says')))} ({plain(str(in_force.get('phase')))}, iteration "
        f"{shown(told.get('iteration'))}); aimed at: {plain(str(told.get('aimed_at')))}"
    )
    match told.get("drawn"):
        case {"power_w": float(power_w), "over_s": float(over_s)}:
            typer.echo(f"drawn lately: {power_w:.1f} W by all GPUs, over {over_s:.1f} s")
    table = Table("number", "source", "target", "until", "state", "from iteration", "reason")
    ends = {one.get("number"): one.get("until") for one in entries if isinstance(one, dict)}
    for one in [one for one in outcomes if isinstance(one, dict)][-20:]:
        end, begin = ends.get(one.get("number")), one.get("iteration")
        table.add_row(
            shown(one.get("number")),
            plain(str(one.get("source"))),
            plain(str(one.get("says"))),
            on_clock(end) if isinstance(end, (int, float)) else "",
            plain(str(one.get("state"))),
            "" if begin is None else shown(begin),
            plain(str(one.get("reason"))),
        )
    console().print(table)
