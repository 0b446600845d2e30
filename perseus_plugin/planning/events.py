"""The events of the relaxation, the starts and finishes of all nodes, and their times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perseus_plugin.errors import PlanError
from perseus_plugin.iteration.graph import IntArray, PipelineGraph


@dataclass(frozen=True, eq=False)
class Events:
    """Start and finish events of the nodes after merging those that an optimal solution can let coincide.

    Attributes:
        start, finish: shape (nodes,), event ids.
        count: number of events.
        source, sink: ids of the iteration's begin and end.
        edge: ids of the graph's edges whose two events have not been merged.
    """

    start: IntArray
    finish: IntArray
    count: int
    source: int
    sink: int
    edge: IntArray


def merged_events(graph: PipelineGraph) -> Events:
    """Merge the finish of a node into the start of its only successor, and likewise the other way.

    A finish may wait for the node's only successor, and a start may come as early as the only predecessor's
    finish, at no cost: energy never rises with duration along the hull, and is constant beyond its end.
    """
    n = len(graph)
    out_degree = np.bincount(graph.edge_source, minlength=n)
    in_degree = np.bincount(graph.edge_target, minlength=n)
    start, finish = np.arange(n), np.arange(n, 2 * n)
    start[in_degree == 0] = 2 * n
    finish[out_degree == 0] = 2 * n + 1
    no_latency = graph.edge_latency_s == 0
    only_source = no_latency & (in_degree[graph.edge_target] == 1)
    start[graph.edge_target[only_source]] = finish[graph.edge_source[only_source]]
    only_target = no_latency & (out_degree[graph.edge_source] == 1) & ~only_source
    renamed = np.arange(2 * n + 2)
    renamed[finish[graph.edge_source[only_target]]] = start[graph.edge_target[only_target]]
    start, finish = renamed[start], renamed[finish]
    used = np.zeros(2 * n + 2, dtype=bool)
    used[start] = used[finish] = used[2 * n :] = True
    renamed = np.cumsum(used) - 1
    start, finish = renamed[start], renamed[finish]
    return Events(
        start=start,
        finish=finish,
        count=int(used.sum()),
        source=int(renamed[2 * n]),
        sink=int(renamed[2 * n + 1]),
        edge=np.flatnonzero(finish[graph.edge_source] != start[graph.edge_target]),
    )


def longest_paths(
    value: npt.NDArray[np.int64], tail: IntArray, head: IntArray, length: IntArray
) -> npt.NDArray[np.int64]:
    """Longest path to every node from node 0, whose value stays 0 (Bellman-Ford; only what has risen is followed).

    Args:
        value: lower bounds to begin with.
    """
    if not len(tail):
        return value
    order = np.argsort(tail, kind="stable")
    head, length = head[order], length[order]
    first = np.searchsorted(tail[order], np.arange(len(value) + 1))
    risen, has_risen = np.arange(len(value)), np.zeros(len(value), dtype=bool)
    for _ in range(2 * len(value) + 2):
        degree = first[risen + 1] - first[risen]
        arcs = np.repeat(first[risen] - np.cumsum(degree) + degree, degree) + np.arange(int(degree.sum()))
        reached, targets = np.repeat(value[risen], degree) + length[arcs], head[arcs]
        more = reached > value[targets]
        if not more.any():
            return value
        np.maximum.at(value, targets[more], reached[more])
        if value[0] != 0:
            break
        has_risen[targets[more]] = True
        risen = np.flatnonzero(has_risen)
        has_risen[risen] = False
    raise PlanError("the min-cost flow is not optimal: its residual graph has a cycle of positive length")
