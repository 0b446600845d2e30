"""From the relaxation's event times to one measured clock per instruction."""

from __future__ import annotations

import numpy as np

from perseus_plugin.pipeline import FloatArray, IntArray
from perseus_plugin.planning.options import PlanningProblem

# Latest finish times are computed backwards and start times forwards; this keeps float noise off the deadline.
_MARGIN = 1e-9


def round_to_deadline(problem: PlanningProblem, target_finish_s: FloatArray, deadline_s: float) -> IntArray:
    """Give every instruction, in topological order, its cheapest option that finishes by its target.

    Each instruction starts when its predecessors really finish, so what rounding down leaves over is passed on.
    An instruction that cannot meet its target runs at its fastest; the iteration meets the deadline in any case.

    Args:
        problem: graph and options.
        target_finish_s: shape (nodes,), finish times to aim at.
        deadline_s: at least `problem.shortest_s`.

    Returns:
        Shape (nodes,), the option of every instruction, 0 for constant-time nodes.
    """
    graph, fastest = problem.graph, problem.fastest_s
    latest = graph.latest_finish(fastest, deadline_s * (1 - _MARGIN))
    latest = np.maximum(latest, graph.times(fastest)[1])
    fastest_choice = np.zeros(len(graph), dtype=np.int64)
    return _sweep(problem, np.minimum(latest, target_finish_s + _MARGIN * deadline_s), fastest_choice)


def use_up_slack(problem: PlanningProblem, choice: IntArray, deadline_s: float) -> IntArray:
    """Slow instructions down, in topological order, into whatever slack is left; never speeds one up."""
    duration = problem.durations(choice)
    latest = problem.graph.latest_finish(duration, deadline_s * (1 - _MARGIN))
    return _sweep(problem, latest, choice)


def _sweep(problem: PlanningProblem, limit_s: FloatArray, at_least: IntArray) -> IntArray:
    """In topological order, the slowest option that finishes by `limit_s`, but none faster than `at_least`."""
    graph = problem.graph
    option_s = problem.option_table[0][problem.class_of]
    incoming = {low: (sources, latency, offsets) for low, _, sources, latency, offsets in graph.forward_steps}
    choice = np.zeros(len(graph), dtype=np.int64)
    finish = np.empty(len(graph))
    for low, high in zip(graph.level_start[:-1].tolist(), graph.level_start[1:].tolist(), strict=True):
        start = np.zeros(high - low)
        if low:
            sources, latency, offsets = incoming[low]
            start = np.maximum.reduceat(finish[sources] + latency, offsets)
        in_time = start[:, None] + option_s[low:high] <= limit_s[low:high, None]
        chosen = np.maximum(in_time.sum(axis=1) - 1, at_least[low:high])
        choice[low:high] = chosen
        finish[low:high] = start + option_s[np.arange(low, high), chosen] + graph.constant_s[low:high]
    return choice
