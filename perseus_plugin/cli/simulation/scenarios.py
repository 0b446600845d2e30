"""The saving to expect in each of several scenarios; the planner's own figures, nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from perseus_plugin.errors import PerseusError, PlanError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.instructions import INPUT_SHARE, Compute, StageStream
from perseus_plugin.planning.graphed import Replays, replays
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.process import planner_for
from perseus_plugin.planning.request import PlanRequest
from perseus_plugin.planning.targets import ChangeLimits, Effort, Target, dwell_for
from perseus_plugin.planning.work import tell_cut_short
from perseus_plugin.profiling.derived import whole, with_rows_for
from perseus_plugin.profiling.profile import Profile


@dataclass(frozen=True)
class Pipeline:
    """One way to cut the model into stages, on one sort of GPU.

    Attributes:
        profile_for: the profile of whole stages, given the kinds of whole instructions that a schedule runs parts of.
        blocking_power_w: power of a GPU that waits, for all stages or one each.
        stages: of the pipeline.
        split: layers of each stage; None: as measured.
        gpu: its name; empty: that of the profile.
        chunks: model chunks per stage of which the profile's rows hold one.
        job: what its job has planned with, beside profile and schedule; None: nothing is known of one.
    """

    profile_for: Callable[[Collection[str]], Profile]
    blocking_power_w: float | Sequence[float]
    stages: int
    split: tuple[int, ...] | None = None
    gpu: str = ""
    chunks: int = 1
    job: PlanRequest | None = None


@dataclass(frozen=True)
class Workload:
    """A schedule and the numbers of microbatches to run it with.

    Attributes:
        name: for people.
        streams_for: (stages, microbatches) to streams; microbatches is None for a schedule that brings its own.
        microbatches: None alone for a schedule that brings its own.
    """

    name: str
    streams_for: Callable[[int, int | None], Sequence[StageStream]]
    microbatches: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Aim:
    """What is planned for.

    Attributes:
        slowdown: as a share.
        straggler: makes the iteration so many times as long in any case.
        power_budget_w: of one GPU per stage together.
        of_job: what a job aims at, where that is none of these.
    """

    slowdown: float | None = None
    straggler: float | None = None
    power_budget_w: float | None = None
    of_job: Target | None = None

    def target(self, full_clock_s: float) -> Target:
        """As the planner wants it.

        Raises:
            PlanError: a value out of range.
        """
        if self.of_job is not None:
            return self.of_job
        if self.straggler is not None:
            return Target.straggler(self.straggler * full_clock_s)
        if self.power_budget_w is not None:
            return Target.power_budget(self.power_budget_w)
        return Target.slowdown(self.slowdown or 0.0)

    def __str__(self) -> str:
        if self.of_job is not None:
            return f"{self.of_job.kind.replace('_', ' ')} of the job"
        if self.straggler is not None:
            return f"straggler {self.straggler:g}x"
        if self.power_budget_w is not None:
            return f"power budget {self.power_budget_w:g} W"
        return f"slowdown {100 * (self.slowdown or 0.0):g} %"


@dataclass(frozen=True, slots=True)
class Graph:
    """Of steps that are one CUDA graph.

    Attributes:
        jitter: see `planning.graphed.replays`.
        change_s: how long a clock change takes.
    """

    jitter: float
    change_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the plan of a scenario promises: `perseus plan` for the same input says the same.

    Energies are of one GPU per stage over an iteration, blocking included.

    Attributes:
        scale: what the profile's times and energies were multiplied by, for schedules of several chunks.
        deadline_s: iteration time that was allowed.
        full_clock_s, full_clock_j: every instruction at the highest clock.
        iteration_s, energy_j: under the plan.
        bound_j: no plan takes less.
        most_changes: clock changes per iteration in the stage that has most.
        left_alone_j: under the plan that is made if no wait gets a lower clock; None if none does.
        graphed: what comes of the plan in a step that is one CUDA graph; None: that was not asked for.
    """

    scale: float
    deadline_s: float
    full_clock_s: float
    full_clock_j: float
    iteration_s: float
    energy_j: float
    bound_j: float
    most_changes: int
    left_alone_j: float | None = None
    graphed: Replays | None = None

    @property
    def graph_saving(self) -> float | None:
        """Energy saved against full clocks in such a step, as a share."""
        return None if self.graphed is None else self.graphed.saving

    @property
    def graph_slowdown(self) -> float | None:
        """Time of such a step beyond that at full clocks, as a share."""
        return None if self.graphed is None else self.graphed.slowdown

    @property
    def saving(self) -> float:
        """Energy saved against full clocks, as a share."""
        return 1 - self.energy_j / self.full_clock_j

    @property
    def slowdown(self) -> float:
        """Iteration time beyond that at full clocks, as a share."""
        return self.iteration_s / self.full_clock_s - 1

    @property
    def gap(self) -> float:
        """How far the energy is above its lower bound, as a share of the bound."""
        return self.energy_j / self.bound_j - 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario: what was asked, and the figures or why there are none."""

    gpu: str
    stages: int
    split: tuple[int, ...] | None
    schedule: str
    microbatches: int | None
    aim: Aim
    figures: Figures | None
    error: str = ""


def simulate(
    pipelines: Sequence[Pipeline],
    schedules: Sequence[Workload],
    aims: Sequence[Aim],
    *,
    input_share: float = INPUT_SHARE,
    latency_s: float = 0.0,
    switch_latency_s: float | None = None,
    limits: ChangeLimits | None = None,
    dwell_latency_s: float | None = None,
    effort: Effort = "quick",
    graph: Graph | None = None,
) -> Iterator[Outcome]:
    """Plan every combination, one outcome after the other.

    A combination that cannot be planned (a schedule that needs a multiple of the stages, say) is an outcome too.

    Args:
        pipelines: to combine,
        schedules: with these,
        aims: and these.
        input_share: of a backward, the input's gradient, where a schedule splits what a profile does not.
        latency_s: how long a transfer takes.
        switch_latency_s: how long a clock change takes; None: waits get no lower clocks.
        limits: as for a plan.
        dwell_latency_s: how long a clock change takes, where the dwell follows from it; None: `limits` has it.
        effort: as for a plan.
        graph: steps are one CUDA graph, whose clocks change by host time; waits get no lower clocks then.
    """
    if graph is not None:
        switch_latency_s = None
    for pipeline in pipelines:
        for schedule in schedules:
            for microbatches in schedule.microbatches:
                planner_of = partial(_planner, pipeline, schedule, microbatches, input_share, latency_s)
                yield from _of_one(
                    pipeline,
                    schedule,
                    microbatches,
                    aims,
                    planner_of,
                    switch_latency_s,
                    limits or ChangeLimits(),
                    dwell_latency_s,
                    effort,
                    graph,
                )


def _of_one(
    pipeline: Pipeline,
    schedule: Workload,
    microbatches: int | None,
    aims: Sequence[Aim],
    planner_of: Callable[[float | None], tuple[Planner, float]],
    switch_latency_s: float | None,
    limits: ChangeLimits,
    dwell_latency_s: float | None,
    effort: Effort,
    graph: Graph | None,
) -> Iterator[Outcome]:
    planner: Planner | None = None
    leaves_alone: Planner | None = None
    why_not, scale, count = "", 1.0, microbatches
    try:
        planner, scale = planner_of(switch_latency_s)
        if switch_latency_s is not None and not planner.problem.waiting_costs.is_constant:
            leaves_alone, _ = planner_of(None)
        count = planner.problem.graph.microbatches
        if dwell_latency_s is not None:
            shortest_s = float(planner.problem.full_clock[:, 0].min())
            limits = replace(limits, min_dwell_s=dwell_for(shortest_s, dwell_latency_s))
    except PerseusError as error:
        why_not = str(error)
    for aim in aims:
        figures, reason = None, why_not
        if planner is not None:
            try:
                figures = _figures(planner, leaves_alone, scale, aim, limits, effort, graph)
            except PerseusError as error:
                reason = str(error)
        yield Outcome(pipeline.gpu, pipeline.stages, pipeline.split, schedule.name, count, aim, figures, reason)


def _planner(
    pipeline: Pipeline,
    schedule: Workload,
    microbatches: int | None,
    input_share: float,
    latency_s: float,
    switch_latency_s: float | None,
) -> tuple[Planner, float]:
    streams = schedule.streams_for(pipeline.stages, microbatches)
    computes = [op for stream in streams for op in stream if isinstance(op, Compute)]
    chunks = 1 + max((op.chunk for op in computes), default=0)
    scale = pipeline.chunks / chunks
    profile = with_rows_for(pipeline.profile_for({whole(op.kind) for op in computes}), streams, input_share)
    if pipeline.job is not None:
        watts = pipeline.blocking_power_w
        asked = replace(
            pipeline.job,
            schedule=schedule.name,
            streams=streams,
            profile=profile.scaled(scale),
            blocking_power_w=[watts] * pipeline.stages if isinstance(watts, (int, float)) else watts,
            full_clock_only=frozenset(one for one in pipeline.job.full_clock_only if one in profile.table),
            latency_s=switch_latency_s,
            lower_while_waiting=switch_latency_s is not None,
        )
        return planner_for(asked), scale
    planner = Planner(
        build_graph(streams, latency_s=latency_s),
        profile.scaled(scale),
        blocking_power_w=pipeline.blocking_power_w,
        schedule=schedule.name,
        switch_latency_s=switch_latency_s,
    )
    return planner, scale


def _figures(
    planner: Planner,
    leaves_alone: Planner | None,
    scale: float,
    aim: Aim,
    limits: ChangeLimits,
    effort: Effort,
    graph: Graph | None,
) -> Figures:
    target = aim.target(planner.problem.full_clock_time_s)
    plan = planner.plan(target, limits, effort)
    alone: Plan | None = None
    if plan.waits and leaves_alone is not None:
        with suppress(PlanError):  # it may take lower clocks in waits to keep a power budget
            alone = leaves_alone.plan(target, limits, effort)
    if plan.cut_short or (alone is not None and alone.cut_short):
        tell_cut_short()
    return Figures(
        scale=scale,
        deadline_s=plan.deadline_s,
        full_clock_s=plan.baseline_time_s,
        full_clock_j=plan.baseline_energy_j,
        iteration_s=plan.iteration_time_s,
        energy_j=plan.energy_j,
        bound_j=plan.energy_lower_bound_j,
        most_changes=max(plan.clock_changes(stage) for stage in range(len(plan.stages))),
        left_alone_j=None if alone is None else alone.energy_j,
        graphed=None if graph is None else replays(planner.problem, plan, graph.change_s, graph.jitter),
    )
