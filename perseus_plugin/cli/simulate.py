"""`perseus simulate`: the saving to expect, before touching a cluster."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from perseus_plugin.cli.destinations import STANDARD, check_alone, check_writable, write, written
from perseus_plugin.cli.job import (
    JOB,
    OUTPUT,
    POWER,
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
    MinDwell,
    PowerLimit,
    Scale,
    SwitchLatency,
    change_limits,
    lowering,
    of_emulated_gpus,
    parse_effort,
    parse_jitter,
    parse_slowdown,
    profile_from_options,
    request_from_options,
    schedule_name,
    share_of,
    starting_with,
    streams_for,
)
from perseus_plugin.cli.moments import straggler_factor
from perseus_plugin.cli.simulation.description import (
    ModelDescription,
    even_split,
    gpu_named,
    load_description,
    modelled_profile,
)
from perseus_plugin.cli.simulation.resplit import Split, resplit
from perseus_plugin.cli.terminal import columns, console, fits, progress, say
from perseus_plugin.errors import ConfigError, figure
from perseus_plugin.gpus.emulated.physics import MODELS
from perseus_plugin.iteration.instructions import INPUT_SHARE, Compute, StageStream
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from perseus_plugin.iteration.words import parse_watts
from perseus_plugin.planning.targets import ChangeLimits
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.report.document import check_plotly
from perseus_plugin.reporting.report.still import check_drawable

if TYPE_CHECKING:
    from rich.console import Console

    from perseus_plugin.cli.simulation.scenarios import Aim, Graph, Outcome, Pipeline, Workload
    from perseus_plugin.planning.request import PlanRequest

Value = TypeVar("Value")

_MODELLED = "a model, no measurement: times from counted operations, clock and power curves of an emulated GPU"


def simulate(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A job's output folder, a profile (.csv, - for standard input), model description (.yaml, .yml), or "
            "traces of a job: PyTorch's profiler's, one per rank (.json, .json.gz), or a table of operations (.csv, "
            ".csv.gz, .parquet).",
            metavar="SOURCE...",
            show_default=False,
        ),
    ],
    blocking_power: BlockingPower = None,
    microbatches: Annotated[
        list[int] | None,
        typer.Option(help="Microbatches per iteration.", show_default=False, rich_help_panel=JOB),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(SCHEDULES)}, or a schedule file, as for `perseus plan` (default: the folder's, or 1f1b).",
            show_default=False,
            rich_help_panel=JOB,
            autocompletion=starting_with(SCHEDULES),
        ),
    ] = None,
    chunks: Chunks = None,
    slowdown: Annotated[
        list[str] | None,
        typer.Option(
            help="Allowed slowdown against full clocks, as a share: 0.1 or 10% (default: the folder's, or 0).",
            show_default=False,
            rich_help_panel=TARGET,
        ),
    ] = None,
    straggler: Annotated[
        list[str] | None,
        typer.Option(
            help="The iteration takes so many times full clocks in any case: 1.2x.",
            show_default=False,
            rich_help_panel=TARGET,
        ),
    ] = None,
    power_budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Most power of one GPU per stage together, such as 2kW.", show_default=False, rich_help_panel=POWER
        ),
    ] = None,
    stages: Annotated[
        list[int] | None,
        typer.Option(help="Stages of an even split of the layers; of traces.", show_default=False, rich_help_panel=JOB),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Layers of each stage, with commas.", show_default=False, rich_help_panel=JOB),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of each stage of the profile, with commas; for another split of it.",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU of the catalogue; with a model description or a trace (default: a100).",
            show_default=False,
            rich_help_panel=JOB,
            autocompletion=starting_with(MODELS),
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="With a trace: profile with the GPU's curves.", show_default=False, rich_help_panel=JOB),
    ] = None,
    profile_chunks: Annotated[
        int, typer.Option(help="Model chunks per stage of which a profile row is one.", rich_help_panel=JOB)
    ] = 1,
    scale: Scale = 1.0,
    input_share: InputShare = INPUT_SHARE,
    latency: Latency = None,
    switch_latency: SwitchLatency = None,
    lower_while_waiting: LowerWhileWaiting = None,
    max_changes: MaxChanges = None,
    min_dwell: MinDwell = None,
    effort: EffortOption = None,
    cuda_graph: Annotated[
        str | None,
        typer.Option(
            help="Steps are one CUDA graph, whose clocks change by host time; how much durations vary: 0.01 or 1%.",
            metavar="JITTER",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "-o",
            "--output",
            help="Also write it: a path ending in .json or .csv, or - for JSON on standard output.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw it (needs matplotlib).", show_default=False, rich_help_panel=OUTPUT),
    ] = None,
    power_limit: PowerLimit = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(
            help="With a trace: write one of a step before and after.", show_default=False, rich_help_panel=OUTPUT
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="With a trace: page to write.", show_default=False, rich_help_panel=OUTPUT)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what saving to expect; several values per option are combined, each combination with each target.

    Of traces of a job: what it wasted, who is slow in it, and what plans would have saved over its own durations.
    """
    # Loads OR-Tools, which other subcommands do without.
    from perseus_plugin.cli.simulation.output import draw, outcomes_as
    from perseus_plugin.cli.simulation.scenarios import simulate as run
    from perseus_plugin.cli.simulation.traces.command import Options, is_trace, simulate_trace

    for path in output or ():
        check_writable(path, of=sources[0])
    check_writable(plot, "--plot", of=sources[0])
    check_drawable(plot, "--plot")
    check_writable(perfetto, "--perfetto", of=sources[0])
    check_writable(html, "--html", of=sources[0])
    if html is not None:
        check_plotly("--html")
    paths = (*(output or ()), perfetto, plot, html)
    check_alone("--json and - more than once", *(path == STANDARD for path in paths), as_json)
    spent, limits = parse_effort(effort) or "quick", change_limits(max_changes, min_dwell)
    switch_latency_s = lowering(lower_while_waiting, switch_latency)
    dwell_latency_s = None if min_dwell is not None else lowering(True, switch_latency)
    graph = None if cuda_graph is None else _graph(cuda_graph, lowering(True, switch_latency) or 0.0)
    if graph is not None and lower_while_waiting:
        raise ConfigError("--lower-while-waiting: got it; allowed: nothing with --cuda-graph, as no wait is seen there")
    aims = _aims(slowdown, straggler, power_budget)
    if is_trace(sources):
        _refuse(
            "with a trace, which says it",
            microbatches=microbatches,
            straggler=straggler,
            power_budget=power_budget,
            split=split,
            layers=layers,
            profile_chunks=None if profile_chunks == 1 else profile_chunks,
            scale=None if scale == 1.0 else scale,
            latency=latency or None,
            plot=plot,
            cuda_graph=cuda_graph,
        )
        if profile is None:
            _refuse("without --profile, as the GPU says it", blocking_power=blocking_power, power_limit=power_limit)
        else:
            _refuse("with --profile, which is of its own GPU", gpu=gpu)
        how = Options(
            schedule=_one("--schedule", schedule),
            chunks=chunks,
            stages=_one("--stages", stages),
            gpu=_one("--gpu", gpu) or "a100",
            profile=profile,
            blocking_power=blocking_power,
            power_limit_w=power_limit,
            input_share=share_of(input_share),
            slowdown=parse_slowdown(_one("--slowdown", slowdown) or "0"),
            latency_s=lowering(True, switch_latency) or 0.0,
            lower_while_waiting=lower_while_waiting is not False,
            effort=spent,
            max_changes=max_changes,
            min_dwell_s=min_dwell,
            outputs=output or (),
            perfetto=perfetto,
            html=html,
            as_json=as_json,
        )
        simulate_trace(sources, how)
        return
    _refuse("without a trace", profile=profile, perfetto=perfetto, html=html)
    if len(sources) > 1:
        raise ConfigError(f"got {len(sources)} files; allowed: one profile or model description, or traces of one job")
    source = sources[0]
    for path in output or ():
        if path != STANDARD and path.suffix not in {".json", ".csv"}:
            raise ConfigError(f"--output: got {path}; allowed: a path that ends in .json or .csv")
    splits = [_layers("--split", text) for text in split or ()]
    modelled, job = source.suffix in {".yaml", ".yml"}, None
    if modelled:
        for name, given in (
            ("--blocking-power", blocking_power),
            ("--layers", layers),
            ("--power-limit", power_limit),
        ):
            if given is not None:
                raise ConfigError(f"{name}: got {given}; allowed: nothing with a model description, whose GPU says it")
        pipelines = _modelled(load_description(source), gpu or ["a100"], stages or [], splits, scale)
    elif source.is_dir():
        _refuse("with a folder, which says it", gpu=gpu, profile_chunks=None if profile_chunks == 1 else profile_chunks)
        job = request_from_options(
            source, JobOptions.of({**locals(), "microbatches": None, "schedule": None, "chunks": None})
        )
        spent = "quick" if effort is None else spent
        limits, dwell_latency_s = ChangeLimits(job.max_changes, job.min_dwell_s), None
        switch_latency_s = job.latency_s if job.lower_while_waiting else None
        of_its_own = not (stages or split or schedule or microbatches) and chunks is None
        if aims is None and (of_its_own or job.target.kind == "slowdown"):
            aims = [_aim_of(job)]
        pipelines = _of_job(job, layers, stages or [], splits)
    elif source.suffix == ".csv" or source == STANDARD:
        if gpu:
            raise ConfigError(f"--gpu: got {gpu[0]!r}; allowed: nothing with a profile, which is of its own GPU")
        measured, power_w = profile_from_options(source, blocking_power, scale, power_limit)
        pipelines = _measured(measured, power_w, layers, stages or [], splits, profile_chunks)
    else:
        raise ConfigError(
            f"got {source}; allowed: a job's output folder, a profile (.csv), or a model description (.yaml, .yml), or "
            "traces (.json, .json.gz, .csv, .csv.gz, .parquet)"
        )
    if job is not None and not schedule and not microbatches and chunks is None:
        schedules = [_own_schedule(job)]
    else:
        schedules = _schedules(schedule or ["1f1b"], microbatches, chunks)
    aims = aims or _aims(["0"], None, None) or []
    outcomes: list[Outcome] = []
    of = len(pipelines) * sum(len(one.microbatches) for one in schedules) * len(aims)
    with progress("planning", of) as tell:
        for outcome in run(
            pipelines,
            schedules,
            aims,
            input_share=share_of(input_share),
            latency_s=latency or 0.0,
            switch_latency_s=switch_latency_s,
            limits=limits,
            dwell_latency_s=dwell_latency_s,
            effort=spent,
            graph=graph,
        ):
            outcomes.append(outcome)
            tell(len(outcomes), f"{len(outcomes)} of {of} scenarios planned")
    if all(outcome.figures is None for outcome in outcomes):
        raise ConfigError(f"no scenario can be planned; the first one: {outcomes[0].error}")
    facts: dict[str, Any] = {"source": str(source), "modelled": modelled, "energies": "one GPU of each stage"}
    for path in output or ():
        write(path, outcomes_as(path.suffix, outcomes, facts))
    if plot is not None:
        emulated = " (of emulated GPUs)" if of_emulated_gpus(source) else ""
        of_what = f"{source.name}{' (modelled, not measured)' if modelled else emulated}"
        write(plot, draw(outcomes, of_what, plot), "--plot")
    if as_json:
        write(STANDARD, outcomes_as(".json", outcomes, facts))
        return
    to = console(stderr=STANDARD in [*(output or ()), plot])
    _print(to, outcomes, modelled)
    say(written(*(output or ()), plot), to)


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
    slowdowns: Sequence[str] | None, stragglers: Sequence[str] | None, budgets: Sequence[str] | None
) -> list[Aim] | None:
    """What was asked for; None: nothing."""
    from perseus_plugin.cli.simulation.scenarios import Aim

    aims = [Aim(slowdown=parse_slowdown(value)) for value in slowdowns or ()]
    aims += [Aim(straggler=straggler_factor(value)) for value in stragglers or ()]
    aims += [Aim(power_budget_w=parse_watts(told, "--power-budget")) for told in budgets or ()]
    return aims or None


def _graph(jitter: str, change_s: float) -> Graph:
    from perseus_plugin.cli.simulation.scenarios import Graph

    return Graph(parse_jitter(jitter), change_s)


def _aim_of(job: PlanRequest) -> Aim:
    from perseus_plugin.cli.simulation.scenarios import Aim

    return Aim(slowdown=job.target.value) if job.target.kind == "slowdown" else Aim(of_job=job.target)


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


def _of_job(job: PlanRequest, layers: str | None, stages: Sequence[int], splits: Sequence[Split]) -> list[Pipeline]:
    """A folder's pipeline, or other splits of it; its rows are of a chunk of its schedule."""
    watts = list(job.blocking_power_w)
    power_w = watts[0] if len(set(watts)) == 1 else watts
    chunks = 1 + max(op.chunk for stream in job.streams for op in stream if isinstance(op, Compute))
    return [replace(one, job=job) for one in _measured(job.profile, power_w, layers, stages, splits, chunks)]


def _own_schedule(job: PlanRequest) -> Workload:
    from perseus_plugin.cli.simulation.scenarios import Workload

    def streams_of(stages: int, microbatches: int | None) -> Sequence[StageStream]:
        if stages != len(job.streams):
            raise ConfigError(f"--schedule: missing; the job's is of {len(job.streams)} stages, not of {stages}")
        return job.streams

    return Workload(job.schedule, streams_of, (None,))


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


def _print(to: Console, outcomes: Sequence[Outcome], modelled: bool) -> None:
    from perseus_plugin.cli.simulation.output import label, named

    kept = [outcome for outcome in outcomes if outcome.figures is not None]
    graphed = any(outcome.figures.graphed for outcome in kept if outcome.figures is not None)
    last = "as a graph: saving, slower" if graphed else "waits left alone"
    names = ("full clocks", "plan", "saving", "slower", "gap", last)
    whole = columns(*named(outcomes[0]), *names)
    narrow = columns("", *names[:-1], last.replace(": ", ":\n") if graphed else "waits left\nalone")
    same, varied = _varied([named(outcome) for outcome in kept])
    for outcome, differs in zip(kept, varied, strict=True):
        figures = outcome.figures
        assert figures is not None  # filtered above
        other = "" if figures.left_alone_j is None else figure(1 - figures.left_alone_j / figures.full_clock_j, ".3%")
        if figures.graphed is not None:
            other = f"{figure(figures.graphed.saving, '.3%')}, {figure(figures.graphed.slowdown, '.3%')}"
        shares = (
            figure(figures.saving, ".3%"),
            figure(figures.slowdown, ".3%"),
            figure(figures.gap, ".3%"),
            other,
        )
        full = f"{figures.full_clock_s:.4f} s", f"{figures.full_clock_j:.1f} J"
        plan = f"{figures.iteration_s:.4f} s", f"{figures.energy_j:.1f} J"
        whole.add_row(*named(outcome).values(), ", ".join(full), ", ".join(plan), *shares)
        narrow.add_row("\n".join(differs), "\n".join(full), "\n".join(plan), *shares)
    if fits(whole, to):
        to.print(whole)
    else:
        say(", ".join(same), to)
        to.print(narrow)
    for why_not in dict.fromkeys(f"{label(o, but='target')}: {o.error}" for o in outcomes if o.figures is None):
        say(f"not possible: {why_not}", to)
    say("Energies are of one GPU per stage and iteration, waiting included.", to)
    if modelled:
        say(f"This is {_MODELLED}.", to)


def _varied(scenarios: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """What is the same of all scenarios, and of each what is not, in words; of a single one all is."""

    def words(name: str, value: str) -> str:
        return f"{value} {name}" if name in ("stages", "microbatches") else value

    same = {
        name: value
        for name, value in scenarios[0].items()
        if name != "target" and all(one[name] == value for one in scenarios)
    }
    differs = [[words(name, value) for name, value in one.items() if name not in same] for one in scenarios]
    return [words(name, value) for name, value in same.items()], differs
