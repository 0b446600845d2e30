"""`perseus simulate`: the saving to expect, before touching a cluster."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
    MinDwell,
    PowerLimit,
    Scale,
    SwitchLatency,
    lowering,
    parse_effort,
    profile_from_options,
    schedule_name,
    share_of,
    streams_for,
)
from perseus_plugin.cli.simulation.description import (
    ModelDescription,
    even_split,
    gpu_named,
    load_description,
    modelled_profile,
)
from perseus_plugin.cli.simulation.resplit import Split, resplit
from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.instructions import INPUT_SHARE
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from perseus_plugin.planning.power.words import parse_watts
from perseus_plugin.planning.targets import ChangeLimits
from perseus_plugin.profiling.profile import Profile

if TYPE_CHECKING:
    from perseus_plugin.cli.simulation.scenarios import Aim, Outcome, Pipeline, Workload

Value = TypeVar("Value")

_MODELLED = "a model, no measurement: times from counted operations, clock and power curves of an emulated GPU"


def simulate(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Profile (.csv), model description (.yaml, .yml), or traces of a job: PyTorch's profiler's, one "
            "per rank (.json, .json.gz), or a table of operations (.csv, .csv.gz).",
            metavar="SOURCE...",
            show_default=False,
        ),
    ],
    blocking_power: BlockingPower = None,
    microbatches: Annotated[
        list[int] | None, typer.Option(help="Microbatches per iteration.", show_default=False)
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SCHEDULES)}, or a schedule file, as for `perseus plan` (default: 1f1b)."),
    ] = None,
    chunks: Chunks = None,
    slowdown: Annotated[
        list[float] | None, typer.Option(help="Allowed slowdown against full clocks, as a share (default: 0).")
    ] = None,
    straggler: Annotated[
        list[float] | None, typer.Option(help="The iteration takes so many times full clocks in any case.")
    ] = None,
    power_budget: Annotated[
        list[str] | None, typer.Option(help="Most power of one GPU per stage together, such as 2kW.")
    ] = None,
    stages: Annotated[list[int] | None, typer.Option(help="Stages of an even split of the layers; of traces.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Layers of each stage, with commas.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of each stage of the profile, with commas; for another split of it.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="GPU of the catalogue; with a model description or a trace (default: a100)."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="With a trace: profile with the GPU's curves.", show_default=False)
    ] = None,
    profile_chunks: Annotated[int, typer.Option(help="Model chunks per stage of which a profile row is one.")] = 1,
    scale: Scale = 1.0,
    input_share: InputShare = INPUT_SHARE,
    latency: Latency = 0.0,
    switch_latency: SwitchLatency = SWITCH_LATENCY_S,
    lower_while_waiting: LowerWhileWaiting = True,
    max_changes: MaxChanges = None,
    min_dwell: MinDwell = 0.0,
    effort: EffortOption = "quick",
    output: Annotated[
        list[Path] | None, typer.Option("-o", "--output", help="Also write it: a path ending in .json or .csv.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw it (needs matplotlib).")] = None,
    power_limit: PowerLimit = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="With a trace: write one of a step before and after.", show_default=False)
    ] = None,
) -> None:
    """Say what saving to expect; several values per option are combined, each combination with each target.

    Of traces of a job: what it wasted, who is slow in it, and what plans would have saved over its own durations.
    """
    # Loads OR-Tools, which other subcommands do without.
    from perseus_plugin.cli.simulation.output import draw, save_outcomes
    from perseus_plugin.cli.simulation.scenarios import simulate as run
    from perseus_plugin.cli.simulation.traces.command import Options, is_trace, simulate_trace

    spent, limits = parse_effort(effort), ChangeLimits(max_changes, min_dwell)
    switch_latency_s = lowering(lower_while_waiting, switch_latency)
    aims = _aims(slowdown, straggler, power_budget)
    if is_trace(sources):
        _refuse(
            "with a trace, which says it",
            microbatches=microbatches,
            chunks=chunks,
            straggler=straggler,
            power_budget=power_budget,
            split=split,
            layers=layers,
            profile_chunks=None if profile_chunks == 1 else profile_chunks,
            scale=None if scale == 1.0 else scale,
            latency=latency or None,
            plot=plot,
        )
        if profile is None:
            _refuse("without --profile, as the GPU says it", blocking_power=blocking_power, power_limit=power_limit)
        else:
            _refuse("with --profile, which is of its own GPU", gpu=gpu)
        how = Options(
            schedule=_one("--schedule", schedule),
            stages=_one("--stages", stages),
            gpu=_one("--gpu", gpu) or "a100",
            profile=profile,
            blocking_power=blocking_power,
            power_limit_w=power_limit,
            input_share=share_of(input_share),
            slowdown=_one("--slowdown", slowdown) or 0.0,
            latency_s=switch_latency,
            lower_while_waiting=lower_while_waiting,
            effort=spent,
            limits=limits,
            outputs=output or (),
            perfetto=perfetto,
        )
        simulate_trace(sources, how, Console())
        return
    _refuse("without a trace", profile=profile, perfetto=perfetto)
    if len(sources) > 1:
        raise ConfigError(f"got {len(sources)} files; allowed: one profile or model description, or traces of one job")
    source = sources[0]
    for path in output or ():
        if path.suffix not in {".json", ".csv"}:
            raise ConfigError(f"--output: got {path}; allowed: a path that ends in .json or .csv")
    splits = [_layers("--split", text) for text in split or ()]
    modelled = source.suffix in {".yaml", ".yml"}
    if modelled:
        for name, given in (
            ("--blocking-power", blocking_power),
            ("--layers", layers),
            ("--power-limit", power_limit),
        ):
            if given is not None:
                raise ConfigError(f"{name}: got {given}; allowed: nothing with a model description, whose GPU says it")
        pipelines = _modelled(load_description(source), gpu or ["a100"], stages or [], splits, scale)
    elif source.suffix == ".csv":
        if gpu:
            raise ConfigError(f"--gpu: got {gpu[0]!r}; allowed: nothing with a profile, which is of its own GPU")
        measured, power_w = profile_from_options(source, blocking_power, scale, power_limit)
        pipelines = _measured(measured, power_w, layers, stages or [], splits, profile_chunks)
    else:
        raise ConfigError(
            f"got {source}; allowed: a profile (.csv) or a model description (.yaml, .yml), or "
            "traces (.json, .json.gz, .csv, .csv.gz)"
        )
    schedules = _schedules(schedule or ["1f1b"], microbatches, chunks)
    console = Console()
    outcomes: list[Outcome] = []
    with console.status("planning") as status:
        for outcome in run(
            pipelines,
            schedules,
            aims,
            input_share=share_of(input_share),
            latency_s=latency,
            switch_latency_s=switch_latency_s,
            limits=limits,
            effort=spent,
        ):
            outcomes.append(outcome)
            status.update(f"{len(outcomes)} scenarios planned")
    if all(outcome.figures is None for outcome in outcomes):
        raise ConfigError(f"no scenario can be planned; the first one: {outcomes[0].error}")
    _print(console, outcomes, modelled)
    facts: dict[str, Any] = {"source": str(source), "modelled": modelled, "energies": "one GPU of each stage"}
    for path in output or ():
        save_outcomes(outcomes, facts, path)
    if plot is not None:
        draw(outcomes, f"{source.name}{' (modelled, not measured)' if modelled else ''}", plot)
    written = [*(output or ()), *([plot] if plot else [])]
    if written:
        console.print(f"wrote {' and '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _refuse(why: str, **given: object) -> None:
    """Options that mean nothing here."""
    for name, value in given.items():
        if value is not None and value != []:
            raise ConfigError(f"--{name.replace('_', '-')}: got {value}; allowed: nothing {why}")


def _one(option: str, values: Sequence[Value] | None) -> Value | None:
    """Of an option that may be given several times, but not here."""
    if values and len(values) > 1:
        raise ConfigError(f"{option}: got {len(values)} of them; allowed: one, with a trace")
    return values[0] if values else None


def _aims(
    slowdowns: Sequence[float] | None, stragglers: Sequence[float] | None, budgets: Sequence[str] | None
) -> list[Aim]:
    from perseus_plugin.cli.simulation.scenarios import Aim

    for value in stragglers or ():
        if not 1 <= value < float("inf"):
            raise ConfigError(f"--straggler: got {value:g}; allowed: times full clocks, a finite number from 1")
    for value in slowdowns or ():
        if not 0 <= value < float("inf"):
            raise ConfigError(f"--slowdown: got {value:g}; allowed: a share, a finite number from 0")
    aims = [Aim(slowdown=value) for value in slowdowns or ()] + [Aim(straggler=value) for value in stragglers or ()]
    aims += [Aim(power_budget_w=parse_watts(told, "--power-budget")) for told in budgets or ()]
    return aims or [Aim(slowdown=0.0)]


def _layers(option: str, text: str) -> Split:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option}: got {text!r}; allowed: layers of each stage with commas") from None


def _modelled(
    description: ModelDescription, gpus: Sequence[str], stages: Sequence[int], splits: Sequence[Split], scale: float
) -> list[Pipeline]:
    from perseus_plugin.cli.simulation.scenarios import Pipeline

    wanted = [*(even_split(description.layers, count) for count in stages), *splits]
    if not wanted and description.own_split is not None:
        wanted = [description.own_split]
    if not wanted:
        raise ConfigError("--stages: missing; neither it nor --split is given, and the description has none of the two")

    def profile_for(split: Split, name: str, kinds: Collection[str]) -> Profile:
        return modelled_profile(description, split, name, kinds).scaled(scale)

    return [
        Pipeline(
            partial(profile_for, cut, name),
            description.waiting_power_of(gpu_named(name)).at_w(gpu_named(name).max_clock_mhz),
            len(cut),
            cut,
            gpu_named(name).name,
        )
        for name in gpus
        for cut in wanted
    ]


def _measured(
    profile: Profile,
    power: float | list[float],
    layers: str | None,
    stages: Sequence[int],
    splits: Sequence[Split],
    chunks: int,
) -> list[Pipeline]:
    from perseus_plugin.cli.simulation.scenarios import Pipeline

    if chunks < 1:
        raise ConfigError(f"--profile-chunks: got {chunks}; allowed: a whole number from 1")
    before = None if layers is None else _layers("--layers", layers)
    if (stages or splits) and before is None:
        raise ConfigError("--layers: missing; another split needs the layers of each stage of the profile")
    if before is None:
        return [Pipeline(lambda kinds: profile, power, profile.stages, None, chunks=chunks)]
    wanted = [*(even_split(sum(before), count) for count in stages), *splits] or [before]

    def profile_for(cut: Split, kinds: Collection[str]) -> Profile:
        return profile if cut == before else resplit(profile, before, cut)

    return [Pipeline(partial(profile_for, cut), power, len(cut), cut, chunks=chunks) for cut in wanted]


def _schedules(names: Sequence[str], microbatches: Sequence[int] | None, chunks: int | None) -> list[Workload]:
    from perseus_plugin.cli.simulation.scenarios import Workload

    if chunks is not None and not any(name in OF_CHUNKS for name in names):
        raise ConfigError(f"--chunks: got {chunks} with {', '.join(names)}; allowed: with {' or '.join(OF_CHUNKS)}")
    made = []
    for name in names:
        if name not in SCHEDULES and not Path(name).exists():
            raise ConfigError(f"--schedule: got {name!r}; allowed: {', '.join(SCHEDULES)}, or an existing file")
        if name in SCHEDULES and not microbatches:
            raise ConfigError(f"--microbatches: missing; the schedule {name} needs it")
        counts = tuple(microbatches or ()) if name in SCHEDULES else (None,)
        streams = partial(streams_for, name, chunks=chunks if name in OF_CHUNKS else None)
        made.append(Workload(schedule_name(name), streams, counts))
    return made


def _print(console: Console, outcomes: Sequence[Outcome], modelled: bool) -> None:
    from perseus_plugin.cli.simulation.output import label

    table = Table(
        "GPU", "stages", "schedule", "microbatches", "target", "full clocks", "plan", "saving", "slower", "gap",
        "waits left alone", box=None, pad_edge=False,
    )  # fmt: skip
    for outcome in outcomes:
        figures = outcome.figures
        if figures is None:
            continue
        split = "" if outcome.split is None else f" ({'-'.join(map(str, outcome.split))})"
        table.add_row(
            outcome.gpu or "as profiled",
            f"{outcome.stages}{split}",
            outcome.schedule,
            str(outcome.microbatches),
            str(outcome.aim),
            f"{figures.full_clock_s:.4f} s, {figures.full_clock_j:.1f} J",
            f"{figures.iteration_s:.4f} s, {figures.energy_j:.1f} J",
            f"{figures.saving:.3%}",
            f"{figures.slowdown:.3%}",
            f"{figures.gap:.3%}",
            "" if figures.left_alone_j is None else f"{1 - figures.left_alone_j / figures.full_clock_j:.3%}",
        )
    for column in table.columns:
        column.no_wrap = True
    # Figures that a narrow terminal cuts are of no use: as wide as the table is.
    wide = Console(width=max(console.width, 240)) if not console.is_terminal else console
    wide.print(table)
    for why_not in dict.fromkeys(f"{label(o, but='target')}: {o.error}" for o in outcomes if o.figures is None):
        console.print(f"not possible: {why_not}", highlight=False, soft_wrap=True)
    console.print("Energies are of one GPU per stage and iteration, waiting included.", highlight=False, soft_wrap=True)
    if modelled:
        console.print(f"This is {_MODELLED}.", highlight=False, soft_wrap=True)
