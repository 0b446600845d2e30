"""Small valid things that tests of several modules need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perseus_plugin.config import PerseusConfig
from perseus_plugin.control.selection import Selection
from perseus_plugin.exchange.messages import Placement, RankEstimate
from perseus_plugin.exchange.store import Exchange, LocalExchange
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.leader.job import Job
from perseus_plugin.profiling.known import Known
from perseus_plugin.profiling.observations import InstructionEstimate, StageEstimate
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.session.lifetime import Lifetime
from perseus_plugin.session.link import Link
from perseus_plugin.session.session import Session

CLOCKS_MHZ = (1410, 1110, 810)
BLOCKING_W = 80.0
FULL_CLOCK_S: Mapping[str, float] = {
    "forward": 0.010,
    "backward": 0.020,
    "input_backward": 0.012,
    "weight_backward": 0.008,
}


def placement(rank: int = 0, world_size: int = 2, stages: int = 2) -> Placement:
    """Rank r is stage r of the first pipeline, then of the next."""
    return Placement(
        rank=rank,
        world_size=world_size,
        stage=rank % stages,
        stages=stages,
        replica=rank // stages,
        local_rank=rank,
        device="cpu",
    )


def time_s(kind: str, clock_mhz: int, stage: int = 0) -> float:
    """Time of an instruction: half of it scales with the clock; later stages take longer."""
    return FULL_CLOCK_S[kind] * (1 + 0.3 * stage) * (0.5 + 0.5 * CLOCKS_MHZ[0] / clock_mhz)


def energy_j(kind: str, clock_mhz: int, stage: int = 0) -> float:
    """Energy of an instruction: 400 W at the top clock, falling with its square."""
    watts = 100 + 300 * (clock_mhz / CLOCKS_MHZ[0]) ** 2
    return watts * time_s(kind, clock_mhz, stage)


def profile(stages: int = 2, kinds: Sequence[str] = ("forward", "backward")) -> Profile:
    """A profile on which slowing down pays."""
    return Profile.from_rows(
        (stage, kind, Measurement(clock, time_s(kind, clock, stage), energy_j(kind, clock, stage)))
        for stage in range(stages)
        for kind in kinds
        for clock in CLOCKS_MHZ
    )


def stage_estimate(stage: int = 0, scale: float = 1.0, unresolved: frozenset[str] = frozenset()) -> StageEstimate:
    """What measuring `profile` exactly would give."""
    return StageEstimate(
        tuple(
            InstructionEstimate(
                kind,
                clock,
                scale * time_s(kind, clock, stage),
                1e-6,
                scale * energy_j(kind, clock, stage),
                1e-4,
                samples=20,
            )
            for kind in ("backward", "forward")
            for clock in CLOCKS_MHZ
        ),
        BLOCKING_W,
        0.1,
        window_s=0.02,
        lag_s=0.0,
        unresolved=unresolved,
    )


def rank_estimate(
    rank: int,
    world_size: int = 2,
    stages: int = 2,
    constants: Mapping[str, float] | None = None,
    scale: float = 1.0,
    switch_latency_s: float | None = None,
) -> RankEstimate:
    """What a rank publishes after the sweep."""
    where = placement(rank, world_size, stages)
    return RankEstimate(
        placement=where,
        gpu="test GPU",
        estimate=stage_estimate(where.stage, scale).to_dict(),
        constant_time_s=dict(constants or {}),
        switch_latency_s=switch_latency_s,
    )


def stream_of(stages: int, microbatches: int) -> Callable[[int], Sequence[StreamOp]]:
    """1F1B's streams by stage."""
    streams = one_f_one_b(stages, microbatches)
    return lambda stage: streams[stage]


OPERATIONS: tuple[Compute | Constant, ...] = (
    Constant("load_microbatch"),
    Compute("forward", 0),
    Compute("backward", 0),
    Constant("optimizer_step", collective=True),
)


def record(
    number: int,
    *,
    begin_s: float = 0.0,
    durations_s: Sequence[float] = (0.001, 0.010, 0.020, 0.005),
    operations: Sequence[Compute | Constant] = OPERATIONS,
    schedule: str = "1F1B",
    gap_s: float = 0.0,
    undisturbed: bool = True,
) -> IterationRecord:
    """A complete record whose operations follow each other, each after a wait of `gap_s`."""
    operations, slots = hooked_operations(operations)
    made = IterationRecord(number, schedule, operations, slots, undisturbed, begin_s)
    now_s = begin_s
    for duration_s in durations_s:
        now_s += gap_s
        made.starts_s.append(now_s)
        now_s += duration_s
        made.ends_s.append(now_s)
    made.end_s = now_s
    return made


def job_of(
    config: PerseusConfig,
    exchange: Exchange,
    folder: Path,
    timetable: Timetable,
    *,
    rank: int = 0,
    world_size: int = 2,
    shards: int = 1,
    survey: Survey | None = None,
    selection: Selection | None = None,
    has_profile: bool = False,
) -> Job:
    """What a session is about: two stages on GPUs that can be set to 1410 or 810 MHz."""
    return Job(
        config=config,
        placement=placement(rank, world_size).model_copy(update={"shards": shards}),
        exchange=exchange,
        output_dir=folder,
        selection=selection or Selection("nvml", "nvml:GPU-0", "test GPU", (1410, 810), poll_interval_s=0.005),
        known=Known(has_profile or survey is not None, survey),
        timetable=timetable,
    )


def session_of(link: Link | None = None, helper: Any = None, where: Placement | None = None, **more: Any) -> Session:
    """A session without a worker, of a job that is never planned for."""
    link = link or Link(Timetable(Round(1, ()), 1, 2))
    lifetime = Lifetime(helper)
    lifetime.on_end(link.ended)
    more.setdefault("exchange", LocalExchange())
    return Session(where or placement(), lifetime=lifetime, link=link, helper=helper, **more)
