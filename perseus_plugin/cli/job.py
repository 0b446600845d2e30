"""Options that every planning subcommand shares, and the job that they describe."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import ValidationError

from perseus_plugin.cli.destinations import source
from perseus_plugin.errors import ConfigError, PerseusError, PlanError, shown, validation_problem
from perseus_plugin.iteration.bounds import MOST_SLOWDOWN, MOST_W
from perseus_plugin.iteration.instructions import Compute, StageStream
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from perseus_plugin.iteration.words import parse_share
from perseus_plugin.planning.inputs import INPUTS_FILE, load_inputs
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.planning.targets import ChangeLimits, Effort, dwell_for
from perseus_plugin.profiling.derived import with_rows_for
from perseus_plugin.profiling.profile import Profile, load_profile

JOB, TARGET, POWER, SEARCH, OUTPUT = "Job", "Target", "Power and money", "Search", "Output"
"""Panels of the help."""
EFFORTS: tuple[Effort, ...] = get_args(Effort)

ProfileArgument = Annotated[
    Path,
    typer.Argument(
        help="A job's output folder: its plan is made again, or another one as the options say. Or a profile: CSV "
        "with stage,instruction,frequency,time,energy, - for standard input.",
        metavar="FOLDER|PROFILE",
        show_default=False,
    ),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        help="Microbatches per iteration; not with a schedule file, which has them.",
        show_default=False,
        rich_help_panel=JOB,
    ),
]
BlockingPower = Annotated[
    str | None,
    typer.Option(
        help="Watts a GPU draws while it waits for another stage, where the profile does not say; one figure, or one "
        "per stage with commas.",
        show_default=False,
        rich_help_panel=JOB,
    ),
]
PowerLimit = Annotated[
    float | None,
    typer.Option(
        help="Most watts that a GPU can draw: a profile with more is refused (2000).",
        show_default=False,
        rich_help_panel=JOB,
    ),
]


def starting_with(choices: Collection[str]) -> Callable[[str], list[str]]:
    """Completion of an option by these."""
    return lambda incomplete: [one for one in choices if one.startswith(incomplete)]


Schedule = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(SCHEDULES)}, or a file: .json with the operations of every stage, .csv with the actions of "
        "every rank as PyTorch's pipeline schedules write them (default: the folder's, or 1f1b).",
        show_default=False,
        rich_help_panel=JOB,
        autocompletion=starting_with(SCHEDULES),
    ),
]
Chunks = Annotated[
    int | None,
    typer.Option(
        help=f"Model chunks per stage, with {' or '.join(OF_CHUNKS)} (2).", show_default=False, rich_help_panel=JOB
    ),
]
InputShare = Annotated[
    float,
    typer.Option(
        help="Share of a backward that computes its input's gradient, where the schedule splits backwards and the "
        "profile does not.",
        rich_help_panel=JOB,
    ),
]
Scale = Annotated[float, typer.Option(help="Multiply the profile's times and energies.", rich_help_panel=JOB)]
EffortOption = Annotated[
    str | None,
    typer.Option(
        help="How hard to try (default: quick; of plan with a folder, as hard as its job).",
        metavar="|".join(EFFORTS),
        show_default=False,
        rich_help_panel=SEARCH,
        autocompletion=starting_with(EFFORTS),
    ),
]
MaxChanges = Annotated[
    int | None, typer.Option(help="Most clock changes per stage and iteration.", rich_help_panel=SEARCH)
]
MinDwell = Annotated[
    float | None,
    typer.Option(
        help="Shortest time between clock changes, seconds (default: the folder's; else two changes' time where an "
        "instruction is shorter than that, 0 where none is).",
        show_default=False,
        rich_help_panel=SEARCH,
    ),
]
Latency = Annotated[
    float | None,
    typer.Option(
        help="Seconds a transfer between stages takes (default: the folder's, or 0).",
        show_default=False,
        rich_help_panel=JOB,
    ),
]
SwitchLatency = Annotated[
    float | None,
    typer.Option(
        help="Seconds a clock change takes at most, for waits at lower clocks (measured on A100 and A40: 3 to 9 ms; "
        "default: the folder's, or 0.01).",
        show_default=False,
        rich_help_panel=JOB,
    ),
]
LowerWhileWaiting = Annotated[
    bool | None,
    typer.Option(
        "--lower-while-waiting/--no-lower-while-waiting",
        help="Let a GPU that waits long enough wait at a lower clock, where the profile says what that takes (default: "
        "as the folder's job, or let it).",
        show_default=False,
        rich_help_panel=SEARCH,
    ),
]
Slowdown = Annotated[
    str | None,
    typer.Option(
        help="Allowed slowdown against full clocks, as a share: 0.1 or 10% (default: the folder's target, or 0).",
        show_default=False,
        rich_help_panel=TARGET,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON in the place of text and tables.", rich_help_panel=OUTPUT)
]
SWITCH_LATENCY_S = 0.01
_MOST_JITTER = 0.2


@dataclass(frozen=True)
class JobOptions:
    """What the options above say of a job and of the search for its plan, named as a command's parameters are."""

    blocking_power: str | None
    microbatches: int | None
    schedule: str | None
    chunks: int | None
    scale: float
    input_share: float
    latency: float | None
    switch_latency: float | None
    lower_while_waiting: bool | None
    power_limit: float | None
    max_changes: int | None
    min_dwell: float | None
    effort: str | None

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> JobOptions:
        """Those among all parameters of a command, which has every one of them."""
        return cls(**{one.name: parameters[one.name] for one in fields(cls)})


def request_from_options(path: Path, job: JobOptions) -> PlanRequest:
    """What is to be planned: what a folder's job has planned, or a profile; options go before what a folder says.

    Raises:
        PerseusError: an option, the profile, the folder or the schedule is wrong.
    """
    given: dict[str, object] = {
        "effort": parse_effort(job.effort),
        "max_changes": _limit("--max-changes", "max_changes_per_iteration", job.max_changes),
        "min_dwell_s": _limit("--min-dwell", "min_dwell_s", job.min_dwell),
        "latency_s": _limit("--switch-latency", "switch_latency_s", job.switch_latency),
        "lower_while_waiting": job.lower_while_waiting,
    }
    if path.is_dir():
        if job.power_limit is not None:
            raise ConfigError(f"--power-limit: got {job.power_limit:g}; allowed: nothing with a folder, which says it")
        known = request_of_folder(path)
        stages, profile, name = known.profile.stages, known.profile, known.schedule
        streams = list(known.streams)
        if (job.schedule, job.microbatches, job.chunks) != (None, None, None):
            name = job.schedule or "1f1b"
            streams = streams_for(name, stages, job.microbatches, job.chunks)
        watts = (
            known.blocking_power_w
            if job.blocking_power is None
            else _per_stage(parse_power(job.blocking_power), stages)
        )
        beside = known.overheads or Overheads()
    else:
        known = PlanRequest(
            "",
            [],
            {},
            *_profile_and_power(path, job.blocking_power, job.power_limit),
            latency_s=SWITCH_LATENCY_S,
            blocking_power_se_w=0.0,
        )
        name, profile, watts, beside = job.schedule or "1f1b", known.profile, known.blocking_power_w, Overheads()
        streams = streams_for(name, profile.stages, job.microbatches, job.chunks)
    if job.latency is not None:
        beside = replace(beside, transfer_s=_seconds("--latency", job.latency))
    profile = with_rows_for(profile.scaled(job.scale), streams, share_of(job.input_share))
    needed = {(s, op.kind) for s, stream in enumerate(streams) for op in stream if isinstance(op, Compute)}
    missing = sorted(needed - profile.table.keys())
    if missing:
        stage, kind = missing[0]
        raise PlanError(f"{path}: no row for {kind!r} in stage {stage}, which the schedule {name} runs")
    asked = replace(
        known,
        schedule=name if name == known.schedule else schedule_name(name),
        streams=streams,
        profile=profile,
        blocking_power_w=watts,
        overheads=beside,
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    if job.min_dwell is None and not path.is_dir():
        shortest_s = min(profile.table[key][0].time_s for key in needed)
        asked = replace(asked, min_dwell_s=dwell_for(shortest_s, asked.latency_s or 0.0))
    return asked if asked == replace(known, streams=streams, profile=profile) else searched(asked)


def searched(request: PlanRequest) -> PlanRequest:
    """The request for a plan that the job itself did not have to make, by a search whatever that one was made by."""
    return replace(request, search=True, full_clocks=False, drawn=1.0)


def of_emulated_gpus(path: Path) -> bool:
    """Whether it is the output folder of a job on emulated GPUs, as far as what stands in it says that."""
    from perseus_plugin.reporting.report.folder import load_folder

    try:
        return path.is_dir() and bool(load_folder(path).emulated)
    except PerseusError:
        return False


def request_of_folder(folder: Path) -> PlanRequest:
    """What a job has planned by what stands in its output folder; without a plan, what it would be made from.

    Raises:
        PerseusError: it is no such folder, or something in it cannot be read.
    """
    # Loads what a report reads, which a profile does without.
    from perseus_plugin.reporting.record.recorder import schedule_path
    from perseus_plugin.reporting.report.folder import load_folder

    file = folder / INPUTS_FILE
    if file.exists():
        inputs = load_inputs(file)
        kept = schedule_path(folder, inputs.schedule)
        return replace(inputs, streams=load_streams(kept if kept.exists() else folder / "schedule.json"))
    job = load_folder(folder)
    if job.survey is None or job.streams is None:
        raise ConfigError(
            f"{folder}: profile.csv, profile.json or schedule.json of this job is missing; {'; '.join(job.missing)}"
        )
    latency_s = None if job.summary is None else job.summary.overhead.switch_latency_p95_s
    power_se_w = job.survey.blocking_power_se_w
    return PlanRequest(
        schedule="custom" if job.plan is None else job.plan.schedule,
        streams=job.streams,
        constant_time_s=job.survey.constants_for(job.streams),
        profile=job.survey.profile.scaled(job.profile_scale),
        blocking_power_w=[job.survey.blocking_power_w] * job.survey.profile.stages,
        blocking_power_se_w=power_se_w if math.isfinite(power_se_w) else None,
        full_clock_only=job.survey.unresolved,
        latency_s=latency_s,
        overheads=job.overheads,
    )


def _profile_and_power(
    path: Path, blocking_power: str | None, power_limit_w: float | None
) -> tuple[Profile, list[float]]:
    profile, power_w = profile_from_options(path, blocking_power, 1.0, power_limit_w)
    return profile, _per_stage(power_w, profile.stages)


def _per_stage(power_w: float | list[float], stages: int) -> list[float]:
    return power_w if isinstance(power_w, list) else [power_w] * stages


def _limit(option: str, key: str, value: float | None) -> float | None:
    """An option that is a key of `perseus.limits` too, of which the same is allowed."""
    if value is None:
        return None
    # All models of the configuration, which a command without such an option does without.
    from perseus_plugin.config import LimitsConfig

    try:
        LimitsConfig.model_validate({key: value})
    except ValidationError as error:
        allowed = validation_problem(error, LimitsConfig).partition("; allowed: ")[2].removesuffix(", or null")
        raise ConfigError(f"{option}: got {shown(value)}; allowed: {allowed}") from None
    return value


def change_limits(max_changes: int | None, min_dwell: float | None) -> ChangeLimits:
    """What `--max-changes` and `--min-dwell` say.

    Raises:
        ConfigError: such a limit is none.
    """
    _limit("--max-changes", "max_changes_per_iteration", max_changes)
    return ChangeLimits(max_changes, _limit("--min-dwell", "min_dwell_s", min_dwell) or 0.0)


def _seconds(option: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{option}: got {value:g}; allowed: seconds, a finite number from 0")
    return value


def profile_from_options(
    path: Path, blocking_power: str | None, scale: float, power_limit_w: float | None
) -> tuple[Profile, float | list[float]]:
    """The profile, and what a waiting GPU draws where its rows do not say.

    Raises:
        PerseusError: an option or the profile is wrong, or nothing says what a waiting GPU draws.
    """
    power_w = None if blocking_power is None else parse_power(blocking_power)
    profile = load_profile(source(path), power_w, power_limit_w).scaled(scale)
    if power_w is None and not profile.says_waiting:
        raise ConfigError(
            f"--blocking-power: missing; {path} does not say what a waiting GPU draws in every stage (column "
            "blocking_power); allowed: watts, or watts per stage with commas"
        )
    return profile, 0.0 if power_w is None else power_w


def share_of(input_share: float) -> float:
    """`--input-share` as it was given.

    Raises:
        ConfigError: no such share.
    """
    if not 0 < input_share < 1:
        raise ConfigError(f"--input-share: got {input_share:g}; allowed: a share above 0 and below 1")
    return input_share


def lowering(lower_while_waiting: bool | None, switch_latency_s: float | None) -> float | None:
    """What the planner has to know of clock changes in waits: how long they take, None if there are to be none.

    Raises:
        ConfigError: no such time.
    """
    takes_s = _limit("--switch-latency", "switch_latency_s", switch_latency_s)
    takes_s = SWITCH_LATENCY_S if takes_s is None else takes_s
    return takes_s if lower_while_waiting in (None, True) else None


def schedule_name(schedule: str) -> str:
    """What plans call the schedule that `--schedule` names."""
    return schedule if schedule in SCHEDULES else Path(schedule).stem


def streams_for(schedule: str, stages: int, microbatches: int | None, chunks: int | None = None) -> list[StageStream]:
    """The instruction streams that `--schedule`, `--microbatches` and `--chunks` name.

    Raises:
        ConfigError: there is no such schedule or it is of other stages or other chunks, or microbatches are missing or
            too many.
        ScheduleError: the schedule does not exist for so many stages and microbatches, or its file is wrong.
    """
    if chunks is not None and schedule not in OF_CHUNKS:
        raise ConfigError(f"--chunks: got {chunks} with {schedule}; allowed: with {' or '.join(OF_CHUNKS)}")
    if schedule in SCHEDULES:
        if microbatches is None:
            raise ConfigError(f"--microbatches: missing; the schedule {schedule} needs it")
        if chunks is not None:
            return OF_CHUNKS[schedule](stages, microbatches, chunks)
        return SCHEDULES[schedule](stages, microbatches)
    if not Path(schedule).exists():
        raise ConfigError(f"--schedule: got {schedule!r}; allowed: {', '.join(SCHEDULES)}, or an existing file")
    if microbatches is not None:
        raise ConfigError("--microbatches: not allowed with a schedule file, which has its own")
    streams = load_streams(schedule)
    if len(streams) != stages:
        raise ConfigError(f"--schedule: {schedule} has {len(streams)} stages; allowed: {stages}, as the profile has")
    return streams


def parse_power(text: str) -> float | list[float]:
    """One figure in watts, or one per stage separated by commas.

    Raises:
        ConfigError: not numbers.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--blocking-power: got {text!r}; allowed: watts, or watts per stage with commas") from None
    for value in values:
        if not 0 <= value <= MOST_W:
            raise ConfigError(f"--blocking-power: got {value:g}; allowed: watts of one GPU, from 0 to {MOST_W:g}")
    return values if len(values) > 1 else values[0]


def parse_effort(text: str | None) -> Effort | None:
    """One of the efforts by name; None where none is given.

    Raises:
        ConfigError: there is none of that name.
    """
    for effort in EFFORTS:
        if text == effort:
            return effort
    if text is None:
        return None
    raise ConfigError(f"--effort: got {text!r}; allowed: {', '.join(EFFORTS)}")


def parse_jitter(text: str) -> float:
    """`--cuda-graph` as a share.

    Raises:
        PerseusError: it is none, or too large.
    """
    share = parse_share(text, "--cuda-graph")
    if share > _MOST_JITTER:
        raise ConfigError(f"--cuda-graph: got {text}; allowed: from 0 to {_MOST_JITTER:g}, such as 0.01 or 1%")
    return share


def parse_slowdown(text: str) -> float:
    """`--slowdown` as a share.

    Raises:
        PerseusError: it is none, or so large that something else must be meant.
    """
    share = parse_share(text, "--slowdown")
    if share > MOST_SLOWDOWN:
        raise ConfigError(
            f"--slowdown: got {text}; allowed: a share of the time at full clocks from 0 to {MOST_SLOWDOWN:g}, such as "
            "0.1 or 10% (an iteration that takes twice as long is a slowdown of 1)"
        )
    return share
