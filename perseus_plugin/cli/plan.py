"""`perseus plan`: from a profile to a plan file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from perseus_plugin.cli.job import (
    SWITCH_LATENCY_S,
    BlockingPower,
    Chunks,
    EffortOption,
    InputShare,
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
    lowering,
    parse_effort,
    planner_from_options,
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
    add_cost,
    add_power,
    budget_from_options,
    prices_from_options,
)
from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.instructions import INPUT_SHARE
from perseus_plugin.planning.plan import Plan, save_plan
from perseus_plugin.planning.power.budget import NodeOverhead, PowerBudget
from perseus_plugin.planning.targets import ChangeLimits, Prices, Target
from perseus_plugin.planning.work import tell_cut_short
from perseus_plugin.planning.zeus import save_zeus_plan


def plan(
    profile: ProfileArgument,
    blocking_power: BlockingPower = None,
    microbatches: Microbatches = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the plan.")] = Path("plan.json"),
    schedule: Schedule = "1f1b",
    chunks: Chunks = None,
    scale: Scale = 1.0,
    input_share: InputShare = INPUT_SHARE,
    latency: Latency = 0.0,
    switch_latency: SwitchLatency = SWITCH_LATENCY_S,
    lower_while_waiting: LowerWhileWaiting = True,
    power_limit: PowerLimit = None,
    slowdown: Annotated[
        float | None, typer.Option(help="Allowed slowdown against full clocks, as a share (the default: 0).")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Longest iteration, seconds.")] = None,
    straggler: Annotated[float | None, typer.Option(help="The iteration takes this many seconds in any case.")] = None,
    cheapest: Annotated[bool, typer.Option("--cheapest", help="Least energy at any iteration time.")] = False,
    energy_budget: Annotated[float | None, typer.Option(help="Most joules per iteration.")] = None,
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
    max_changes: MaxChanges = None,
    min_dwell: MinDwell = 0.0,
    effort: EffortOption = "quick",
    zeus: Annotated[
        Path | None, typer.Option(help="Also write the plan in the Zeus format (a Python literal).")
    ] = None,
) -> None:
    """Choose a clock for every instruction so that the iteration ends in time with the least energy."""
    spent = parse_effort(effort)
    limits = ChangeLimits(max_changes, min_dwell)
    planner, read = planner_from_options(
        profile,
        microbatches,
        blocking_power,
        schedule,
        scale,
        latency,
        lowering(lower_while_waiting, switch_latency),
        power_limit,
        input_share,
        chunks,
    )
    stages, node = planner.problem.graph.stages, NodeOverhead(node_watts, node_share)
    budget = budget_from_options(stages, power_budget, group, replicas, gpus_per_node, node, peak_w, peak_window)
    prices = prices_from_options(price_kwh, price_gpu_hour, node, gpus_per_node)
    target = pick_target(slowdown, deadline, straggler, cheapest, energy_budget, budget, prices)
    console = Console()
    free = None
    if limits != ChangeLimits():
        free = planner.plan(target, effort=spent)
    made = planner.plan(target, limits, spent)
    if target.kind != "straggler":
        # Loads OR-Tools, which other subcommands do without.
        from perseus_plugin.planning.confidence import with_confidence

        made = with_confidence(made, planner, read)
    if made.cut_short:
        tell_cut_short()
    save_plan(made, output)
    if zeus is not None:
        save_zeus_plan(made, zeus)
    table = summary(made, free)
    if prices is not None:
        add_cost(table, made, prices)
    console.print(table)
    console.print(f"wrote {output}" + (f" and {zeus}" if zeus else ""), highlight=False, soft_wrap=True)


def pick_target(
    slowdown: float | None,
    deadline: float | None,
    straggler: float | None,
    cheapest: bool,
    energy_budget: float | None,
    budget: PowerBudget | None = None,
    prices: Prices | None = None,
) -> Target:
    """The one target that was named; slowdown 0 without any.

    Raises:
        ConfigError: more than one.
        PlanError: a value out of range.
    """
    named = {
        "--slowdown": slowdown is not None,
        "--deadline": deadline is not None,
        "--straggler": straggler is not None,
        "--cheapest": cheapest,
        "--energy-budget": energy_budget is not None,
        "--power-budget, --group or --peak-w": budget is not None,
        "--price-kwh": prices is not None,
    }
    given = [name for name, is_given in named.items() if is_given]
    if len(given) > 1:
        raise ConfigError(f"got {' and '.join(given)}; allowed: at most one of {', '.join(named)}")
    if deadline is not None:
        return Target.deadline(deadline)
    if straggler is not None:
        return Target.straggler(straggler)
    if energy_budget is not None:
        return Target.energy_budget(energy_budget)
    if budget is not None:
        return Target.power_budget(budget)
    if prices is not None:
        return Target.money(prices)
    return Target.cheapest() if cheapest else Target.slowdown(slowdown or 0.0)


def summary(made: Plan, free: Plan | None = None) -> Table:
    """What a plan promises, beside the baseline; `free` is the same without limits on clock changes."""
    table = Table("", "full clocks", "plan", box=None, pad_edge=False)
    table.add_row("iteration time", f"{made.baseline_time_s:.6f} s", f"{made.iteration_time_s:.6f} s")
    table.add_row("energy per iteration", f"{made.baseline_energy_j:.3f} J", f"{made.energy_j:.3f} J")
    table.add_row("saving", "", f"{made.saving:.3%}")
    if made.confidence is not None:
        low, high = made.confidence.saving
        table.add_row(f"  known to be ({made.confidence.level:.0%})", "", f"{low:.3%} to {high:.3%}")
    table.add_row("slowdown", "", f"{made.slowdown:.3%}")
    add_power(table, made)
    table.add_row("lower bound of energy", "", f"{made.energy_lower_bound_j:.3f} J")
    table.add_row("gap to the bound", "", f"{made.gap:.3%}")
    if made.confidence is not None:
        table.add_row("  known to be at most", "", f"{made.confidence.gap_at_most:.3%}")
    else:
        table.add_row("  known to within", "", "unknown: no errors in the profile")
    changes = [made.clock_changes(stage) for stage in range(len(made.stages))]
    table.add_row("clock changes per stage", "", f"{min(changes)} to {max(changes)}")
    waits = sum(map(len, made.waits))
    if waits:
        table.add_row("waits at a lower clock", "", f"{waits} per iteration")
    if free is not None:
        table.add_row("cost of the limits", "", f"{made.energy_j - free.energy_j:.3f} J")
    return table
