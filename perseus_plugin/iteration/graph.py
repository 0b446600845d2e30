"""The dependency graph of one training iteration, derived from the instruction streams of its stages.

Nodes are instructions and constant-time operations; communication is contracted into edges. The graph is backed by
numpy arrays and laid out level by level, so that start and finish times of tens of thousands of instructions take
milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from perseus_plugin.errors import ScheduleError
from perseus_plugin.iteration.instructions import Compute, Constant, Instruction, Receive, Send, StageStream

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_END = Constant("(end)", collective=True)


@dataclass(frozen=True, eq=False)
class PipelineGraph:
    """Precedence graph of one iteration; node ids are in a topological order, level by level.

    Attributes:
        instructions: per node its instruction, or None for a constant-time node.
        stage: shape (nodes,), the stage that executes the node.
        constant_s: shape (nodes,), the duration of constant-time nodes, 0 for instructions.
        collective: shape (nodes,), true for constant-time nodes in which the stages wait for each other.
        stage_nodes: per stage its node ids in program order.
        edge_source, edge_target: shape (edges,), sorted by target: the target starts after the source has finished.
        edge_latency_s: shape (edges,), the least time between that finish and that start.
        level_start: shape (levels + 1,), level k holds the nodes `level_start[k]` to `level_start[k + 1]`.
    """

    instructions: tuple[Instruction | None, ...]
    stage: IntArray
    constant_s: FloatArray
    collective: npt.NDArray[np.bool_]
    stage_nodes: tuple[IntArray, ...]
    edge_source: IntArray
    edge_target: IntArray
    edge_latency_s: FloatArray
    level_start: IntArray

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def stages(self) -> int:
        """Number of pipeline stages (with virtual stages: of pipeline ranks)."""
        return len(self.stage_nodes)

    @cached_property
    def is_constant(self) -> npt.NDArray[np.bool_]:
        """Shape (nodes,): true for constant-time nodes."""
        return np.array([instruction is None for instruction in self.instructions], dtype=bool)

    @cached_property
    def microbatches(self) -> int:
        """Number of different microbatch ids."""
        return len({i.microbatch for i in self.instructions if i is not None})

    @cached_property
    def node_of(self) -> dict[Instruction, int]:
        """Node id of every instruction."""
        return {i: node for node, i in enumerate(self.instructions) if i is not None}

    @cached_property
    def predecessor_start(self) -> IntArray:
        """Shape (nodes + 1,): the edges into node v are `predecessor_start[v]` to `predecessor_start[v + 1]`."""
        return np.searchsorted(self.edge_target, np.arange(len(self) + 1)).astype(np.int64)

    @cached_property
    def _by_source(self) -> tuple[IntArray, IntArray]:
        """Edge order sorted by source, and the start of every source's edges in it, shape (nodes + 1,)."""
        order = np.argsort(self.edge_source, kind="stable").astype(np.int64)
        starts = np.searchsorted(self.edge_source[order], np.arange(len(self) + 1)).astype(np.int64)
        return order, starts

    @cached_property
    def forward_steps(self) -> list[tuple[int, int, IntArray, FloatArray, IntArray]]:
        """Per level from the second: its nodes, its incoming sources and latencies, and where each node's begin."""
        starts = self.predecessor_start
        steps = []
        for low, high in zip(self.level_start[1:-1].tolist(), self.level_start[2:].tolist(), strict=True):
            first, last = int(starts[low]), int(starts[high])
            offsets = starts[low:high] - first
            steps.append((low, high, self.edge_source[first:last], self.edge_latency_s[first:last], offsets))
        return steps

    @cached_property
    def backward_steps(self) -> list[tuple[IntArray, IntArray, FloatArray, IntArray]]:
        """Per level from the last: nodes with successors, their targets and latencies, and where each begins."""
        order, starts = self._by_source
        steps = []
        for low, high in zip(self.level_start[-2::-1].tolist(), self.level_start[:0:-1].tolist(), strict=True):
            first, last = int(starts[low]), int(starts[high])
            if first == last:
                continue
            nodes = np.arange(low, high)[starts[low + 1 : high + 1] > starts[low:high]]
            edges = order[first:last]
            steps.append((nodes, self.edge_target[edges], self.edge_latency_s[edges], starts[nodes] - first))
        return steps

    def in_units(self, unit_s: float) -> PipelineGraph:
        """The same graph with constant times and latencies in whole units of `unit_s`."""
        if not (self.constant_s.any() or self.edge_latency_s.any()):
            return self
        return replace(
            self,
            constant_s=np.rint(self.constant_s / unit_s),
            edge_latency_s=np.rint(self.edge_latency_s / unit_s),
        )

    def edges_into(self, node: int) -> range:
        """Ids of the edges into `node`."""
        return range(int(self.predecessor_start[node]), int(self.predecessor_start[node + 1]))

    def edges_from(self, node: int) -> list[int]:
        """Ids of the edges out of `node`."""
        order, starts = self._by_source
        edges: list[int] = order[starts[node] : starts[node + 1]].tolist()
        return edges

    def durations(self, durations_s: npt.ArrayLike) -> FloatArray:
        """`durations_s`, shape (nodes,), with the entries of constant-time nodes put in their place."""
        given = np.asarray(durations_s, dtype=np.float64)
        if given.shape != (len(self),):
            raise ValueError(f"durations_s has shape {given.shape}; the graph has {len(self)} nodes")
        return np.where(self.is_constant, self.constant_s, given)

    def times(self, durations_s: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Earliest start and finish of every node, when each starts as soon as its predecessors allow.

        Args:
            durations_s: shape (nodes,), seconds; entries of constant-time nodes are ignored.
        """
        duration = self.durations(durations_s)
        start = np.zeros(len(self))
        finish = duration.copy()
        for low, high, sources, latency, offsets in self.forward_steps:
            ready = np.maximum.reduceat(finish[sources] + latency, offsets)
            start[low:high] = ready
            finish[low:high] = ready + duration[low:high]
        return start, finish

    def latest_finish(self, durations_s: npt.ArrayLike, deadline_s: float) -> FloatArray:
        """Latest finish of every node with which the iteration can still end at `deadline_s`, shape (nodes,)."""
        duration = self.durations(durations_s)
        latest = np.full(len(self), float(deadline_s))
        for nodes, targets, latency, offsets in self.backward_steps:
            latest[nodes] = np.minimum.reduceat(latest[targets] - duration[targets] - latency, offsets)
        return latest

    def iteration_time_s(self, durations_s: npt.ArrayLike) -> float:
        """When the last node finishes, the first having started at 0."""
        return float(self.times(durations_s)[1].max())

    def critical_path(self, durations_s: npt.ArrayLike) -> list[int]:
        """Node ids of one longest path, first to last."""
        finish = self.times(durations_s)[1]
        node = int(finish.argmax())
        path = [node]
        while self.predecessor_start[node] < self.predecessor_start[node + 1]:
            edges = slice(self.predecessor_start[node], self.predecessor_start[node + 1])
            arrival = finish[self.edge_source[edges]] + self.edge_latency_s[edges]
            node = int(self.edge_source[edges][int(arrival.argmax())])
            path.append(node)
        return path[::-1]


def build_graph(
    streams: Sequence[StageStream],
    constant_time_s: Mapping[tuple[int, str], float] | None = None,
    latency_s: float = 0.0,
    end_s: float = 0.0,
) -> PipelineGraph:
    """Derive the dependency graph from the streams of all stages.

    Dependencies are each stage's program order, the k-th send matched to the k-th receive per (from, to, channel),
    and for blocking sends the way back: both ends go on only when both have arrived. Communication becomes edges;
    edges that others imply are left out.

    Args:
        streams: per stage its operations in program order.
        constant_time_s: durations of `Constant` operations by (stage, name); absent ones take 0 s.
        latency_s: time a transfer takes: on the way from sender to receiver, and for a blocking send on both ends.
        end_s: what every stage does at the iteration's end, beside its operations.

    Raises:
        ScheduleError: no instruction at all, an instruction twice in a stage, an unknown peer, unmatched sends or
            receives, a deadlock, or a duration or latency that is negative or not finite.
    """
    for name, value in [
        ("latency_s", latency_s),
        ("end_s", end_s),
        *((str(k), v) for k, v in (constant_time_s or {}).items()),
    ]:
        if not (math.isfinite(value) and value >= 0):
            raise ScheduleError(f"{name}: got {value}; allowed: a finite number from 0")
    _check_matching(streams)
    constants = dict(constant_time_s or {})
    if end_s > 0:
        streams = [[*stream, _END] for stream in streams]
        constants.update({(stage, _END.name): end_s for stage in range(len(streams))})
    run = _Execution(streams, constants, latency_s)
    run.to_the_end()
    if all(instruction is None for instruction in run.instructions):
        raise ScheduleError("the schedule has no instruction")
    return run.graph()


def _check_matching(streams: Sequence[StageStream]) -> None:
    sends: dict[tuple[int, int, str], int] = {}
    receives: dict[tuple[int, int, str], int] = {}
    for stage, stream in enumerate(streams):
        seen: set[Compute] = set()
        for op in stream:
            if isinstance(op, (Send, Receive)):
                if op.peer == stage or not 0 <= op.peer < len(streams):
                    raise ScheduleError(
                        f"stage {stage}: {op} names peer {op.peer}; allowed: another of the {len(streams)} stages"
                    )
                if isinstance(op, Send):
                    key = (stage, op.peer, op.channel)
                    sends[key] = sends.get(key, 0) + 1
                else:
                    key = (op.peer, stage, op.channel)
                    receives[key] = receives.get(key, 0) + 1
            elif isinstance(op, Compute):
                if op in seen:
                    raise ScheduleError(f"stage {stage}: {op} stands in the stream twice")
                seen.add(op)
            elif not isinstance(op, Constant):
                raise ScheduleError(f"stage {stage}: {op!r} is no stream operation")
    for key in sorted(sends.keys() | receives.keys()):
        if sends.get(key, 0) != receives.get(key, 0):
            raise ScheduleError(
                f"stage {key[0]} sends {sends.get(key, 0)} times to stage {key[1]} on channel {key[2]!r}, "
                f"which receives {receives.get(key, 0)} times"
            )


class _Execution:
    """Runs the streams against each other, blocking as they would, and records who waited for whom.

    `front[s]` is what the next operation of stage s has to wait for: nodes, each with the latency behind it.
    """

    def __init__(
        self,
        streams: Sequence[StageStream],
        constant_time_s: Mapping[tuple[int, str], float],
        latency_s: float,
    ) -> None:
        self.streams = streams
        self.constant_time_s = constant_time_s
        self.latency_s = latency_s
        self.instructions: list[Instruction | None] = []
        self.constants: list[float] = []
        self.collective: list[bool] = []
        self.stage: list[int] = []
        self.level: list[int] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.latencies: list[float] = []
        self.front: list[dict[int, float]] = [{} for _ in streams]
        # Per node: how many nodes of each stage have finished when it has. Each stage is a chain, so this decides
        # reachability; None once all stages have read it would save memory, but 65,536 x 64 x 4 bytes are 16 MB.
        self.seen: list[npt.NDArray[np.int32]] = []
        self.position: list[int] = []
        self.count = [0] * len(streams)
        self.next_op = [0] * len(streams)
        self.in_flight: dict[tuple[int, int, str], list[dict[int, float] | None]] = {}
        self.taken: dict[tuple[int, int, str], int] = {}

    def to_the_end(self) -> None:
        ready = list(range(len(self.streams)))[::-1]
        while ready:
            stage = ready.pop()
            ready.extend(self._advance(stage))
        if any(at < len(stream) for at, stream in zip(self.next_op, self.streams, strict=True)):
            waiting = "; ".join(
                f"stage {stage} at operation {at}: {self.streams[stage][at]}"
                for stage, at in enumerate(self.next_op)
                if at < len(self.streams[stage])
            )
            raise ScheduleError(f"the schedule deadlocks; {waiting}")

    def _advance(self, stage: int) -> list[int]:
        """Run one stage until it has to wait; returns the stages that it woke."""
        stream = self.streams[stage]
        woken: list[int] = []
        while self.next_op[stage] < len(stream):
            op = stream[self.next_op[stage]]
            if isinstance(op, Compute):
                self._add_node(stage, Instruction(stage, op.kind, op.microbatch, op.chunk), 0.0)
            elif isinstance(op, Constant):
                self._add_node(stage, None, self.constant_time_s.get((stage, op.name), 0.0), op.collective)
            elif isinstance(op, Send) and not op.blocking:
                self.in_flight.setdefault((stage, op.peer, op.channel), []).append(dict(self.front[stage]))
                woken.append(op.peer)
            elif isinstance(op, Send):
                if not self._meet(stage, op.peer, op.channel):
                    return woken
                woken.append(op.peer)
            elif not self._receive(stage, op):
                # The sender may stand before its blocking send, waiting for this end to arrive.
                return [*woken, op.peer] if self._stands_at_send(op.peer, stage, op.channel) else woken
            self.next_op[stage] += 1
        return woken

    def _stands_at_send(self, sender: int, receiver: int, channel: str) -> bool:
        at = self.next_op[sender]
        if at >= len(self.streams[sender]):
            return False
        op = self.streams[sender][at]
        return isinstance(op, Send) and op.blocking and op.peer == receiver and op.channel == channel

    def _meet(self, sender: int, receiver: int, channel: str) -> bool:
        """A blocking send: goes through if the receiver stands before the matching receive."""
        at = self.next_op[receiver]
        op = self.streams[receiver][at] if at < len(self.streams[receiver]) else None
        key = (sender, receiver, channel)
        arrived = isinstance(op, Receive) and op.peer == sender and op.channel == channel
        if not arrived or len(self.in_flight.get(key, ())) > self.taken.get(key, 0):
            return False
        joined = _join(self.front[sender], self.front[receiver], 0.0)
        joined = {node: latency + self.latency_s for node, latency in joined.items()}
        self.front[sender] = joined
        self.front[receiver] = dict(joined)
        self.next_op[receiver] += 1
        return True

    def _receive(self, stage: int, op: Receive) -> bool:
        key = (op.peer, stage, op.channel)
        queue = self.in_flight.get(key)
        at = self.taken.get(key, 0)
        if not queue or at >= len(queue):
            return False
        sent = queue[at]
        assert sent is not None  # set to None only below, when taken
        queue[at] = None
        self.taken[key] = at + 1
        self.front[stage] = _join(self.front[stage], sent, self.latency_s)
        return True

    def _add_node(
        self, stage: int, instruction: Instruction | None, constant_s: float, collective: bool = False
    ) -> None:
        node = len(self.instructions)
        front = self.front[stage]
        self.instructions.append(instruction)
        self.constants.append(constant_s)
        self.collective.append(collective)
        self.stage.append(stage)
        self.position.append(self.count[stage])
        self.count[stage] += 1
        if not front:
            seen = np.zeros(len(self.streams), dtype=np.int32)
        elif len(front) == 1:
            seen = self.seen[next(iter(front))].copy()
        else:
            front = self._without_implied(front)
            seen = np.maximum.reduce([self.seen[source] for source in front])
        seen[stage] = self.count[stage]
        self.seen.append(seen)
        self.level.append(1 + max((self.level[source] for source in front), default=-1))
        self.sources.extend(front)
        self.targets.extend([node] * len(front))
        self.latencies.extend(front.values())
        self.front[stage] = {node: 0.0}

    def _without_implied(self, front: dict[int, float]) -> dict[int, float]:
        """Drop the sources that another source already waits for (and whose latency that one's edge covers)."""
        kept = dict(front)
        for source, latency in front.items():
            stage, position = self.stage[source], self.position[source]
            for other, other_latency in kept.items():
                if other != source and self.seen[other][stage] > position and latency <= other_latency:
                    del kept[source]
                    break
        return kept

    def graph(self) -> PipelineGraph:
        level = np.array(self.level, dtype=np.int64)
        stage = np.array(self.stage, dtype=np.int64)
        order = np.lexsort((np.array(self.position), stage, level))
        new_id = np.empty(len(order), dtype=np.int64)
        new_id[order] = np.arange(len(order))
        sources = new_id[np.array(self.sources, dtype=np.int64)]
        targets = new_id[np.array(self.targets, dtype=np.int64)]
        by_target = np.lexsort((sources, targets))
        nodes_of_stage = [new_id[np.flatnonzero(stage == s)] for s in range(len(self.streams))]
        return PipelineGraph(
            instructions=tuple(self.instructions[node] for node in order.tolist()),
            stage=stage[order],
            constant_s=np.array(self.constants)[order],
            collective=np.array(self.collective, dtype=bool)[order],
            stage_nodes=tuple(nodes_of_stage),
            edge_source=sources[by_target],
            edge_target=targets[by_target],
            edge_latency_s=np.array(self.latencies, dtype=np.float64)[by_target],
            level_start=np.searchsorted(level[order], np.arange(int(level.max()) + 2)).astype(np.int64),
        )


def _join(first: dict[int, float], second: dict[int, float], latency_s: float) -> dict[int, float]:
    joined = dict(first)
    for node, latency in second.items():
        joined[node] = max(joined.get(node, 0.0), latency + latency_s)
    return joined
