"""A job's iterations as they were traced: what ran where, for how long, and in which schedule's order. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from perseus_plugin.errors import ConfigError, PerseusError
from perseus_plugin.iteration.graph import FloatArray, PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import Compute, StageStream, parts_of
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES

LEAST_IN_ORDER = 0.5
"""Share of the iterations that have to be in the order of a schedule for it to be the one that ran."""
_LEFT_OVER = (
    0.01  # share of the work that may have no place in the schedule, as a first stage's input gradient has none
)


@dataclass(frozen=True, slots=True)
class Ran:
    """An instruction as it ran.

    Attributes:
        kind: without the chunk, such as "forward".
        microbatch, chunk: 0-based.
        start_s: on a clock that all ranks of the iteration share, or else its rank's own.
        time_s: how long it took.
    """

    kind: str
    microbatch: int
    chunk: int
    start_s: float
    time_s: float

    @property
    def what(self) -> tuple[str, int, int]:
        """Which instruction of its stage."""
        return self.kind, self.microbatch, self.chunk


@dataclass(frozen=True, slots=True)
class GivenSchedule:
    """A schedule that is known beforehand.

    Attributes:
        name: for people.
        streams_of: its streams, given stages and microbatches.
        of_chunks: the same, and given the model chunks per stage; None: it says them itself.
    """

    name: str
    streams_of: Callable[[int, int], Sequence[StageStream]]
    of_chunks: Callable[[int, int, int], Sequence[StageStream]] | None = None

    def streams(self, stages: int, microbatches: int, chunks: int | None) -> Sequence[StageStream]:
        """Its streams; of as many model chunks per stage as it says or usually has, where they are None.

        Raises:
            ScheduleError: there is no such schedule.
        """
        if self.of_chunks is None or chunks is None:
            return self.streams_of(stages, microbatches)
        return self.of_chunks(stages, microbatches, chunks)


Iterations: TypeAlias = Mapping[tuple[int, int], Mapping[int, Sequence[Ran]]]
"""By step and replica, and then by stage, what ran."""


@dataclass(frozen=True)
class TracedJob:
    """Whole iterations of a job.

    Attributes:
        name: of the trace.
        schedule: name of the schedule that they ran.
        streams: of that schedule, one per stage.
        steps: the job's own numbers of the iterations.
        replicas: the job's own numbers of the pipelines.
        durations_s: shape (steps, replicas, nodes of the graph), as run.
        starts_s: the same, since the first start of the rank's iteration.
        times_s: shape (steps,), how long the whole iterations took, NaN where the trace does not say.
        in_order: share of (step, replica) that ran in the schedule's order.
        left_out: steps in which instructions are missing, or all of a replica take no time.
    """

    name: str
    schedule: str
    streams: Sequence[StageStream]
    steps: tuple[int, ...]
    replicas: tuple[int, ...]
    durations_s: FloatArray
    starts_s: FloatArray
    times_s: FloatArray
    in_order: float = 1.0
    left_out: tuple[int, ...] = ()

    @cached_property
    def graph(self) -> PipelineGraph:
        """In which transfers take no time."""
        return build_graph(self.streams)

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return len(self.streams)

    @property
    def microbatches(self) -> int:
        """Of an iteration."""
        return self.graph.microbatches

    @property
    def classes(self) -> dict[tuple[int, str], list[int]]:
        """The graph's nodes by stage and kind."""
        found: dict[tuple[int, str], list[int]] = {}
        for node, one in enumerate(self.graph.instructions):
            if one is not None:
                found.setdefault((one.stage, one.kind), []).append(node)
        return found


def traced_job(
    name: str,
    iterations: Iterations,
    times_s: Mapping[int, float],
    given: GivenSchedule | None = None,
    chunks: int | None = None,
) -> TracedJob:
    """Put what ran into the order of its schedule.

    Args:
        name: of the trace.
        iterations: what ran.
        times_s: how long iterations took as a whole, by step.
        given: the schedule; None: the textbook schedule that ran in this order.
        chunks: model chunks per stage that there have to be; None: as many as there are.

    Raises:
        ConfigError: no iteration is whole, they ran in the order of no known schedule, or the one that is given has no
            place for what ran.
    """
    if not iterations:
        raise ConfigError(f"{name}: got no iteration; allowed: a trace with at least one whole iteration")
    _check_numbers(name, iterations)
    orders = {place: _order(stages) for place, stages in iterations.items()}
    schedule, streams, in_order = _schedule_of(name, orders, given, chunks)
    graph = build_graph(streams)
    wanted = {_what(one.kind, one.microbatch, one.chunk, one.stage): node for one, node in graph.node_of.items()}
    replicas = sorted({replica for _, replica in iterations})
    if given is not None:
        _check_places(name, schedule, iterations, wanted)
    steps, left_out = [], []
    durations_s, starts_s = [], []
    idle: list[int] = []  # replicas whose instructions take no time
    seen_in = Counter(step for step, _ in iterations)
    for step in sorted(seen_in):
        if seen_in[step] < len(replicas):
            left_out.append(step)
            continue
        took, began = np.full((len(replicas), len(graph)), np.nan), np.zeros((len(replicas), len(graph)))
        for place, replica in enumerate(replicas):
            for stage, ran in iterations[step, replica].items():
                first_s = min((one.start_s for one in ran), default=0.0)
                for one in ran:
                    node = wanted.get((*one.what, stage))
                    if node is not None:
                        took[place, node], began[place, node] = one.time_s, one.start_s - first_s
        took[:, graph.is_constant] = 0.0
        if np.isnan(took).any():
            left_out.append(step)
            continue
        if not took.any(axis=1).all():
            idle.append(replicas[int(took.any(axis=1).argmin())])
            left_out.append(step)
            continue
        steps.append(step)
        durations_s.append(took)
        starts_s.append(began)
    if not steps and idle:
        raise ConfigError(
            f"{name}: got instructions that all take 0 s, of replica {idle[0]}; allowed: at least one iteration "
            "in which those of every replica take longer"
        )
    if not steps:
        raise ConfigError(
            f"{name}: got no iteration in which all {len(replicas)} replicas ran all {len(wanted)} instructions of "
            f"{schedule}; allowed: traces of all ranks of the same iterations"
        )
    return TracedJob(
        name=name,
        schedule=schedule,
        streams=streams,
        steps=tuple(steps),
        replicas=tuple(replicas),
        durations_s=np.array(durations_s),
        starts_s=np.array(starts_s),
        # Next to a large start a short time is lost in the float.
        times_s=np.array([times_s.get(step) or np.nan for step in steps]),
        in_order=in_order,
        left_out=tuple(left_out),
    )


def _check_numbers(name: str, iterations: Iterations) -> None:
    """Refuse numbers with holes: what they stand for is made, for as many of them as there are."""
    stages = {stage for of_stages in iterations.values() for stage in of_stages}
    ran = [one for of_stages in iterations.values() for of_stage in of_stages.values() for one in of_stage]
    for what, numbers in (
        ("stages", stages),
        ("microbatches", {one.microbatch for one in ran}),
        ("chunks", {one.chunk for one in ran}),
    ):
        if not numbers or max(numbers) >= len(numbers):
            raise ConfigError(
                f"{name}: got {len(numbers)} {what} up to number {max(numbers, default=0)}; allowed: all from 0"
            )


def _check_places(
    name: str, schedule: str, iterations: Iterations, wanted: Mapping[tuple[str, int, int, int], int]
) -> None:
    """Refuse a schedule in which a part of the work has no place: it would be missing from all that follows."""
    work_s, left_s = 0.0, 0.0
    left: dict[tuple[str, int, int, int], float] = {}
    for of_stages in iterations.values():
        for stage, ran in of_stages.items():
            for one in ran:
                work_s += one.time_s
                if (what := (*one.what, stage)) not in wanted:
                    left_s += one.time_s
                    left[what] = left.get(what, 0.0) + one.time_s
    if left_s > _LEFT_OVER * work_s:
        kind, microbatch, chunk, stage = max(left, key=lambda what: left[what])
        raise ConfigError(
            f"--schedule: got {schedule}, which has no {kind} of microbatch {microbatch} and chunk {chunk} in stage "
            f"{stage}; allowed: one with all instructions of {name} ({left_s / work_s:.0%} of their time has no place)"
        )


_Order: TypeAlias = tuple[tuple[tuple[str, int, int], ...], ...]
"""Per stage what it ran, in its order."""


def _order(stages: Mapping[int, Sequence[Ran]]) -> _Order:
    return tuple(tuple(one.what for one in sorted(stages[s], key=lambda one: one.start_s)) for s in sorted(stages))


def _what(kind: str, microbatch: int, chunk: int, stage: int) -> tuple[str, int, int, int]:
    """As the trace names it: an instruction's kind may carry its chunk."""
    parts = parts_of(kind)
    return parts[0][0] if len(parts) == 1 else kind, microbatch, chunk, stage


def _schedule_of(
    name: str,
    orders: Mapping[tuple[int, int], _Order],
    given: GivenSchedule | None,
    told_chunks: int | None,
) -> tuple[str, Sequence[StageStream], float]:
    """The schedule's name and streams, and the share of iterations in its order."""
    counts = Counter(orders.values())
    most = max(orders.values(), key=lambda order: (sum(map(len, order)), counts[order]))
    stages = len(most)
    microbatches = 1 + max((m for stage in most for _, m, _ in stage), default=0)
    chunks = 1 + max((chunk for stage in most for _, _, chunk in stage), default=0)
    if told_chunks is not None and told_chunks != chunks:
        raise ConfigError(f"--chunks: got {told_chunks}; allowed: {chunks}, as {name} has")
    if given is not None:
        streams = given.streams(stages, microbatches, chunks)
        computes = [op for stream in streams for op in stream if isinstance(op, Compute)]
        for what, has, runs in (
            ("stages", len(streams), stages),
            ("chunks", 1 + max((op.chunk for op in computes), default=0), chunks),
            ("microbatches", 1 + max((op.microbatch for op in computes), default=0), microbatches),
        ):
            if has != runs:
                got = f"{has} {what if has != 1 else what[:-1]}"
                raise ConfigError(f"--schedule: got {got}; allowed: the {runs} of {name}")
        # What is in the trace and no instruction of the schedule takes no time, as a first stage's input gradient.
        places = [
            {_what(op.kind, op.microbatch, op.chunk, 0)[:3] for op in stream if isinstance(op, Compute)}
            for stream in streams
        ]
        of_schedule: Counter[_Order] = Counter()
        for order, count in counts.items():
            kept = [tuple(what for what in ran if what in own) for ran, own in zip(order, places, strict=False)]
            of_schedule[tuple(kept)] += count
        return given.name, streams, _share_in(of_schedule, streams)
    best: tuple[float, str, Sequence[StageStream]] = (0.0, "", ())
    for schedule, streams_of in SCHEDULES.items():
        one = GivenSchedule(schedule, streams_of, OF_CHUNKS.get(schedule))
        try:
            streams = one.streams(stages, microbatches, chunks if chunks > 1 else None)
        except PerseusError:
            continue  # there is none of this size
        share = _share_in(counts, streams)
        if share > best[0]:
            best = share, schedule, streams
    if best[0] < LEAST_IN_ORDER:
        first = "; ".join(
            f"stage {s}: {', '.join(f'{kind} {m}' for kind, m, _ in stage[:6])}, ..." for s, stage in enumerate(most)
        )
        raise ConfigError(
            f"--schedule: missing; {name} has {stages} stages and {microbatches} microbatches in the order of no known "
            f"schedule ({first[:400]}); allowed: {', '.join(SCHEDULES)}, or a schedule file"
        )
    return best[1], best[2], best[0]


def _share_in(counts: Counter[_Order], streams: Sequence[StageStream]) -> float:
    order = tuple(
        tuple(_what(op.kind, op.microbatch, op.chunk, 0)[:3] for op in stream if isinstance(op, Compute))
        for stream in streams
    )
    return counts[order] / counts.total()
