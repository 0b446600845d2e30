"""A pipeline iteration as rows of blocks, one per stage: as full clocks would run it, as planned, as it ran. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph
from perseus_plugin.iteration.instructions import Instruction
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.reporting.record.samples import Sample

_SHORTEST_WAIT_S = 1e-5


@dataclass(frozen=True, slots=True)
class Block:
    """One instruction.

    Attributes:
        instruction: which.
        start_s, finish_s: from the first instruction's start.
        clock_mhz: it runs, or was to run, at; 0: not known.
        energy_j: by the profile at that clock, NaN: not known.
        critical: on the critical path.
    """

    instruction: Instruction
    start_s: float
    finish_s: float
    clock_mhz: int
    energy_j: float = math.nan
    critical: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """A time in which the GPU of a stage waits at one clock.

    Attributes:
        stage: which.
        start_s, finish_s: from the first instruction's start.
        clock_mhz: it waits at; 0: not known.
        own: whether that clock was asked for during the wait; else it is the higher one of the instructions beside it,
            full clocks before the first and after the last.
        energy_j: by the profile at that clock, NaN: not known.
        saved_j: what it would take more at the clocks beside it, NaN: not known.
    """

    stage: int
    start_s: float
    finish_s: float
    clock_mhz: int = 0
    own: bool = False
    energy_j: float = math.nan
    saved_j: float = math.nan


@dataclass(frozen=True)
class Lanes:
    """An iteration.

    Attributes:
        title: for people.
        rows: per stage its blocks by rising start.
        waits: where stages wait, by rising time in each stage, from the beginning to the last block's end.
    """

    title: str
    rows: tuple[tuple[Block, ...], ...]
    waits: tuple[Wait, ...] = ()

    @property
    def end_s(self) -> float:
        """When the last block ends."""
        return max((block.finish_s for row in self.rows for block in row), default=0.0)

    @property
    def blocks(self) -> list[Block]:
        """All of them."""
        return [block for row in self.rows for block in row]

    @property
    def waiting_s(self) -> float:
        """Time that stages spend between and around blocks, all stages together."""
        busy_s = math.fsum(block.finish_s - block.start_s for block in self.blocks)
        return len(self.rows) * self.end_s - busy_s

    @property
    def waiting_j(self) -> float:
        """What that takes by the profile, NaN: not known."""
        return math.fsum(wait.energy_j for wait in self.waits)


def planned_lanes(
    title: str, plan: Plan, profile: Profile | None, graph: PipelineGraph | None, blocking_power_w: float = math.nan
) -> Lanes:
    """The plan as predicted.

    Args:
        title: for people.
        plan: what is drawn.
        profile: for the energies.
        graph: for the critical path.
        blocking_power_w: of a GPU that waits, where the profile does not say it by clock (NaN: unknown).
    """
    rows = [
        [Block(one.instruction, one.start_s, one.finish_s, one.frequency_mhz) for one in stage] for stage in plan.stages
    ]
    asked = [
        [(wait.start_s, wait.finish_s, wait.frequency_mhz) for wait in plan.waits_of(stage)]
        for stage in range(len(plan.stages))
    ]
    lanes = Lanes(title, tuple(tuple(row) for row in rows))
    return _with_waits(_marked(lanes, graph, _by_clock(profile)), asked, profile, blocking_power_w)


def full_clock_lanes(title: str, profile: Profile, graph: PipelineGraph, blocking_power_w: float = math.nan) -> Lanes:
    """Every instruction of the graph at the profile's highest clock, as early as it can; see `planned_lanes`."""
    top = [None if i is None else profile.table[i.stage, i.kind][0] for i in graph.instructions]
    durations_s = np.array([0.0 if one is None else one.time_s for one in top])
    clocks_mhz = np.array([0 if one is None else one.frequency_mhz for one in top])
    lanes = _marked(timed_lanes(title, graph, durations_s, clocks_mhz), graph, _by_clock(profile))
    return _with_waits(lanes, [[] for _ in lanes.rows], profile, blocking_power_w)


def timed_lanes(title: str, graph: PipelineGraph, durations_s: FloatArray, clocks_mhz: IntArray) -> Lanes:
    """Every instruction of the graph as early as it can, without waits.

    Args:
        title: for people.
        graph: which.
        durations_s: shape (nodes,).
        clocks_mhz: shape (nodes,); 0: not known.
    """
    start_s, finish_s = graph.times(durations_s)
    return Lanes(
        title,
        tuple(
            tuple(
                Block(one, float(start_s[node]), float(finish_s[node]), int(clocks_mhz[node]))
                for node in nodes.tolist()
                if (one := graph.instructions[node]) is not None
            )
            for nodes in graph.stage_nodes
        ),
    )


def with_path_and_waits(lanes: Lanes, graph: PipelineGraph) -> Lanes:
    """With the critical path by the blocks' own durations, and waits of which nobody knows what they take."""
    return _with_waits(_marked(lanes, graph, {}), [[] for _ in lanes.rows], None, math.nan)


def recorded_lanes(
    title: str,
    samples: Sequence[Sample],
    profile: Profile | None,
    graph: PipelineGraph | None,
    blocking_power_w: float = math.nan,
) -> Lanes:
    """An iteration as it ran.

    Args:
        title: for people.
        samples: of one rank per stage, of the same iteration.
        profile: for the energies, and the clock where none was asked for (full clock).
        graph: for the critical path, by the recorded durations.
        blocking_power_w: see `planned_lanes`.
    """
    zero = min(one.begin_s + one.instructions[0].start_s for one in samples if one.instructions)
    top = {} if profile is None else {key: rows[0].frequency_mhz for key, rows in profile.table.items()}
    rows, asked = [], []
    for stage, sample in enumerate(samples):
        shift = sample.begin_s - zero
        until_s = [request.time_s for request in sample.requests[1:]] + [math.inf]
        asked.append(
            [
                (one.time_s + shift, end_s + shift, one.clock_mhz)
                for one, end_s in zip(sample.requests, until_s, strict=False)
            ]
        )
        rows.append(
            tuple(
                Block(
                    Instruction(stage, one.name, one.microbatch, one.chunk),
                    one.start_s + shift,
                    one.finish_s + shift,
                    one.asked_mhz or top.get((stage, one.name), 0),
                )
                for one in sample.instructions
            )
        )
    lanes = _marked(Lanes(title, tuple(rows)), graph, _by_clock(profile))
    return _with_waits(lanes, asked, profile, blocking_power_w)


def _with_waits(
    lanes: Lanes,
    asked: Sequence[Sequence[tuple[float, float, int]]],
    profile: Profile | None,
    blocking_power_w: float,
) -> Lanes:
    """With its waits.

    Args:
        lanes: without.
        asked: per stage, by rising time, from when to when a clock was asked for (0: full clocks).
        profile, blocking_power_w: see `planned_lanes`.
    """
    waits: list[Wait] = []
    for stage, row in enumerate(lanes.rows):
        power = None if profile is None else profile.waiting_power(stage, blocking_power_w)
        full_mhz = 0
        if profile is not None:
            full_mhz = max((rows[0].frequency_mhz for key, rows in profile.table.items() if key[0] == stage), default=0)
        free_s, before_mhz = 0.0, full_mhz
        for block in (*row, None):
            start_s, after_mhz = (
                (lanes.end_s, full_mhz) if block is None else (block.start_s, block.clock_mhz or full_mhz)
            )
            if start_s - free_s > _SHORTEST_WAIT_S:
                alone_mhz = max(before_mhz, after_mhz)
                for since_s, until_s, clock_mhz in _pieces(free_s, start_s, asked[stage]):
                    own = clock_mhz is not None
                    mhz = alone_mhz if clock_mhz is None else clock_mhz or full_mhz
                    time_s = until_s - since_s
                    energy_j = saved_j = math.nan
                    if power is not None and mhz:
                        energy_j = power.at_w(mhz) * time_s
                        saved_j = power.at_w(alone_mhz) * time_s - energy_j
                    waits.append(Wait(stage, since_s, until_s, mhz, own and mhz != alone_mhz, energy_j, saved_j))
            if block is not None:
                free_s, before_mhz = max(free_s, block.finish_s), block.clock_mhz or full_mhz
    return replace(lanes, waits=tuple(waits))


def _pieces(
    start_s: float, finish_s: float, asked: Sequence[tuple[float, float, int]]
) -> Iterator[tuple[float, float, int | None]]:
    """A wait cut where clocks were asked for; None where none was."""
    for since_s, until_s, clock_mhz in asked:
        since_s, until_s = max(since_s, start_s), min(until_s, finish_s)
        if until_s <= since_s:
            continue
        if since_s > start_s:
            yield start_s, since_s, None
        yield since_s, until_s, clock_mhz
        start_s = until_s
    if finish_s > start_s:
        yield start_s, finish_s, None


def _by_clock(profile: Profile | None) -> dict[tuple[int, str, int], Measurement]:
    if profile is None:
        return {}
    return {(stage, kind, m.frequency_mhz): m for stage, kind, m in profile.rows()}


def _marked(lanes: Lanes, graph: PipelineGraph | None, measured: dict[tuple[int, str, int], Measurement]) -> Lanes:
    """With energies, and the critical path by the blocks' own durations."""
    critical: set[Instruction] = set()
    took = {block.instruction: block.finish_s - block.start_s for block in lanes.blocks}
    if graph is not None and set(graph.node_of) == set(took):
        durations = np.array([0.0 if i is None else took[i] for i in graph.instructions])
        critical = {i for node in graph.critical_path(durations) if (i := graph.instructions[node]) is not None}

    def mark(block: Block) -> Block:
        key = (block.instruction.stage, block.instruction.kind, block.clock_mhz)
        energy_j = measured[key].energy_j if key in measured else math.nan
        return replace(block, energy_j=energy_j, critical=block.instruction in critical)

    return replace(lanes, rows=tuple(tuple(mark(block) for block in row) for row in lanes.rows))
