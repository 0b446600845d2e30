"""What plans would have been worth in a traced job: the energy it wasted, and plans replayed over its durations.

The trace holds times. Power, and what a clock does to time and power, come from a GPU of the catalogue or from a
profile. Energies are of one GPU per stage and replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from perseus_plugin.cli.simulation.traces.findings import FAULTY, LASTING, Explained, faulty_replicas, stage_paces
from perseus_plugin.cli.simulation.traces.traced import TracedJob
from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph
from perseus_plugin.iteration.instructions import Compute, StageStream, StreamOp
from perseus_plugin.iteration.replayed import Samples, StageCatchUp
from perseus_plugin.planning.options import build_problem
from perseus_plugin.planning.pace import slowed
from perseus_plugin.planning.paced import Slowdowns
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.process import answer_to, graph_for
from perseus_plugin.planning.replay import CatchUp, Outcome, by_node, clocks_of, finishes
from perseus_plugin.planning.request import PaceRequest, PlanAnswer, PlanRequest
from perseus_plugin.planning.robust import error_of_mean, replay_of, saving_of
from perseus_plugin.planning.targets import ChangeLimits, Effort, Target
from perseus_plugin.profiling.profile import Profile

_PLANNED_ON = 12
"""Steps that a plan is made from, as many as a running job keeps."""
_SAMPLED = 16  # iterations of single pipelines that are planned one by one
_SAMPLED_INSTRUCTIONS = 6000  # fewer of them where they have many instructions
_ALL_REPLICAS = 8
_SHORTEST_S = 1e-6  # of an instruction, as a profile has it

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and where that of many more such iterations would be, to 95 %."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: FloatArray) -> Estimate:
        """From one value per iteration."""
        mean, error = float(np.mean(values)), error_of_mean(values)
        return cls(mean, mean - error, mean + error)


@dataclass(frozen=True, slots=True)
class Bloat:
    """Energy that did nothing for the pace: what plans for each iteration's own durations, known before, do without.

    Attributes:
        iterations: of single pipelines that were looked at.
        full_j: energy of a pipeline's iteration at full clocks, waiting for the slowest replica included.
        intrinsic_j: what a plan saves within the pipeline's own time, as stages are not balanced.
        extrinsic_j: what is saved beside that if it runs until the slowest replica of the step is done.
        intrinsic, extrinsic: the same as shares of `full_j`.
    """

    iterations: int
    full_j: Estimate
    intrinsic_j: Estimate
    extrinsic_j: Estimate
    intrinsic: Estimate
    extrinsic: Estimate


@dataclass(frozen=True)
class Ride:
    """A plan, replayed over the traced durations.

    Attributes:
        name: "static", or "straggler-aware".
        time_ratio: time of all replayed steps against full clocks.
        worst_ratio: the same of the step that it lengthens most.
        saving: share of the energy.
        full_j, energy_j: of a step of all replicas, at full clocks and under the plan.
        margin: of the plan, as the planner has chosen it; None: it chooses none.
        raised: share of the instructions that caught up.
        obstacle: why the plan is full clocks, where it is.
        clocks_mhz: per replica and stage.
    """

    name: str
    time_ratio: float
    worst_ratio: float
    saving: Estimate
    full_j: float
    energy_j: float
    margin: float | None
    raised: float
    obstacle: str
    clocks_mhz: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Worth:
    """All of it.

    Attributes:
        planned_on, replayed_over: the job's numbers of these steps; the same ones where there are too few.
        left_out: replicas with a fault of their own, from which no plan is made.
        bloat: see `Bloat`.
        rides: the plans.
    """

    planned_on: tuple[int, ...]
    replayed_over: tuple[int, ...]
    left_out: tuple[int, ...]
    bloat: Bloat
    rides: tuple[Ride, ...]


@dataclass(frozen=True)
class Asked:
    """What plans are made with.

    Attributes:
        power_w: of a GPU that waits, per stage, where the profile does not say.
        slowdown: allowed, as a share.
        latency_s: how long a clock change takes.
        lower_while_waiting: whether waits may get lower clocks.
        effort, limits: as for a plan.
    """

    power_w: tuple[float, ...]
    slowdown: float = 0.0
    latency_s: float = 0.01
    lower_while_waiting: bool = True
    effort: Effort = "quick"
    limits: ChangeLimits = field(default_factory=ChangeLimits)


def mean_times_s(job: TracedJob) -> dict[tuple[int, str], float]:
    """By stage and kind, over the replicas that have no fault of their own."""
    healthy = job.durations_s[:, _healthy(job)]
    return {key: max(float(healthy[:, :, nodes].mean()), _SHORTEST_S) for key, nodes in sorted(job.classes.items())}


def profile_from(profile: Profile, times_s: Mapping[tuple[int, str], float], source: str) -> Profile:
    """A profile's curves over the clock, for instructions that take so long at its highest clock.

    Raises:
        ConfigError: it has no rows for one of them.
    """
    missing = [key for key in times_s if key not in profile.table]
    if missing:
        stage, kind = missing[0]
        raise ConfigError(f"--profile: {source} has no row for {kind!r} in stage {stage}; allowed: a profile with it")
    table = {key: profile.table[key] for key in times_s}
    return Profile(table).scaled({key: times_s[key] / rows[0].time_s for key, rows in table.items()})


def worth(job: TracedJob, explains: Explained, profile: Profile, asked: Asked) -> Worth:
    """Price the job and replay plans over it.

    Args:
        job: as traced.
        explains: what its iterations take beside instructions.
        profile: of its instructions, see `mean_times_s`.
        asked: see there.

    Raises:
        PerseusError: there is no such plan.
    """
    count = len(job.steps)
    enough = count >= 4
    most = min(_PLANNED_ON, count // 2 if enough else count)
    planned_on: Indices = np.unique(np.linspace(0, count - 1, most).astype(np.int64))
    others: Indices = np.setdiff1d(np.arange(count), planned_on) if enough else planned_on
    request = PlanRequest(
        job.schedule,
        job.streams,
        {},
        profile,
        asked.power_w,
        target=Target.slowdown(asked.slowdown),
        margin=0.01,
        effort=asked.effort,
        max_changes=asked.limits.max_changes,
        min_dwell_s=asked.limits.min_dwell_s,
        samples=_samples(job, planned_on, np.flatnonzero(_healthy(job))),
        catch_up=True,
        latency_s=asked.latency_s,
        lower_while_waiting=asked.lower_while_waiting,
        overheads=explains.overheads,
    )
    answer = answer_to(request)
    rides = [_static(job, request, answer, others)]
    variants = _variants(job, planned_on)
    if max(map(max, variants)) > 1:
        rides.append(_aware(job, request, answer, variants, others))
    return Worth(
        planned_on=tuple(job.steps[i] for i in planned_on.tolist()),
        replayed_over=tuple(job.steps[i] for i in others.tolist()),
        left_out=tuple(one for one, healthy in zip(job.replicas, _healthy(job), strict=True) if not healthy),
        bloat=_bloat(job, request),
        rides=tuple(rides),
    )


def clocked(
    job: TracedJob, ride: Ride | None, request_profile: Profile, step: int, replica: int
) -> tuple[FloatArray, IntArray]:
    """Durations of one iteration, and the clocks of its nodes (0: full clocks), under a plan; None: as traced."""
    durations_s = job.durations_s[step, replica]
    clocks = np.zeros(len(job.graph), dtype=np.int64)
    if ride is None:
        return durations_s, clocks
    for of_stage, mhz in zip(job.graph.stage_nodes, ride.clocks_mhz[replica], strict=True):
        clocks[of_stage[~job.graph.is_constant[of_stage]]] = mhz
    ratio = np.ones(len(job.graph))
    for key, nodes in job.classes.items():
        rows = request_profile.table[key]
        times_s = {row.frequency_mhz: row.time_s for row in rows}
        ratio[np.array(nodes)] = [times_s[mhz] / rows[0].time_s for mhz in clocks[nodes].tolist()]
    return durations_s * ratio, clocks


def _healthy(job: TracedJob) -> npt.NDArray[np.bool_]:
    return ~faulty_replicas(job)


def _samples(job: TracedJob, steps: Indices, replicas: Indices) -> Samples:
    own = [nodes[~job.graph.is_constant[nodes]] for nodes in job.graph.stage_nodes]
    return Samples(
        tuple(
            tuple(tuple(tuple(job.durations_s[i, j, nodes].tolist()) for nodes in own) for j in replicas.tolist())
            for i in steps.tolist()
        )
    )


def _ran(
    job: TracedJob,
    request: PlanRequest,
    steps: Indices,
    replicas: Indices,
    plan: Plan,
    catch_up: Sequence[StageCatchUp],
    slowdowns: Slowdowns | None = None,
) -> tuple[Outcome, Outcome]:
    """Some replicas' steps under a plan, and at full clocks."""
    profile = request.profile if slowdowns is None else slowed(request.profile, slowdowns)
    problem = build_problem(graph_for(request), profile, request.blocking_power_w)
    latency_s = request.latency_s or 0.0
    replay = replay_of(problem, _samples(job, steps, replicas), latency_s)
    rule = None
    if catch_up:
        latest = by_node(problem.graph, [stage.latest_starts_s for stage in catch_up])
        rule = CatchUp(latest, latency_s, catch_up[0].size_weight)
    return replay.under(clocks_of(plan, problem.graph), rule, plan.wait_clocks_mhz), replay.at_full_clocks


def _static(job: TracedJob, request: PlanRequest, answer: PlanAnswer, steps: Indices) -> Ride:
    """One plan for all replicas."""
    assert answer.plan is not None  # nothing is in force that could stay
    assert answer.replayed is not None  # there were samples
    ran, full = _ran(job, request, steps, np.arange(len(job.replicas)), answer.plan, answer.catch_up)
    clocks = tuple(tuple(answer.plan.clocks_mhz(stage)) for stage in range(job.stages))
    return _ride("static", ran, full, answer.replayed.margin, answer.replayed.obstacle, (clocks,) * len(job.replicas))


def _variants(job: TracedJob, steps: Indices) -> list[Slowdowns]:
    """By replica, how many times as long as in the median replica the work of each stage takes, where that lasts."""
    if len(job.replicas) == 1:
        return [(1.0,) * job.stages]
    paces = stage_paces(job)[steps]
    lasts = (paces > FAULTY).mean(axis=0) >= LASTING
    slowdowns = np.where(lasts, np.median(paces, axis=0), 1.0)
    return [tuple(of_replica) for of_replica in slowdowns.tolist()]


def _aware(
    job: TracedJob, request: PlanRequest, answer: PlanAnswer, variants: Sequence[Slowdowns], steps: Indices
) -> Ride:
    """A plan for each sort of pipeline, at the pace of the slowest."""
    assert answer.plan is not None  # as in `_static`
    static = answer.plan
    sorts = sorted(set(variants))
    clocks = tuple(tuple(static.clocks_mhz(stage)) for stage in range(job.stages))
    paced = answer_to(replace(request, samples=None, pace=PaceRequest(tuple(sorts), clocks)))
    assert paced.pace is not None  # what was asked for
    ran: list[Outcome] = []
    fulls: list[Outcome] = []
    sizes: list[int] = []
    clocks_of_replica = [clocks] * len(job.replicas)
    for place, sort in enumerate(sorts):
        of_sort = np.flatnonzero([variant == sort for variant in variants])
        plan, catch_up = paced.pace.variants[place].plan, paced.paced_catch_up[place]
        if plan is None:
            plan, catch_up = static, answer.catch_up
        outcome, full = _ran(job, request, steps, of_sort, plan, catch_up, sort)
        ran.append(outcome)
        fulls.append(full)
        sizes.append(len(of_sort))
        for replica in of_sort.tolist():
            clocks_of_replica[replica] = tuple(tuple(plan.clocks_mhz(stage)) for stage in range(job.stages))
    waiting_w = sum(_waiting_w(request))
    return _ride(
        "straggler-aware",
        _together(ran, sizes, waiting_w),
        _together(fulls, sizes, waiting_w),
        None,
        "",
        tuple(clocks_of_replica),
    )


def _waiting_w(request: PlanRequest) -> list[float]:
    """Power of each stage's GPU that waits at full clocks."""
    return [
        request.profile.waiting_power(stage, request.blocking_power_w[stage]).at_w(
            max(rows[0].frequency_mhz for (its_stage, _), rows in request.profile.table.items() if its_stage == stage)
        )
        for stage in range(len(request.streams))
    ]


def _together(outcomes: Sequence[Outcome], sizes: Sequence[int], waiting_w: float) -> Outcome:
    """Groups of replicas that wait for each other, at full clocks."""
    time_s = np.max([one.time_s for one in outcomes], axis=0)
    energy_j = np.zeros_like(time_s)
    for one, size in zip(outcomes, sizes, strict=True):
        energy_j += one.energy_j + waiting_w * size * (time_s - one.time_s)
    raised = sum(one.raised * size for one, size in zip(outcomes, sizes, strict=True)) / sum(sizes)
    return Outcome(time_s, energy_j, raised)


def _ride(
    name: str,
    ran: Outcome,
    full: Outcome,
    margin: float | None,
    obstacle: str,
    clocks_mhz: tuple[tuple[tuple[int, ...], ...], ...],
) -> Ride:
    return Ride(
        name=name,
        time_ratio=float(ran.time_s.sum() / full.time_s.sum()),
        worst_ratio=float((ran.time_s / full.time_s).max()),
        saving=Estimate(*saving_of(ran, full)),
        full_j=float(full.energy_j.mean()),
        energy_j=float(ran.energy_j.mean()),
        margin=margin,
        raised=ran.raised,
        obstacle=obstacle,
        clocks_mhz=clocks_mhz,
    )


def _bloat(job: TracedJob, request: PlanRequest) -> Bloat:
    """Plan single iterations of single pipelines, each for its own durations, spread evenly over the trace."""
    steps, replicas, nodes = job.durations_s.shape
    graph = graph_for(request)
    full_s = finishes(graph, _on(graph, job).T).max(axis=0).reshape(steps, replicas)
    count = max(4, min(_SAMPLED, _SAMPLED_INSTRUCTIONS // nodes))
    # Few replicas are all there are; of many, and of the steps, those that are looked at stand for the others.
    together = replicas if replicas <= _ALL_REPLICAS else 1
    places = np.unique(np.linspace(0, steps * replicas // together - 1, max(3, count // together)).astype(int))
    per_place: list[FloatArray] = []
    for first in (together * places).tolist():
        pipelines = [divmod(pipeline, replicas) for pipeline in range(first, first + together)]
        per_place.append(
            np.mean([_wasted_j(_planner_of_one(job, request, *one), full_s[one[0]].max()) for one in pipelines], axis=0)
        )
    full_j, intrinsic_j, extrinsic_j = np.array(per_place).T
    return Bloat(
        len(places) * together,
        *map(Estimate.of, (full_j, intrinsic_j, extrinsic_j, intrinsic_j / full_j, extrinsic_j / full_j)),
    )


def _wasted_j(planner: Planner, slowest_s: float) -> tuple[float, float, float]:
    """Of one iteration: energy at full clocks until the slowest replica is done, intrinsic and extrinsic bloat."""
    until_s = max(float(slowest_s), planner.problem.full_clock_time_s)
    own = planner.plan(Target.slowdown(0.0))
    full_j = planner.problem.full_clock_energy_until_j(until_s)
    intrinsic_j = own.baseline_energy_j - own.energy_j
    return full_j, intrinsic_j, full_j - planner.plan(Target.straggler(until_s)).energy_j - intrinsic_j


def _on(graph: PipelineGraph, job: TracedJob) -> FloatArray:
    """The traced durations by node of another graph of the same schedule, shape (steps times replicas, nodes)."""
    durations_s = np.tile(graph.constant_s, (job.durations_s.shape[0] * job.durations_s.shape[1], 1))
    traced = job.durations_s.reshape(len(durations_s), -1)
    for own, other in zip(job.graph.stage_nodes, graph.stage_nodes, strict=True):
        durations_s[:, other[~graph.is_constant[other]]] = traced[:, own[~job.graph.is_constant[own]]]
    return durations_s


def _planner_of_one(job: TracedJob, request: PlanRequest, step: int, replica: int) -> Planner:
    """A planner that knows how long every single instruction takes: each is of a kind of its own."""
    streams: list[StageStream] = []
    table = {}
    for stage, stream in enumerate(request.streams):
        nodes = [node for node in job.graph.stage_nodes[stage].tolist() if not job.graph.is_constant[node]]
        took_s = iter(job.durations_s[step, replica, nodes].tolist())
        named: list[StreamOp] = []
        for op in stream:
            if not isinstance(op, Compute):
                named.append(op)
                continue
            # A kind need not carry its chunk, and a microbatch has one instruction of it in each.
            own = Compute(f"{op.kind} {op.microbatch} {op.chunk}", op.microbatch, op.chunk)
            rows = request.profile.table[stage, op.kind]
            factor = max(next(took_s), _SHORTEST_S) / rows[0].time_s
            table[stage, own.kind] = tuple(row.scaled(factor) for row in rows)
            named.append(own)
        streams.append(named)
    latency_s = request.latency_s if request.lower_while_waiting else None
    return Planner(
        graph_for(replace(request, streams=streams)),
        Profile(table),
        blocking_power_w=request.blocking_power_w,
        schedule=request.schedule,
        switch_latency_s=latency_s,
    )
