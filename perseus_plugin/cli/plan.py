"""`perseus plan`: from a profile to a plan file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perseus_plugin.cli.destinations import STANDARD, check_alone, check_writable, write, written
from perseus_plugin.cli.job import (
    EFFORTS,
    JOB,
    OUTPUT,
    TARGET,
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
    Slowdown,
    SwitchLatency,
    parse_jitter,
    parse_slowdown,
    request_from_options,
    searched,
)
from perseus_plugin.cli.moments import straggler_s
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
from perseus_plugin.cli.terminal import columns, console, progress, say
from perseus_plugin.errors import ConfigError, ReportError, figure
from perseus_plugin.iteration.instructions import INPUT_SHARE
from perseus_plugin.planning.plan import Plan, plan_to_json
from perseus_plugin.planning.power.budget import NodeOverhead, PowerBudget
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import Prices, Target
from perseus_plugin.planning.work import tell_cut_short
from perseus_plugin.planning.zeus import zeus_plan
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.record.summary import SUMMARY_FILE, Summary, load_summary

if TYPE_CHECKING:
    from rich.table import Table

    from perseus_plugin.planning.graphed import Replays


def plan(
    profile: ProfileArgument,
    blocking_power: BlockingPower = None,
    microbatches: Microbatches = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Where to write the plan; - for standard output.", rich_help_panel=OUTPUT),
    ] = Path("plan.json"),
    schedule: Schedule = None,
    chunks: Chunks = None,
    scale: Scale = 1.0,
    input_share: InputShare = INPUT_SHARE,
    latency: Latency = None,
    switch_latency: SwitchLatency = None,
    lower_while_waiting: LowerWhileWaiting = None,
    power_limit: PowerLimit = None,
    slowdown: Slowdown = None,
    deadline: Annotated[float | None, typer.Option(help="Longest iteration, seconds.", rich_help_panel=TARGET)] = None,
    straggler: Annotated[
        str | None,
        typer.Option(
            help="The iteration takes in any case so many times full clocks (1.2x), or so long (0.5s).",
            rich_help_panel=TARGET,
        ),
    ] = None,
    cheapest: Annotated[
        bool, typer.Option("--cheapest", help="Least energy at any iteration time.", rich_help_panel=TARGET)
    ] = False,
    energy_budget: Annotated[
        float | None, typer.Option(help="Most joules per iteration.", rich_help_panel=TARGET)
    ] = None,
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
    min_dwell: MinDwell = None,
    effort: EffortOption = None,
    cuda_graph: Annotated[
        str | None,
        typer.Option(
            help="Steps are one CUDA graph, whose clocks change by host time: margin and number of changes are chosen "
            "for durations that vary by so much (0.01 or 1%), or as the profile has it (measured).",
            metavar="JITTER|measured",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None,
    zeus: Annotated[
        Path | None,
        typer.Option(help="Also write the plan in the Zeus format (a Python literal).", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a clock for every instruction so that the iteration ends in time with the least energy."""
    check_writable(output, of=profile)
    check_writable(zeus, "--zeus", of=profile)
    check_alone("--json, --output - and --zeus -", output == STANDARD, zeus == STANDARD, as_json)
    request = request_from_options(profile, JobOptions.of(locals()))
    stages, node = len(request.streams), NodeOverhead(node_watts, node_share)
    budget = budget_from_options(stages, power_budget, group, replicas, gpus_per_node, node, peak_w, peak_window)
    prices = prices_from_options(price_kwh, price_gpu_hour, node, gpus_per_node)
    share = None if slowdown is None else parse_slowdown(slowdown)
    target = pick_target(share, deadline, straggler, cheapest, energy_budget, budget, prices)
    if target is not None:
        # What a margin makes shorter draws more.
        margin = 0.0 if target.budget is not None else request.margin
        request = searched(replace(request, target=target, margin=margin))
    if cuda_graph is not None:
        jitter = _jitter(cuda_graph, request.profile)
        request = searched(replace(request, jitter=jitter, lower_while_waiting=False))
    made, free, graphed = _planned(request, straggler, max_changes is not None or bool(min_dwell))
    if made.cut_short:
        tell_cut_short()
    content = plan_to_json(made)
    write(output, content)
    if zeus is not None:
        write(zeus, zeus_plan(made), "--zeus")
    if as_json:
        write(STANDARD, content)
        return
    cost = "" if free is None else cost_of_limits(request.target, made, free)
    table = summary(made, cost, request.min_dwell_s, told=_told_of(profile, made))
    if graphed is not None:
        add_graphed(table, *graphed)
    if prices is not None:
        add_cost(table, made, prices)
    # What is written to standard output is alone there.
    to = console(stderr=STANDARD in (output, zeus))
    to.print(table)
    say(written(output, zeus), to)


def _jitter(text: str, profile: Profile) -> tuple[float, float]:
    """What `--cuda-graph` says of how much durations vary: of instructions, and of iterations.

    Raises:
        PerseusError: it is no share, or the profile says nothing of that.
    """
    if text != "measured":
        share = parse_jitter(text)
        return share, share
    from perseus_plugin.planning.graphed import jitter_of

    found = jitter_of(profile)
    if found is None:
        raise ConfigError(
            "--cuda-graph: got measured; allowed: with a profile that has spread_within or spread_between, as a job "
            "measures them; else a share such as 0.01 or 1%"
        )
    return found


def _planned(
    request: PlanRequest, straggler: str | None, limited: bool
) -> tuple[Plan, Plan | None, tuple[PlanRequest, Replays] | None]:
    """The plan; of one with limits on clock changes that were asked for, what it is without them.

    Of one for steps that are a CUDA graph also the request with what was chosen for it, and what is left of it there.
    """
    # Loads OR-Tools, which other subcommands do without.
    from perseus_plugin.planning.discretise import WORK
    from perseus_plugin.planning.process import by_time, plan_for, planner_for, with_errors

    done, free = 0.0, None
    total = sum(WORK[one] for one in EFFORTS[: EFFORTS.index(request.effort) + 1])
    with progress("planning", total * (1 + limited)) as tell:

        def told(units: float) -> None:
            nonlocal done
            done += units
            tell(done, "")

        planner = planner_for(request, told)
        if straggler is not None:
            seconds = straggler_s(straggler, planner.problem.full_clock_time_s)
            request = replace(request, target=Target.straggler(seconds))
        graphed = None
        jitter, margin = request.jitter, request.margin
        request, made = by_time(request)
        if request.margin != margin:
            planner = planner_for(request, told)
        made = made or plan_for(request, planner)
        if limited:
            # After the other, which is a plan without limits too, and must not be the better one.
            free = plan_for(replace(request, max_changes=None, min_dwell_s=0.0), planner)
        if jitter is not None:
            from perseus_plugin.planning.graphed import Jitter, Replayer  # loads what ranks tell each other

            problem = planner_for(replace(request, margin=0.0)).problem
            graphed = request, Replayer(problem, request.latency_s or 0.0, Jitter(*jitter)).under(made)
        return made if made.waits_until_s is not None else with_errors(request, made, planner), free, graphed


def pick_target(
    slowdown: float | None,
    deadline: float | None,
    straggler: str | None,
    cheapest: bool,
    energy_budget: float | None,
    budget: PowerBudget | None = None,
    prices: Prices | None = None,
) -> Target | None:
    """The one target that was named, of a straggler without its time; None without any.

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
        return Target.straggler(1.0)
    if energy_budget is not None:
        return Target.energy_budget(energy_budget)
    if budget is not None:
        return Target.power_budget(budget)
    if prices is not None:
        return Target.money(prices)
    if cheapest:
        return Target.cheapest()
    return None if slowdown is None else Target.slowdown(slowdown)


def cost_of_limits(target: Target, made: Plan, free: Plan) -> str:
    """What limits on clock changes cost of what the target is to have least of.

    Args:
        target: of both.
        made: keeps the limits; it is a plan without them, too, so that they cost nothing where the other is no better.
        free: as good as was found without them.
    """
    if target.prices is not None:
        plans = ((one.iteration_time_s, one.energy_j, len(one.stages)) for one in (made, free))
        with_them, without = (1000 * target.prices.cost(*one) for one in plans)
        return f"{max(0.0, with_them - without):.4f} per 1,000 iterations"
    if target.kind in ("power_budget", "energy_budget"):
        return f"{max(0.0, made.iteration_time_s - free.iteration_time_s):.6f} s"
    return f"{max(0.0, made.energy_j - free.energy_j):.3f} J"


def _told_of(folder: Path, made: Plan) -> Summary | None:
    """The job's summary, where the plan is the one that it predicts of; None: no job has left one, or another plan."""
    try:
        told = load_summary(folder / SUMMARY_FILE)
    except ReportError:
        return None  # nothing is planned by it
    return told if told.predicts(made) else None


def summary(made: Plan, cost: str = "", dwell_s: float = 0.0, told: Summary | None = None) -> Table:
    """What a plan promises, beside the baseline.

    Args:
        made: the plan.
        cost: of limits on clock changes.
        dwell_s: for how long clocks are kept.
        told: what its job says of it.
    """
    table = columns("", "full clocks", "plan")
    table.add_row("iteration time", f"{made.baseline_time_s:.6f} s", f"{made.iteration_time_s:.6f} s")
    table.add_row("energy per iteration", f"{made.baseline_energy_j:.3f} J", f"{made.energy_j:.3f} J")
    table.add_row("saving, by the profile", "", figure(made.saving, ".3%"))
    if made.confidence is not None:
        low, high = made.confidence.saving
        table.add_row(f"  by its errors alone ({made.confidence.level:.0%})", "", f"{low:.3%} to {high:.3%}")
    if told is not None and told.saving_percent.predicted is not None:
        table.add_row("saving, predicted by the job", "", f"{figure(told.saving_percent.predicted, '.2f')}%")
        if told.predicted_between.saving_percent is not None:
            least, most = told.predicted_between.saving_percent
            table.add_row("  as its iterations vary (95%)", "", f"{least:.2f}% to {most:.2f}%")
    table.add_row("slowdown", "", figure(made.slowdown, ".3%"))
    add_power(table, made)
    table.add_row("lower bound of energy", "", f"{made.energy_lower_bound_j:.3f} J")
    table.add_row("gap to the bound", "", figure(made.gap, ".3%"))
    if made.confidence is not None:
        table.add_row("  known to be at most", "", figure(made.confidence.gap_at_most, ".3%"))
    else:
        table.add_row("  known to within", "", "unknown: no errors in the profile")
    changes = [made.clock_changes(stage) for stage in range(len(made.stages))]
    table.add_row("clock changes per stage", "", f"{min(changes)} to {max(changes)}")
    if dwell_s > 0:
        table.add_row("clocks are kept for at least", "", f"{dwell_s:g} s")
    waits = sum(map(len, made.waits))
    if waits:
        table.add_row("waits at a lower clock", "", f"{waits} per iteration")
    if cost:
        table.add_row("cost of the limits", "", cost)
    return table


def add_graphed(table: Table, request: PlanRequest, graphed: Replays) -> None:
    """What is left of a plan where a step is one CUDA graph, and what was chosen for that (nothing under a budget)."""
    table.add_row("as one CUDA graph: saving", "", figure(graphed.saving, ".3%"))
    table.add_row("  slowdown", "", figure(graphed.slowdown, ".3%"))
    if request.target.budget is not None:
        return
    changes = "any number" if request.max_changes is None else str(request.max_changes)
    table.add_row("  chosen: margin, most changes", "", f"{request.margin:.3g}, {changes}")
