"""What travels through the exchange, checked on arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from perseus_plugin.errors import validation_problem
from perseus_plugin.exchange.client import ExchangeError
from perseus_plugin.exchange.store import ANNOUNCED
from perseus_plugin.files import encoded
from perseus_plugin.iteration.bounds import Clock, ClockOrFull, Count, Moment, Power, Ratio, Stage, Time

NEWS, TROUBLE, REUSE, CALIBRATION, SEATS, BATCHES = ANNOUNCED
RECHECKS = "recheck/"  # how their keys begin
STRAGGLERS = "stragglers"  # list that ranks append reports and detections to
TARGETS = "targets"  # list that ranks append to what the job is to aim at
WORKS = "works"  # list that ranks append to how much work batches are
_BATCHES_AT_ONCE = 4  # that have been planned and not run yet
_STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

Text = Annotated[str, BeforeValidator(lambda told: encoded(told).decode() if isinstance(told, str) else told)]
"""What the system or an error says; a path or a name in it need not be Unicode, which JSON is."""


class _Message(BaseModel):
    model_config = ConfigDict(**_STRICT, frozen=True)


class Placement(_Message):
    """Where a rank sits in the job.

    Attributes:
        rank, world_size: in the whole job.
        stage, stages: pipeline stage and how many there are.
        replica: which copy of the pipeline that runs at a pace of its own.
        shards: ranks that work together on one stage of one replica (tensor, context and expert parallel ones): they
            have the same stage and replica, and run in lock-step under the same plan.
        local_rank: on its machine.
        device: torch device, e.g. "cuda:0" or "cpu".
        leader: the rank that does what is called rank 0's; the same on all ranks.
    """

    rank: Count
    world_size: Annotated[Count, Field(ge=1)]
    stage: Stage
    stages: Annotated[Stage, Field(ge=1)]
    replica: Count
    shards: Annotated[Count, Field(ge=1)] = 1
    local_rank: Count
    device: str
    leader: Count = 0

    @property
    def leads(self) -> bool:
        """Whether this rank plans for all, writes the summary, publishes figures and takes reports."""
        return self.rank == self.leader

    @property
    def replicas(self) -> int:
        """How many replicas there are in the job."""
        return self.world_size // (self.stages * self.shards)


class Seat(_Message):
    """What a rank can tell of its place where only its own groups are known; all ranks' together make placements.

    Attributes:
        pipeline: first rank of its pipeline.
        stage, stages: where it sits in that.
        together: ranks that it works with in lock-step, itself among them.
    """

    pipeline: Count
    stage: Stage
    stages: Annotated[Stage, Field(ge=1)]
    together: tuple[Count, ...]


class Seats(_Message):
    """Those of all ranks, in their order."""

    seats: tuple[Seat, ...]


class RankEstimate(_Message):
    """What one rank measured in the sweep.

    Attributes:
        placement: who says so.
        gpu: name of its GPU.
        estimate: a `StageEstimate` as plain data.
        constant_time_s: time of each kind of constant-time work.
        switch_latency_s: 95 % of clock changes take no longer; None where that was not measured.
        power_limit_w: the most that its card may be set to draw; 0: not known.
    """

    placement: Placement
    gpu: Text
    estimate: dict[str, Any]
    constant_time_s: dict[str, Time]
    switch_latency_s: Time | None = None
    power_limit_w: Power = 0.0


class News(_Message):
    """An order to all ranks: what to do from which iteration on. The newest sequence number wins.

    Attributes:
        sequence: counts up from 1.
        switch: first iteration it holds for.
        action: follow the plans of `version`, run at full clocks, or profile again at `clocks_mhz`.
        version: of the set of plans, one per schedule, 0 for full clocks. A schedule without one runs at full clocks.
        variants: sets of the replicas that have one of their own; all others follow `version`.
        since: first iteration under plans that were made on the same measurements; reference iterations count from it.
        straggler: the plans are for the pace of a straggler.
        clocks_mhz: in the order to try them; a rank with another GPU takes the nearest it has.
        paired: they are tried by every other stage at a time, see `timetable.paired_clocks`; the first is the highest
            clock and not tried.
        reason: for people.
        recheck: ranks shall time their instructions at full clocks and publish that.
        limited: no iteration may run at full clocks, for no reference either.
        earlier: orders that had not begun to hold when this one was given, and do so before it.
    """

    sequence: Count
    switch: Count
    action: Literal["follow", "full", "sweep"]
    version: Count = 0
    variants: dict[int, Count] = {}
    since: Count = 0
    straggler: bool = False
    clocks_mhz: tuple[Clock, ...] = ()
    paired: bool = False
    reason: Text = ""
    recheck: bool = False
    limited: bool = False
    earlier: tuple[News, ...] = ()

    def version_for(self, replica: int) -> int:
        """The set of plans that this replica follows."""
        return self.variants.get(replica, self.version)


class RankFacts(_Message):
    """What a rank's part of the job is, for the profile's fingerprint."""

    stage: Stage
    facts: dict[str, Text]


class CatchUpPart(_Message):
    """When an instruction of a plan begins too late, and what it may be run at then.

    Attributes:
        latest_starts_s: per controllable instruction, since the iteration's begin, for a step of the usual size.
        usual_delays_s: how much later than the graph says each really begins, for what the graph does not know of.
        kinds: per controllable instruction.
        options: per kind (clock, time in s, watts above those of waiting), fastest first.
        size_weight: see `planning.replay.CatchUp`.
        dwell_s: shortest time from a rise to the return to the plan.
    """

    latest_starts_s: tuple[float, ...]
    usual_delays_s: tuple[float, ...]
    kinds: tuple[str, ...]
    options: dict[str, tuple[tuple[Clock, Time, float], ...]]
    size_weight: float
    dwell_s: float = 0.0


class Reuse(_Message):
    """What rank 0 has found in the output folder: whether a profile of this job, or why a sweep would be in vain."""

    profile: bool = False
    failed: Text = ""


class WaitPart(_Message):
    """A wait with a clock of its own.

    Attributes:
        after: the controllable instruction that it follows, by position; -1: it comes before the first.
        frequency_mhz: to wait at.
        duration_s: how long the wait is, by the plan.
        work_before_s, work_after_s: constant-time work between that instruction and the wait, and between the wait and
            the next instruction or the iteration's end.
    """

    after: int
    frequency_mhz: Clock
    duration_s: Time
    work_before_s: Time = 0.0
    work_after_s: Time = 0.0


class PhasesPart(_Message):
    """A stage's plan by time, for steps that are one CUDA graph.

    Attributes:
        clocks_mhz: of each phase: instructions of one clock, one after the other.
        starts_s: when each begins, since the iteration's begin.
        end_s: when the stage's last instruction ends.
        iteration_s: how long the iteration takes.
    """

    clocks_mhz: tuple[Clock, ...]
    starts_s: tuple[Time, ...]
    end_s: Time
    iteration_s: Time


class PlanPart(_Message):
    """One stage's part of a plan.

    Attributes:
        version: the plan's own number, from 1; the same in every set that it is in.
        schedule: key of the schedule it is for.
        clocks_mhz: per controllable instruction in program order.
        times_s: how long each takes at that clock.
        slowdown: how much longer than in the profile that is, as the stage is known to be slow.
        catch_up: what a rank that is late does; None: nothing.
        waits: in order; all others are spent at the clock of the instruction before.
        phases: the same by time, where steps are one CUDA graph.
    """

    version: int
    schedule: str
    clocks_mhz: tuple[Clock, ...]
    times_s: tuple[Time, ...]
    slowdown: float = 1.0
    catch_up: CatchUpPart | None = None
    waits: tuple[WaitPart, ...] = ()
    phases: PhasesPart | None = None

    @property
    def all_clocks_mhz(self) -> set[int]:
        """Every clock that a rank may be run at under it."""
        options = () if self.catch_up is None else self.catch_up.options.values()
        raised = {clock for rows in options for clock, *_ in rows}
        phases = () if self.phases is None else self.phases.clocks_mhz
        return {*self.clocks_mhz, *phases, *raised, *(wait.frequency_mhz for wait in self.waits)}

    def as_run(self, raised: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Clocks and times where some instructions ran faster than planned.

        Args:
            raised: (position, clock) of those.
        """
        clocks_mhz, times_s = list(self.clocks_mhz), list(self.times_s)
        if self.catch_up is None:
            return self.clocks_mhz, self.times_s
        for position, clock in raised:
            rows = self.catch_up.options[self.catch_up.kinds[position]]
            clocks_mhz[position] = clock
            times_s[position] = next((time_s for mhz, time_s, _ in rows if mhz == clock), times_s[position])
        return tuple(clocks_mhz), tuple(times_s)


class AnnouncedWork(_Message):
    """How much work each microbatch of a batch is, by any measure; see `perseus_plugin.announce`.

    Attributes:
        iteration: that runs the batch.
        replica: that does.
        work: one per microbatch.
    """

    iteration: Count
    replica: Count
    work: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]


class BatchPart(PlanPart):
    """One stage's part of one replica's plan for one iteration, in which every instruction takes what its work takes.

    Attributes:
        iteration: it is for.
        base: the set of plans that ranks follow around it; where they follow another one, it does not hold.
        pace_s: how long the iteration takes at full clocks, by the works of all replicas.
        usual_s: the same of a usual batch.
    """

    iteration: Count
    base: Count
    pace_s: Time
    usual_s: Time


class BatchNews(_Message):
    """The newest iterations that have plans of their own, rising; ranks fetch their parts."""

    iterations: tuple[Count, ...]


class IterationDurations(_Message):
    """How long the controllable instructions of one iteration took on one rank.

    Attributes:
        number: of the iteration.
        schedule: key of the schedule that ran.
        clocks_mhz: what they ran at: one clock for all of them or one each; 0: full clocks.
        durations_s: per controllable instruction in program order.
        starts_s: when each began, since the iteration's begin.
        time_s: of the whole iteration.
    """

    number: Count
    schedule: str
    clocks_mhz: tuple[ClockOrFull, ...]
    durations_s: tuple[Moment, ...]
    starts_s: tuple[Moment, ...]
    time_s: Moment


class RankDurations(_Message):
    """The last few complete, undisturbed iterations of a rank, oldest first."""

    placement: Placement
    iterations: tuple[IterationDurations, ...]


class PlanParts(_Message):
    """One stage's parts of a set of plans: those of all schedules that have one.

    Attributes:
        version: of the set, see `News`.
        parts: one per schedule.
    """

    version: int
    parts: tuple[PlanPart, ...]


class Recheck(_Message):
    """One rank's median instruction times at full clocks, by kind: after a plan was dropped, or to check a profile.

    `steps` is how many iterations they are from (0: unknown), `switch_latency_s` as in `RankEstimate`.
    """

    stage: Stage
    time_s: dict[str, Time]
    switch_latency_s: Time | None = None
    steps: Count = 0


class Seen(_Message):
    """One iteration in or beside a block of references, as one rank saw it.

    Attributes:
        iteration: number.
        reference: it ran at full clocks.
        schedule: key of the one that ran.
        time_s: of the iteration.
        spent_s, usual_s: what instructions that are at full clocks under the plan too took, and by the profile take.
        energy_j: of this rank's GPU, None: not known.
    """

    iteration: int
    reference: bool
    schedule: str
    time_s: float
    spent_s: float = 0.0
    usual_s: float = 0.0
    energy_j: float | None = None


class RankWindow(_Message):
    """A block of references and the iterations beside it.

    Attributes:
        since: see `News`.
        block: its number from there on.
        seen: as far as the clock was as it should be.
    """

    since: int
    block: int
    seen: tuple[Seen, ...]


class RankWindows(_Message):
    """The newest windows of one rank, and the replica it belongs to."""

    replica: int
    windows: tuple[RankWindow, ...]


class PaceOf(_Message):
    """By iteration, how many times as long as in the profile the instructions of a stage of a replica took.

    `rough` are iterations in which the clock changed with nearly every instruction: instructions then take a few per
    cent less, or more, than their clock says, always in the same way under one plan.
    """

    pace: dict[int, Ratio]
    rough: tuple[int, ...] = ()


class Trouble(_Message):
    """A rank cannot control its GPU (any more); rank 0 then sends all ranks to full clocks."""

    rank: int
    reason: Text


@dataclass(slots=True)
class Totals:
    """Sums over iterations of one sort on one rank, which are counted up in place.

    Attributes:
        iterations: how many there were.
        time_s: of all of them.
        energy_j: of those whose energy is known; None where nothing measures it.
        unread: how many have an energy that is not known, as a reading could not be believed.
        held_s: how long the power limit held the GPU in them, of the `told_s` seconds for which the GPU tells.
    """

    iterations: int = 0
    time_s: float = 0.0
    energy_j: float | None = None
    unread: int = 0
    held_s: float = 0.0
    told_s: float = 0.0

    __pydantic_config__ = _STRICT

    @property
    def mean_energy_j(self) -> float | None:
        """Energy of an iteration, None where it is not known; a sum of nothing is none."""
        read = self.iterations - self.unread
        return self.energy_j / read if self.energy_j and read > 0 else None


class CaughtUp(_Message):
    """How a rank has caught up, over the iterations under plans that say how to.

    Attributes:
        iterations, instructions: how many there were.
        late_iterations, raised: of those, how many had or were instructions that ran faster than planned, being late.
        extra_energy_j: what that took beyond the plan's clocks, by the profile.
    """

    iterations: int = 0
    instructions: int = 0
    late_iterations: int = 0
    raised: int = 0
    extra_energy_j: float = 0.0


class Waited(_Message):
    """How a rank has waited, over undisturbed iterations under plans whose waits have clocks of their own.

    Attributes:
        iterations, planned: how many there were, and how many such waits.
        lowered, woken_early: of those, how many were spent at the wait's clock, and ended before it was back.
    """

    iterations: int = 0
    planned: int = 0
    lowered: int = 0
    woken_early: int = 0


class RankStats(_Message):
    """One rank's running account.

    Attributes:
        totals: by sort of iteration ("full_clock", "profiling", "plan", "reference").
        overhead_s: time spent in our hooks on the training thread, over `hooked_iterations` iterations.
        overran: emulated instructions for which the CPU was too slow, of `instructions`.
        requests: clock changes that reached the driver.
        deviations: times the GPU was seen to run at another clock than asked for.
        late: iterations that began before their order had arrived.
        switch_latency_s: median and 95 % of how long a clock change takes; None where that was not measured.
        caught_up: how it has caught up with plans.
        waited: at which clocks it has waited.
        plan_since: first iteration of those that the total of "plan" is of; None before the first.
        final: nothing follows.
    """

    placement: Placement
    totals: dict[str, Totals]
    overhead_s: float = 0.0
    hooked_iterations: int = 0
    overran: int = 0
    instructions: int = 0
    requests: int = 0
    deviations: int = 0
    late: int = 0
    switch_latency_s: tuple[float, float] | None = None
    caught_up: CaughtUp = CaughtUp()
    waited: Waited = Waited()
    plan_since: Count | None = None
    final: bool = False


class Figures(_Message):
    """Figures by name, for a framework's monitor.

    Attributes:
        count: of all batches so far.
        batches: the last ones, oldest first.
    """

    count: int
    batches: tuple[tuple[tuple[str, float], ...], ...]


def facts_key(rank: int) -> str:
    """Under which a rank tells its `RankFacts`."""
    return f"facts/{rank}"


def seat_key(rank: int) -> str:
    """Under which a rank tells its `Seat`."""
    return f"{SEATS}/{rank}"


def estimate_key(round_number: int, rank: int | None = None) -> str:
    """Under which a rank tells its `RankEstimate` after a round of the sweep; None: how those of all begin."""
    return f"estimate/{round_number}/{'' if rank is None else rank}"


def part_key(version: int, stage: int) -> str:
    """Where rank 0 publishes a stage's `PlanParts`."""
    return f"plan/{version}/{stage}"


def batch_key(iteration: int, replica: int, stage: int) -> str:
    """Where rank 0 publishes a `BatchPart`, packed; a later iteration's takes its place."""
    return f"batch/{iteration % _BATCHES_AT_ONCE}/{replica}/{stage}"


def recheck_key(sequence: int, rank: int) -> str:
    """Under which a rank tells the `Recheck` that news of this sequence number asked for."""
    return f"{RECHECKS}{sequence}/{rank}"


def durations_key(rank: int) -> str:
    """Where a rank publishes its `RankDurations`."""
    return f"durations/{rank}"


def windows_key(rank: int) -> str:
    """Under which a rank tells its `RankWindows`."""
    return f"windows/{rank}"


def pace_key(replica: int, stage: int) -> str:
    """Where a stage of a replica publishes its `PaceOf`; its shards run in lock-step, so any of them may."""
    return f"pace/{replica}/{stage}"


def stats_key(rank: int) -> str:
    """Under which a rank tells its `RankStats`."""
    return f"stats/{rank}"


MessageT = TypeVar("MessageT", bound=_Message)


def receive(message_class: type[MessageT], value: Any) -> MessageT:
    """Check what was fetched.

    Raises:
        ExchangeError: it is no such message.
    """
    try:
        return message_class.model_validate(value)
    except ValidationError as error:
        problem = validation_problem(error, message_class)
        raise ExchangeError(f"{message_class.__name__} from the job's store: {problem}") from error
