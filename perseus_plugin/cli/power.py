"""Options of power and money that the planning subcommands share, and what they say of a plan's power."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from perseus_plugin.cli.job import POWER
from perseus_plugin.errors import ConfigError, figure
from perseus_plugin.iteration.words import parse_watts
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.power.budget import NodeOverhead, Peaks, PowerBudget
from perseus_plugin.planning.power.words import parse_group
from perseus_plugin.planning.targets import Prices

if TYPE_CHECKING:
    from rich.table import Table

BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--power-budget",
        help="Most power of all GPUs of the job, such as 180kW: the fastest iteration within it.",
        rich_help_panel=POWER,
    ),
]
GroupOption = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        help="Most power of some GPUs, NAME=RANKS:WATTS; RANKS such as 0-7,16, or gpu, node (each of them), node 3.",
        rich_help_panel=POWER,
    ),
]
Replicas = Annotated[
    int, typer.Option(help="Pipelines of the job: rank = pipeline * stages + stage.", rich_help_panel=POWER)
]
GpusPerNode = Annotated[
    int, typer.Option(help="GPUs of a node; ranks are numbered node by node.", rich_help_panel=POWER)
]
NodeWatts = Annotated[
    float, typer.Option(help="Watts of a node besides its GPUs; budgets are at the nodes then.", rich_help_panel=POWER)
]
NodeShare = Annotated[float, typer.Option(help="The same as a share of its GPUs' power.", rich_help_panel=POWER)]
PeakOption = Annotated[
    str | None,
    typer.Option("--peak-w", help="Most power of the job over any window, such as 200kW.", rich_help_panel=POWER),
]
PeakWindow = Annotated[float, typer.Option(help="Length of that window, seconds.", rich_help_panel=POWER)]
PriceKwh = Annotated[
    float | None,
    typer.Option(help="Price of a kWh: with --price-gpu-hour, the iteration that costs least.", rich_help_panel=POWER),
]
PriceGpuHour = Annotated[
    float | None, typer.Option(help="Price of an hour of one GPU, in the same currency.", rich_help_panel=POWER)
]


def budget_from_options(
    stages: int,
    power_budget: str | None,
    groups: Sequence[str] | None,
    replicas: int,
    gpus_per_node: int,
    node: NodeOverhead,
    peak_w: str | None,
    peak_window: float,
) -> PowerBudget | None:
    """The budget that the options name, placed on the job; None if none does.

    Raises:
        PerseusError: a value is wrong.
    """
    for option, count in (("--replicas", replicas), ("--gpus-per-node", gpus_per_node)):
        if count < 1:
            raise ConfigError(f"{option}: got {count}; allowed: a whole number from 1")
    peaks = Peaks(peak_window, None if peak_w is None else parse_watts(peak_w, "--peak-w"))
    if power_budget is None and not groups and not peaks.limited:
        return None
    return PowerBudget(
        None if power_budget is None else parse_watts(power_budget, "--power-budget"),
        tuple(parse_group(told) for told in groups or ()),
        node,
        peaks,
        gpus_per_node,
    ).placed(list(range(stages)) * replicas)


def prices_from_options(
    price_kwh: float | None, price_gpu_hour: float | None, node: NodeOverhead, gpus_per_node: int
) -> Prices | None:
    """Both prices, or neither.

    Raises:
        PerseusError: one alone, or a value is wrong.
    """
    if (price_kwh is None) != (price_gpu_hour is None):
        missing = "--price-kwh" if price_kwh is None else "--price-gpu-hour"
        raise ConfigError(f"{missing}: missing; what costs least depends on the price of energy and on that of time")
    if price_kwh is None or price_gpu_hour is None:
        return None
    return Prices(price_kwh, price_gpu_hour, node, gpus_per_node)


def add_power(table: Table, made: Plan) -> None:
    """Rows of a plan's power."""
    table.add_row(
        "power, one GPU per stage",
        f"{made.baseline_energy_j / made.baseline_time_s:.1f} W",
        f"{made.power_w:.1f} W",
    )
    power = made.power
    if power is None:
        return
    for one in power.budgets:
        table.add_row(f"power of {one.name}", "", f"{one.planned_w:.1f} W of {one.allowed_w:.1f} W")
    peaks = power.peaks
    table.add_row(
        f"highest over {peaks.window_s:g} s",
        "",
        f"job {peaks.job_w:.1f} W, node {peaks.node_w:.1f} W, GPU {peaks.gpu_w:.1f} W",
    )
    table.add_row("shortest iteration possible", "", f"{power.time_lower_bound_s:.6f} s")
    gap = made.iteration_time_s / power.time_lower_bound_s - 1
    table.add_row("time above that", "", figure(gap, ".3%") + ("" if power.converged else " (bound not the best)"))


def add_cost(table: Table, made: Plan, prices: Prices) -> None:
    """Rows of what an iteration costs."""
    gpus = len(made.stages)
    full = prices.cost(made.baseline_time_s, made.baseline_energy_j, gpus)
    cost = prices.cost(made.iteration_time_s, made.energy_j, gpus)
    table.add_row("cost per 1,000 iterations", f"{1000 * full:.4f}", f"{1000 * cost:.4f}")
    table.add_row("cheaper", "", figure(1 - cost / full, ".3%"))
