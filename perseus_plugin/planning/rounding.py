"""From the relaxation's event times to one measured clock per instruction."""

from __future__ import annotations

import numpy as np

from perseus_plugin.iteration.graph import FloatArray, IntArray
from perseus_plugin.planning.options import PlanningProblem

# Latest finish times are computed backwards and start times forwards, which float noise sets apart: first a deadline
# that something meets exactly is let pass, and if the sum comes out above it, a margin keeps it.
_MARGINS = (1e-12, -1e-9)


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
    fastest_choice = np.zeros(len(graph), dtype=np.int64)
    earliest = graph.times(fastest)[1]
    for margin in _MARGINS:
        latest = np.maximum(graph.latest_finish(fastest, deadline_s * (1 + margin)), earliest)
        limit = np.minimum(latest, target_finish_s + 1e-9 * deadline_s)
        choice, end = _sweep(problem, limit, fastest_choice)
        if end <= deadline_s:
            return choice
    return fastest_choice


def use_up_slack(problem: PlanningProblem, choice: IntArray, deadline_s: float) -> IntArray:
    """Slow instructions down, in topological order, into whatever slack is left; never speeds one up."""
    duration = problem.durations(choice)
    for margin in _MARGINS:
        latest = problem.graph.latest_finish(duration, deadline_s * (1 + margin))
        slower, end = _sweep(problem, latest, choice)
        if end <= deadline_s:
            return slower
    return choice


def _sweep(problem: PlanningProblem, limit_s: FloatArray, at_least: IntArray) -> tuple[IntArray, float]:
    """In topological order, the slowest option that finishes by `limit_s`, but none faster than `at_least`.

    Returns:
        The choice, and when the iteration ends.
    """
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
    return choice, float(finish.max())
