"""How long a transfer between stages takes, from when instructions really began.

The graph of an iteration knows of transfers as precedence only. What they take, and the small gaps between a rank's
instructions, makes stages wait that the graph takes to be busy, so that a plan would slow what is really critical. One
constant for all transfers brings the graph close to measured starts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, PipelineGraph
from perseus_plugin.iteration.replayed import Samples
from perseus_plugin.planning.replay import by_node, finishes

_LARGEST_SHARE = 0.25  # of a mean instruction
_STEPS = 24
_LEAST_GAIN = 0.1  # of the distance between graph and measurement, else there is nothing to be known


def transfer_s(with_unit: PipelineGraph, samples: Samples | None) -> float:
    """The time of a transfer that fits measured starts best; 0.0 where they do not tell.

    Args:
        with_unit: the job's graph in which a transfer takes 1 s.
        samples: measured iterations.

    Raises:
        PlanError: the samples do not fit the graph.
    """
    if samples is None or not samples.starts_s or not with_unit.edge_latency_s.any():
        return 0.0
    as_run_s = _columns(with_unit, samples.as_run_s)
    starts_s = _columns(with_unit, samples.starts_s)
    durations_s = np.where(with_unit.is_constant[:, None], with_unit.constant_s[:, None], as_run_s)

    def distance_s(seconds: float) -> float:
        graph = with_transfers(with_unit, seconds)
        late_s = starts_s - (finishes(graph, durations_s) - durations_s)
        total = 0.0
        for nodes in graph.stage_nodes:
            own = nodes[~graph.is_constant[nodes]]
            # Every rank has a zero of its own.
            total += float(np.abs(late_s[own] - np.median(late_s[own])).sum())
        return total

    low, high = 0.0, _LARGEST_SHARE * float(as_run_s[~with_unit.is_constant].mean())
    best, least = 0.0, distance_s(0.0)
    without = least
    for _ in range(2):
        for seconds in np.linspace(low, high, _STEPS).tolist():
            here = distance_s(seconds)
            if here < least:
                best, least = seconds, here
        width = (high - low) / _STEPS
        low, high = max(0.0, best - width), best + width
    return best if least < (1 - _LEAST_GAIN) * without else 0.0


def with_transfers(with_unit: PipelineGraph, seconds: float) -> PipelineGraph:
    """The graph in which a transfer takes so long, from the one in which it takes 1 s."""
    return replace(with_unit, edge_latency_s=with_unit.edge_latency_s * seconds)


def _columns(graph: PipelineGraph, iterations: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]) -> FloatArray:
    """Shape (nodes, all iterations of all replicas)."""
    columns: FloatArray = np.array([by_node(graph, replica) for one in iterations for replica in one]).T
    return columns
