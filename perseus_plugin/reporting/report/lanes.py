"""A pipeline iteration as rows of blocks, one per stage: as full clocks would run it, as planned, as it ran. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from perseus_plugin.iteration.graph import PipelineGraph
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


@dataclass(frozen=True)
class Lanes:
    """An iteration.

    Attributes:
        title: for people.
        rows: per stage its blocks by rising start.
    """

    title: str
    rows: tuple[tuple[Block, ...], ...]

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


def waits(lanes: Lanes) -> list[tuple[int, float, float]]:
    """Where stages wait, as (stage, from, to), by rising time in each stage; from the beginning to the lanes' end."""
    found = []
    for stage, row in enumerate(lanes.rows):
        free_s = 0.0
        for block in row:
            if block.start_s - free_s > _SHORTEST_WAIT_S:
                found.append((stage, free_s, block.start_s))
            free_s = max(free_s, block.finish_s)
        if lanes.end_s - free_s > _SHORTEST_WAIT_S:
            found.append((stage, free_s, lanes.end_s))
    return found


def planned_lanes(title: str, plan: Plan, profile: Profile | None, graph: PipelineGraph | None) -> Lanes:
    """The plan as predicted."""
    rows = [
        [Block(one.instruction, one.start_s, one.finish_s, one.frequency_mhz) for one in stage] for stage in plan.stages
    ]
    return _marked(Lanes(title, tuple(tuple(row) for row in rows)), graph, _by_clock(profile))


def full_clock_lanes(title: str, profile: Profile, graph: PipelineGraph) -> Lanes:
    """Every instruction of the graph at the profile's highest clock, as early as it can."""
    top = {key: rows[0] for key, rows in profile.table.items()}
    durations = [0.0 if i is None else top[i.stage, i.kind].time_s for i in graph.instructions]
    start, finish = graph.times(np.array(durations))
    rows = []
    for nodes in graph.stage_nodes:
        pairs = [(node, graph.instructions[node]) for node in nodes.tolist()]
        rows.append(
            tuple(
                Block(i, float(start[node]), float(finish[node]), top[i.stage, i.kind].frequency_mhz)
                for node, i in pairs
                if i is not None
            )
        )
    return _marked(Lanes(title, tuple(rows)), graph, _by_clock(profile))


def recorded_lanes(
    title: str, samples: Sequence[Sample], profile: Profile | None, graph: PipelineGraph | None
) -> Lanes:
    """An iteration as it ran.

    Args:
        title: for people.
        samples: of one rank per stage, of the same iteration.
        profile: for the energies, and the clock where none was asked for (full clock).
        graph: for the critical path, by the recorded durations.
    """
    zero = min(one.begin_s + one.instructions[0].start_s for one in samples if one.instructions)
    top = {} if profile is None else {key: rows[0].frequency_mhz for key, rows in profile.table.items()}
    rows = []
    for stage, sample in enumerate(samples):
        shift = sample.begin_s - zero
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
    return _marked(Lanes(title, tuple(rows)), graph, _by_clock(profile))


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
