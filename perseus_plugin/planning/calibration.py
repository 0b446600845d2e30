"""What an iteration takes beside the work that the graph knows: a time per transfer, and one per iteration.

The graph of an iteration has instructions, constant-time work and precedence. Transfers between stages, and the small
gaps between a rank's instructions, make stages wait that the graph takes to be busy, so that a plan would slow what is
really critical. What an iteration takes at its ends (the loss exchanged, a loader, an optimizer that nothing hooks) is
there once, whatever the clocks. Two numbers bring the graph close to what was measured.

They are told apart by what they do. A transfer is on the critical path as often as the schedule and the clocks have it,
and between the starts of instructions; what is there once moves nothing but the iteration's end. Where the starts of
instructions are known, or iterations whose critical paths hold different numbers of transfers, both are fitted; where
neither is, or a time per transfer explains hardly more than none, all is taken to be there once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, PipelineGraph
from perseus_plugin.iteration.replayed import Overheads, PerStage, Samples
from perseus_plugin.planning.replay import by_node, finishes

FEWEST = 4
"""Iterations that are needed where nothing but their times is known."""

_STEPS = 24
_PASSES = 3
# Share of the distance between graph and measurement that a time per transfer has to explain.
_LEAST_GAIN = 0.1
_LEAST_GAIN_BY_TIMES = 0.3  # few iterations may differ just so by chance


def overheads(with_unit: PipelineGraph, samples: Samples | None) -> Overheads:
    """What fits measured iterations best; all 0 where they do not tell.

    Args:
        with_unit: the job's graph in which a transfer takes 1 s, and nothing is there once.
        samples: measured iterations.

    Raises:
        PlanError: the samples do not fit the graph.
    """
    if samples is None or not samples.as_run_s:
        return Overheads()
    as_run_s = _columns(with_unit, samples.as_run_s)
    durations_s = np.where(with_unit.is_constant[:, None], with_unit.constant_s[:, None], as_run_s)
    starts_s = _columns(with_unit, samples.starts_s) if samples.starts_s else None
    times_s = np.array([max(replicas) for replicas in samples.times_s]) if samples.times_s else None
    transfer_s, end_s = fitted(with_unit, durations_s, times_s, starts_s)
    if times_s is None:
        return Overheads(transfer_s)
    beside_s = times_s - _iteration_s(finishes(with_transfers(with_unit, 0.0), durations_s), len(times_s))
    return Overheads(transfer_s, end_s, float(np.median(times_s)), max(0.0, float(np.median(beside_s))))


def fitted(
    with_unit: PipelineGraph,
    durations_s: FloatArray,
    times_s: FloatArray | None,
    starts_s: FloatArray | None = None,
) -> tuple[float, float]:
    """Seconds of a transfer, and those that an iteration takes once; see the module.

    Args:
        with_unit: the job's graph in which a transfer takes 1 s, and nothing is there once.
        durations_s: shape (nodes, iterations times replicas), as run, those of constant-time nodes too.
        times_s: shape (iterations,), that of the slowest replica; None: not known.
        starts_s: as durations, since each rank's own begin; None: not known.
    """

    def distance_s(seconds: float) -> tuple[float, float]:
        """How far the graph is from what was measured with such transfers, and what is there once then."""
        graph = with_transfers(with_unit, seconds)
        finish_s = finishes(graph, durations_s)
        total, once_s = 0.0, 0.0
        if starts_s is not None:
            late_s = starts_s - (finish_s - durations_s)
            for nodes in graph.stage_nodes:
                own = nodes[~graph.is_constant[nodes]]
                # Every rank has a zero of its own.
                total += float(np.abs(late_s[own] - np.median(late_s[own])).sum())
        if times_s is not None:
            left_s = times_s - _iteration_s(finish_s, len(times_s))
            once_s = max(0.0, float(np.median(left_s)))
            total += graph.stages * float(np.abs(left_s - once_s).sum())
        return total, once_s

    without, once_s = distance_s(0.0)
    tells = starts_s is not None or (times_s is not None and len(times_s) >= FEWEST)
    if not tells or not with_unit.edge_latency_s.any():
        return 0.0, once_s
    best, least, best_once_s = 0.0, without, once_s
    low, high = 0.0, float(durations_s[~with_unit.is_constant].mean())
    for _ in range(_PASSES):
        for seconds in np.linspace(low, high, _STEPS).tolist():
            here, here_once_s = distance_s(seconds)
            if here < least:
                best, least, best_once_s = seconds, here, here_once_s
        width = (high - low) / _STEPS
        low, high = max(0.0, best - width), best + width
    least_gain = _LEAST_GAIN_BY_TIMES if starts_s is None else _LEAST_GAIN
    return (best, best_once_s) if least < (1 - least_gain) * without else (0.0, once_s)


def with_transfers(with_unit: PipelineGraph, seconds: float) -> PipelineGraph:
    """The graph in which a transfer takes so long, from the one in which it takes 1 s."""
    return replace(with_unit, edge_latency_s=with_unit.edge_latency_s * seconds)


def _iteration_s(finish_s: FloatArray, iterations: int) -> FloatArray:
    """Shape (iterations,): of the slowest replica."""
    slowest: FloatArray = finish_s.max(axis=0).reshape(iterations, -1).max(axis=1)
    return slowest


def _columns(graph: PipelineGraph, iterations: tuple[tuple[PerStage, ...], ...]) -> FloatArray:
    """Shape (nodes, all iterations of all replicas)."""
    columns: FloatArray = np.array([by_node(graph, replica) for one in iterations for replica in one]).T
    return columns
