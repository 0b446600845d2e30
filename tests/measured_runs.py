"""Runs that were measured on real GPUs, as our graph takes them: reading them, and their streams and durations.

The format is that of the published runs of the Perseus artifact (SOSP'24), reduced to `runs.csv` and
`instructions.csv.gz`; `data/measured-runs/README.md` says what is in them. A slice lies there for the tests;
`benchmarks/measured_runs.py` takes the whole.
"""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import (
    BACKWARD,
    FORWARD,
    Compute,
    Constant,
    Receive,
    Send,
    StageStream,
    StreamOp,
)

SLICE = Path(__file__).parent / "data" / "measured-runs"
LOAD = "load"
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What one rank executed: an instruction, or a load, which is not controlled.

    Attributes:
        kind: of the instruction, or `load`.
        microbatch: its id.
        frequency_mhz: the clock it ran at.
        time_s: mean over the run's iterations.
    """

    kind: str
    microbatch: int
    frequency_mhz: int
    time_s: float


@dataclass(frozen=True)
class Run:
    """One plan, or one setting of power limits, over a few iterations.

    Attributes:
        system: who made the plan.
        workload, plan: which.
        time_s: mean iteration time, of the slowest rank.
        energy_j: mean energy of an iteration, by rank.
        power_limits_w: by rank; empty where clocks were set instead.
        stages: what each rank executed, in program order; empty where that was not recorded.
    """

    system: str
    workload: str
    plan: int
    time_s: float
    energy_j: tuple[float, ...]
    power_limits_w: tuple[float, ...] = ()
    stages: tuple[tuple[Row, ...], ...] = ()

    @property
    def total_j(self) -> float:
        """Energy of all ranks."""
        return sum(self.energy_j)

    @cached_property
    def compute(self) -> tuple[tuple[Row, ...], ...]:
        """Per stage the instructions, without loads."""
        return tuple(tuple(row for row in stage if row.kind != LOAD) for stage in self.stages)

    @cached_property
    def clocks_mhz(self) -> frozenset[int]:
        """All that it has run at."""
        return frozenset(row.frequency_mhz for stage in self.compute for row in stage)

    def mean_clock_mhz(self, stage: int) -> float:
        """Of one rank, by time."""
        rows = self.compute[stage]
        return float(np.average([row.frequency_mhz for row in rows], weights=[row.time_s for row in rows]))

    def graph(self, transfer_s: float = 0.0, end_s: float = 0.0) -> PipelineGraph:
        """The iteration as our graph has it.

        Args:
            transfer_s: how long a transfer takes.
            end_s: constant time at the end of the iteration.
        """
        return build_graph(*streams_of(self.stages), transfer_s, end_s)

    def durations_s(self, graph: PipelineGraph) -> FloatArray:
        """As they were measured, shape (nodes,)."""
        return on_graph(graph, [[row.time_s for row in stage] for stage in self.compute])

    def graph_s(self, transfer_s: float = 0.0, end_s: float = 0.0) -> float:
        """Iteration time of the measured durations in our graph."""
        graph = self.graph(transfer_s, end_s)
        return graph.iteration_time_s(self.durations_s(graph))


def on_graph(graph: PipelineGraph, stages: Sequence[Sequence[float]]) -> FloatArray:
    """Values per stage, in program order of its instructions, put onto the nodes of a graph."""
    values = np.zeros(len(graph))
    for nodes, own in zip(graph.stage_nodes, stages, strict=True):
        values[nodes[~graph.is_constant[nodes]]] = own
    return values


def streams_of(stages: Sequence[Sequence[Row]]) -> tuple[list[StageStream], dict[tuple[int, str], float]]:
    """Streams of what ranks executed, and the durations of loads.

    Every transfer blocks both ends. What follows an instruction (its result goes out) and what precedes the next (its
    input comes in) stand between the two, then the next one's microbatch is loaded; where both are with one neighbour,
    the lower stage sends first.
    """
    streams: list[StageStream] = []
    constants: dict[tuple[int, str], float] = {}
    last = len(stages) - 1
    for stage, rows in enumerate(stages):
        stream: list[StreamOp] = []
        outgoing: list[StreamOp] = []
        loads: list[StreamOp] = []
        for row in rows:
            if row.kind == LOAD:
                name = f"{LOAD}{row.microbatch}"
                constants[stage, name] = row.time_s
                loads.append(Constant(name))
                continue
            before, after = {FORWARD: (stage - 1, stage + 1), BACKWARD: (stage + 1, stage - 1)}.get(row.kind, (-1, -1))
            incoming: list[StreamOp] = [Receive(before, row.kind)] if 0 <= before <= last else []
            is_upper = bool(outgoing and incoming) and before < stage and _peer(outgoing[0]) == before
            stream += [*incoming, *outgoing] if is_upper else [*outgoing, *incoming]
            stream += [*loads, Compute(row.kind, row.microbatch)]
            loads, outgoing = [], [Send(after, channel=row.kind)] if 0 <= after <= last else []
        streams.append([*stream, *outgoing])
    return streams, constants


def _peer(op: StreamOp) -> int:
    assert isinstance(op, (Send, Receive))  # only these are exchanged
    return op.peer


def load_runs(folder: Path) -> dict[str, list[Run]]:
    """All runs by workload, those of one system by rising number of the plan."""
    executed: dict[tuple[str, int], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for record in _records(folder / "instructions.csv.gz"):
        row = Row(
            record["instruction"],
            int(record["microbatch"]),
            int(record["frequency_mhz"]),
            float(record["mean_s"]),
        )
        executed[record["workload"], int(record["plan"])][int(record["rank"])].append(row)
    by_run: dict[tuple[str, str, int], list[Mapping[str, str]]] = defaultdict(list)
    for record in _records(folder / "runs.csv"):
        by_run[record["workload"], record["system"], int(record["plan"])].append(record)
    runs: dict[str, list[Run]] = defaultdict(list)
    for (workload, system, plan), ranks in sorted(by_run.items()):
        ranks.sort(key=lambda record: int(record["rank"]))
        stages = executed.get((workload, plan), {}) if system == "perseus" else {}
        runs[workload].append(
            Run(
                system=system,
                workload=workload,
                plan=plan,
                time_s=max(float(record["iteration_time_mean_s"]) for record in ranks),
                energy_j=tuple(float(record["iteration_energy_mean_j"]) for record in ranks),
                power_limits_w=tuple(float(r["power_limit_w"]) for r in ranks if r["power_limit_w"]),
                stages=tuple(tuple(stages[rank]) for rank in sorted(stages)),
            )
        )
    return dict(runs)


def of_clocks(runs: Sequence[Run]) -> tuple[Run, list[Run]]:
    """The run at full clocks, and all that ran a plan.

    Of several at full clocks the last one counts: the first is a cold start. Where none is, the fastest stands for it.
    """
    recorded = [run for run in runs if run.stages]
    top_mhz = max(clock for run in recorded for clock in run.clocks_mhz)
    full = [run for run in recorded if run.clocks_mhz == {top_mhz}] or [min(recorded, key=lambda run: run.time_s)]
    return full[-1], [run for run in recorded if run not in full]


def smallest_with(value: Callable[[float], float], wanted: float, high: float) -> float:
    """Where a function that rises reaches a value, between 0 and `high`."""
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if value(middle) < wanted else (low, middle)
    return low


def _records(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from csv.DictReader(file)
