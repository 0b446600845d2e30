"""`perseus frontier`: the whole time-energy curve of a job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perseus_plugin.cli.destinations import STANDARD, check_alone, check_writable, write, written
from perseus_plugin.cli.job import (
    OUTPUT,
    SEARCH,
    AsJson,
    BlockingPower,
    Chunks,
    EffortOption,
    InputShare,
    JobOptions,
    Latency,
    LowerWhileWaiting,
    MaxChanges,
    Microbatches,
    MinDwell,
    PowerLimit,
    ProfileArgument,
    Scale,
    Schedule,
    SwitchLatency,
    of_emulated_gpus,
    request_from_options,
)
from perseus_plugin.cli.power import (
    BudgetOption,
    GpusPerNode,
    GroupOption,
    NodeShare,
    NodeWatts,
    PeakOption,
    PeakWindow,
    PriceGpuHour,
    PriceKwh,
    Replicas,
    budget_from_options,
    prices_from_options,
)
from perseus_plugin.cli.terminal import columns, console, progress, say
from perseus_plugin.errors import figure
from perseus_plugin.iteration.instructions import INPUT_SHARE
from perseus_plugin.planning.power.budget import NodeOverhead
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.report.palette import AMBER, BLUE, BOUND, RED, VIOLET
from perseus_plugin.reporting.report.still import check_drawable, drawn

if TYPE_CHECKING:
    from rich.table import Table

    from perseus_plugin.planning.frontier import Frontier
    from perseus_plugin.planning.plan import Plan

_FULL_SPEED = 0.001  # share of the time at full clocks
_MARKS = (VIOLET, AMBER)  # of plans to point out: for a budget, for prices


def frontier(
    profile: ProfileArgument,
    blocking_power: BlockingPower = None,
    microbatches: Microbatches = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Where to write it; - for standard output.", rich_help_panel=OUTPUT),
    ] = Path("frontier.json"),
    schedule: Schedule = None,
    chunks: Chunks = None,
    scale: Scale = 1.0,
    input_share: InputShare = INPUT_SHARE,
    latency: Latency = None,
    switch_latency: SwitchLatency = None,
    lower_while_waiting: LowerWhileWaiting = None,
    power_limit: PowerLimit = None,
    power_budget: BudgetOption = None,
    group: GroupOption = None,
    replicas: Replicas = 1,
    gpus_per_node: GpusPerNode = 8,
    node_watts: NodeWatts = 0.0,
    node_share: NodeShare = 0.0,
    peak_w: PeakOption = None,
    peak_window: PeakWindow = 1.0,
    price_kwh: PriceKwh = None,
    price_gpu_hour: PriceGpuHour = None,
    tolerance: Annotated[
        float, typer.Option(help="Share to within which to know the bound.", rich_help_panel=SEARCH)
    ] = 0.002,
    max_changes: MaxChanges = None,
    min_dwell: MinDwell = None,
    effort: EffortOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw it (needs matplotlib); - for standard output, as PNG.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sample the least energy for every iteration time, each sample with its plan and its distance to the bound."""
    check_writable(output, of=profile)
    check_writable(plot, "--plot", of=profile)
    check_drawable(plot, "--plot")
    check_alone("--json, --output - and --plot -", output == STANDARD, plot == STANDARD, as_json)
    request = request_from_options(profile, JobOptions.of(locals()))
    # Loads OR-Tools, which other subcommands do without.
    from perseus_plugin.planning.frontier import frontier_to_json, make_frontier
    from perseus_plugin.planning.process import limits_of, planner_for
    from perseus_plugin.planning.work import tell_cut_short

    # A frontier is of all targets, and many plans: without the margin of the job's, and only searched on demand.
    planner = planner_for(replace(request, margin=0.0))
    spent, limits = "quick" if effort is None else request.effort, limits_of(request)
    stages, node = planner.problem.graph.stages, NodeOverhead(node_watts, node_share)
    budget = budget_from_options(stages, power_budget, group, replicas, gpus_per_node, node, peak_w, peak_window)
    prices = prices_from_options(price_kwh, price_gpu_hour, node, gpus_per_node)
    marks: dict[str, Plan] = {}
    if budget is not None:
        marks["within the power budget"] = planner.plan(Target.power_budget(budget), limits, spent)  # type: ignore[arg-type]
    if prices is not None:
        marks["least cost"] = planner.plan(Target.money(prices), limits, spent)  # type: ignore[arg-type]
    with progress("sampling", 1.0) as tell:
        at_first: list[float] = []

        def sampled(count: int, error: float) -> None:
            at_first.append(error)
            begin = max(at_first[0], tolerance)
            way = math.log(begin / error) / math.log(begin / tolerance) if 0 < error < begin > tolerance else 0.0
            tell(way / 2, f"{count} samples, curve known to within {error:.3%}")

        made = make_frontier(
            planner,
            tolerance=tolerance,
            limits=limits,
            effort=spent,  # type: ignore[arg-type]
            progress=sampled,
            planned=lambda count, of: tell((1 + count / of) / 2, f"{count} of {of} samples planned"),
        )
    if made.cut_short:
        tell_cut_short()
    content = frontier_to_json(made)
    write(output, content)
    if plot is not None:
        write(plot, draw(made, plot, marks, of_emulated_gpus(profile)), "--plot")
    if as_json:
        write(STANDARD, content)
        return
    to = console(stderr=STANDARD in (output, plot))
    to.print(summary(made))
    for name, plan in marks.items():
        told = f"{name}: {plan.iteration_time_s:.4f} s, {plan.energy_j:.1f} J, {plan.power_w:.1f} W"
        if plan.slowdown <= _FULL_SPEED:
            told += f": full speed, with {figure(plan.saving, '.2%')} less energy"
        say(told, to)
    say(written(output, plot), to)


def summary(made: Frontier) -> Table:
    """One row per sample."""
    table = columns("deadline", "iteration time", "energy", "power", "saving", "gap")
    for point in made.points:
        plan = point.plan
        table.add_row(
            f"{point.deadline_s:.4f} s",
            f"{plan.iteration_time_s:.4f} s",
            f"{plan.energy_j:.1f} J",
            f"{plan.energy_j / plan.iteration_time_s:.1f} W",
            figure(1 - plan.energy_j / made.baseline_energy_j, ".2%"),
            f"{plan.energy_j / point.bound_j - 1:.3%}",
        )
    return table


def draw(made: Frontier, path: Path, marks: Mapping[str, Plan] | None = None, emulated: bool = False) -> bytes:
    """Bound and plans, energy above power, as a picture.

    Args:
        made: the frontier.
        path: where the picture goes, which was checked.
        marks: plans to point out.
        emulated: whether it is of emulated GPUs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    energies, powers = figure.subplots(2, sharex=True)
    bound = [(point.deadline_s, point.bound_j) for point in made.points]
    plans = [(point.plan.iteration_time_s, point.plan.energy_j) for point in made.points]
    full = [(made.baseline_time_s, made.baseline_energy_j)]
    series: list[tuple[str, str, list[tuple[float, float]], str]] = [
        ("lower bound", "-", bound, BOUND),
        ("plans", "o", plans, BLUE),
        ("full clocks", "s", full, RED),
    ]
    for (name, plan), colour in zip((marks or {}).items(), _MARKS, strict=False):
        series.append((name, "D", [(plan.iteration_time_s, plan.energy_j)], colour))
    for name, look, points, colour in series:
        times_s = [time_s for time_s, _ in points]
        energies.plot(times_s, [energy_j for _, energy_j in points], look, color=colour, ms=4, label=name)
        powers.plot(times_s, [energy_j / time_s for time_s, energy_j in points], look, color=colour, ms=4)
    energies.set_ylabel("energy per iteration, one GPU per stage [J]")
    powers.set_ylabel("average power, one GPU per stage [W]")
    powers.set_xlabel(f"iteration time{' of emulated GPUs' if emulated else ''} [s]")
    energies.legend()
    return drawn(figure, path)
