"""A long iteration repeats itself: it is a shorter one in which some microbatches in the middle come again and again.

The relaxation of the shorter one is solved in a fraction of the time. Its times, and its prices, are those of the long
one but for what the repeated microbatches do not agree in, which is evened out: prices have to balance to be a bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from perseus_plugin.iteration.graph import FloatArray, IntArray, PipelineGraph

# Microbatches of the shorter iteration, per stage: what fills and drains the pipeline, and as much between.
_KEPT, _LEAST_KEPT = 8, 5
_SHORTER = 2 / 5  # at most this share of the long one: it is solved twice, and in finer units


@dataclass(frozen=True, eq=False)
class Steady:
    """A shorter iteration, and what repeats in the long one.

    Attributes:
        graph: of the shorter one.
        kept: shape (its nodes,), the long one's nodes that it consists of.
        node, edge: shape (nodes,) and (edges,) of the long one, what they are in the shorter one.
        repeats: shape (nodes,), so many repetitions later than there.
        before, last: nodes of the shorter one in the last two repetitions that it has.
        count: number of repetitions that the shorter one lacks.
    """

    graph: PipelineGraph
    kept: IntArray
    node: IntArray
    edge: IntArray
    repeats: IntArray
    before: IntArray
    last: IntArray
    count: int


def find_steady(graph: PipelineGraph, duration_s: FloatArray, class_of: IntArray) -> Steady | None:
    """What repeats in an iteration; None if nothing does, or too little.

    Args:
        graph: of the iteration.
        duration_s: shape (nodes,), at which it is cut in the middle.
        class_of: shape (nodes,), instructions with the same class are alike.
    """
    least = min(_KEPT * graph.stages, int(_SHORTER * graph.microbatches))
    instructions = np.bincount(graph.stage[class_of >= 0], minlength=graph.stages)
    if least < _LEAST_KEPT * graph.stages or (instructions % graph.microbatches).any():
        return None
    start_s, finish_s = graph.times(duration_s)
    cut_s = float(finish_s.max()) * least / 2 / graph.microbatches
    cut = np.bincount(graph.stage[start_s < cut_s], minlength=graph.stages)
    for microbatches in range(1, graph.stages * 2 + 1):
        count = (graph.microbatches - least) // microbatches
        found = _repeated(graph, class_of, cut, instructions // graph.microbatches * microbatches, count)
        if found is not None:
            return replace(found, graph=_numbered(found, microbatches * count))
    return None


def _numbered(steady: Steady, later: int) -> PipelineGraph:
    """The shorter iteration's graph, where those of its microbatches that come last are numbered on from the others."""
    instructions = list(steady.graph.instructions)
    for at in np.flatnonzero(steady.repeats[steady.kept]).tolist():
        instruction = instructions[at]
        if instruction is not None:
            instructions[at] = replace(instruction, microbatch=instruction.microbatch - later)
    return replace(steady.graph, instructions=tuple(instructions))


def _repeated(graph: PipelineGraph, class_of: IntArray, cut: IntArray, period: IntArray, count: int) -> Steady | None:
    """As `find_steady`, where after `cut` nodes of each stage the `period` before them may come `count` times again."""
    place = np.empty(len(graph), dtype=np.int64)
    for nodes in graph.stage_nodes:
        place[nodes] = np.arange(len(nodes))
    cuts, periods = cut[graph.stage], period[graph.stage]
    if (cut < 2 * period).any() or not period.all():
        return None
    repeats = np.clip((place - cuts) // periods + 1, 0, count)
    kept = np.flatnonzero((place < cuts) | (place >= cuts + count * periods))
    at = place - repeats * periods
    # Nodes by their stage and place in the shorter iteration.
    table = np.full((graph.stages, int(at.max()) + 1), -1, dtype=np.int64)
    table[graph.stage[kept], at[kept]] = np.arange(len(kept))
    node = table[graph.stage, at]
    sources, targets = graph.edge_source, graph.edge_target
    source_at = place[sources] - repeats[targets] * periods[sources]
    if (class_of[kept][node] != class_of).any() or (source_at < 0).any() or (source_at >= table.shape[1]).any():
        return None
    source, target = table[graph.stage[sources], source_at], node[targets]
    of_kept = np.isin(targets, kept)
    key = source * len(kept) + target
    ends, first = np.unique(key[of_kept], return_index=True)
    edge = np.minimum(np.searchsorted(ends, key), len(ends) - 1)
    degree = np.bincount(targets, minlength=len(graph))
    same_latency = graph.edge_latency_s[of_kept][first][edge] == graph.edge_latency_s
    if (source < 0).any() or not ((ends[edge] == key) & same_latency).all() or (degree != degree[kept][node]).any():
        return None
    last = np.flatnonzero((place < cuts) & (place >= cuts - periods))
    before = table[graph.stage[last], place[last] - periods[last]]
    return _joined(
        graph, kept, node, edge, source[of_kept][first], target[of_kept][first], repeats, before, node[last], count
    )


def _joined(
    graph: PipelineGraph,
    kept: IntArray,
    node: IntArray,
    edge: IntArray,
    source: IntArray,
    target: IntArray,
    repeats: IntArray,
    before: IntArray,
    last: IntArray,
    count: int,
) -> Steady:
    """The shorter iteration in the order that a graph has, from its nodes and edges in another one."""
    into: list[list[int]] = [[] for _ in kept]
    for begin, end in zip(source.tolist(), target.tolist(), strict=True):
        into[end].append(begin)
    level = np.zeros(len(kept), dtype=np.int64)
    for at in np.lexsort((kept, repeats[kept])).tolist():
        level[at] = 1 + max((int(level[before]) for before in into[at]), default=-1)
    order = np.lexsort((graph.stage[kept], level))
    new = np.empty(len(order), dtype=np.int64)
    new[order] = np.arange(len(order))
    source, target = new[source], new[target]
    by_target = np.lexsort((source, target))
    new_edge = np.empty(len(by_target), dtype=np.int64)
    new_edge[by_target] = np.arange(len(by_target))
    is_kept = np.zeros(len(graph), dtype=bool)
    is_kept[kept] = True
    latency = np.empty(len(source))
    latency[new_edge[edge]] = graph.edge_latency_s
    kept = kept[order]
    shorter = PipelineGraph(
        instructions=tuple(graph.instructions[at] for at in kept.tolist()),
        stage=graph.stage[kept],
        constant_s=graph.constant_s[kept],
        collective=graph.collective[kept],
        stage_nodes=tuple(new[node[nodes[is_kept[nodes]]]] for nodes in graph.stage_nodes),
        edge_source=source[by_target],
        edge_target=target[by_target],
        edge_latency_s=latency,
        level_start=np.searchsorted(level[order], np.arange(int(level.max()) + 2)).astype(np.int64),
    )
    return Steady(shorter, kept, new[node], new_edge[edge], repeats, new[before], new[last], count)


def balanced(
    graph: PipelineGraph,
    price_w: FloatArray,
    edge_price_w: FloatArray,
    finish_s: FloatArray,
    begin_held: npt.NDArray[np.bool_],
    end_held: npt.NDArray[np.bool_],
) -> tuple[FloatArray, FloatArray]:
    """Prices raised until those of the edges into each node, its own, and those out of it are the same.

    Args:
        graph: the precedence graph.
        price_w: shape (nodes,), of the nodes' time, from 0.
        edge_price_w: shape (edges,), of precedence, from 0.
        finish_s: shape (nodes,): of the edges at a node the one is raised by which it waits longest, or least.
        begin_held, end_held: shape (nodes,), whose begin or end has its time anyway, so that nothing has to balance.
    """
    arrival_s = finish_s[graph.edge_source] + graph.edge_latency_s
    ready_s = np.zeros(len(graph))
    np.maximum.at(ready_s, graph.edge_target, arrival_s)
    slack_s = ready_s[graph.edge_target] - arrival_s
    into, out = _edges_at(graph.edge_target, slack_s), _edges_at(graph.edge_source, slack_s)
    price, edge_price = price_w.tolist(), edge_price_w.tolist()

    def pass_on(
        nodes: range, came: dict[int, list[int]], goes: dict[int, list[int]], shut: list[bool], ends: list[bool]
    ) -> None:
        for node in nodes:
            if node in came and not shut[node]:
                price[node] = max(price[node], sum(edge_price[edge] for edge in came[node]))
            if node in goes and not ends[node]:
                missing = price[node] - sum(edge_price[edge] for edge in goes[node])
                edge_price[goes[node][0]] += max(0.0, missing)

    begins, ends = begin_held.tolist(), end_held.tolist()
    pass_on(range(len(graph)), into, out, begins, ends)
    pass_on(range(len(graph) - 1, -1, -1), out, into, ends, begins)
    return np.array(price), np.array(edge_price)


def _edges_at(ends: IntArray, slack_s: FloatArray) -> dict[int, list[int]]:
    """The edges at each node, those with the least slack first."""
    order = np.lexsort((slack_s, ends))
    nodes, first = np.unique(ends[order], return_index=True)
    parts = (part.tolist() for part in np.split(order, first[1:]))
    return dict(zip(nodes.tolist(), parts, strict=True))
