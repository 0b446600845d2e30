"""Options that every planning subcommand shares, and the planner that they describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from perseus_plugin.errors import ConfigError, PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import Compute, StageStream
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.planning.targets import Effort
from perseus_plugin.profiling.derived import with_rows_for
from perseus_plugin.profiling.profile import Profile, load_profile

if TYPE_CHECKING:
    from perseus_plugin.planning.planner import Planner

ProfileArgument = Annotated[
    Path, typer.Argument(help="Profile CSV: stage,instruction,frequency,time,energy.", show_default=False)
]
Microbatches = Annotated[
    int | None,
    typer.Option(help="Microbatches per iteration; not with a schedule file, which has them.", show_default=False),
]
BlockingPower = Annotated[
    str | None,
    typer.Option(
        help="Watts a GPU draws while it waits for another stage, where the profile does not say; one figure, or one "
        "per stage with commas.",
        show_default=False,
    ),
]
PowerLimit = Annotated[
    float | None,
    typer.Option(help="Most watts that a GPU can draw: a profile with more is refused (2000).", show_default=False),
]
Schedule = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(SCHEDULES)}, or a file: .json with the operations of every stage, .csv with the actions of "
        "every rank as PyTorch's pipeline schedules write them."
    ),
]
Chunks = Annotated[
    int | None,
    typer.Option(help=f"Model chunks per stage, with {' or '.join(OF_CHUNKS)} (2).", show_default=False),
]
InputShare = Annotated[
    float,
    typer.Option(
        help="Share of a backward that computes its input's gradient, where the schedule splits backwards and the "
        "profile does not."
    ),
]
Scale = Annotated[float, typer.Option(help="Multiply the profile's times and energies.")]
EffortOption = Annotated[str, typer.Option(help=f"{', '.join(get_args(Effort))}.")]
MaxChanges = Annotated[int | None, typer.Option(help="Most clock changes per stage and iteration.")]
MinDwell = Annotated[float, typer.Option(help="Shortest time between clock changes, seconds.")]
Latency = Annotated[float, typer.Option(help="Seconds a transfer between stages takes.")]
SwitchLatency = Annotated[
    float,
    typer.Option(
        help="Seconds a clock change takes at most, for waits at lower clocks (measured on A100 and A40: 3 to 9 ms)."
    ),
]
LowerWhileWaiting = Annotated[
    bool,
    typer.Option(
        help="Let a GPU that waits long enough wait at a lower clock, where the profile says what that takes."
    ),
]
SWITCH_LATENCY_S = 0.01


def planner_from_options(
    profile_path: Path,
    microbatches: int | None,
    blocking_power: str | None,
    schedule: str,
    scale: float,
    latency: float,
    switch_latency_s: float | None,
    power_limit_w: float | None,
    input_share: float,
    chunks: int | None = None,
) -> tuple[Planner, Profile]:
    """Read the files and set up the planner; `switch_latency_s` is from `lowering`. With it the profile that it reads.

    Raises:
        PerseusError: an option, the profile or the schedule is wrong.
    """
    # Loads OR-Tools, which other subcommands do without.
    from perseus_plugin.planning.planner import Planner

    profile, power_w = profile_from_options(profile_path, blocking_power, scale, power_limit_w)
    streams = streams_for(schedule, profile.stages, microbatches, chunks)
    profile = with_rows_for(profile, streams, share_of(input_share))
    needed = {(s, op.kind) for s, stream in enumerate(streams) for op in stream if isinstance(op, Compute)}
    missing = sorted(needed - profile.table.keys())
    if missing:
        stage, kind = missing[0]
        raise PlanError(f"{profile_path}: no row for {kind!r} in stage {stage}, which the schedule {schedule} runs")
    planner = Planner(
        build_graph(streams, latency_s=latency),
        profile,
        blocking_power_w=power_w,
        schedule=schedule_name(schedule),
        switch_latency_s=switch_latency_s,
    )
    return planner, profile


def profile_from_options(
    path: Path, blocking_power: str | None, scale: float, power_limit_w: float | None
) -> tuple[Profile, float | list[float]]:
    """The profile, and what a waiting GPU draws where its rows do not say.

    Raises:
        PerseusError: an option or the profile is wrong, or nothing says what a waiting GPU draws.
    """
    power_w = None if blocking_power is None else parse_power(blocking_power)
    profile = load_profile(path, power_w, power_limit_w).scaled(scale)
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


def lowering(lower_while_waiting: bool, switch_latency_s: float) -> float | None:
    """What the planner has to know of clock changes in waits: how long they take, None if there are to be none.

    Raises:
        ConfigError: no such time.
    """
    if not (math.isfinite(switch_latency_s) and switch_latency_s >= 0):
        raise ConfigError(f"--switch-latency: got {switch_latency_s:g}; allowed: seconds, a finite number from 0")
    return switch_latency_s if lower_while_waiting else None


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
    return values if len(values) > 1 else values[0]


def parse_effort(text: str) -> Effort:
    """One of the efforts by name.

    Raises:
        ConfigError: there is none of that name.
    """
    for effort in get_args(Effort):
        if text == effort:
            return effort  # type: ignore[no-any-return]
    raise ConfigError(f"--effort: got {text!r}; allowed: {', '.join(get_args(Effort))}")
