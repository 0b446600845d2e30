"""Power through time of a plan's iteration, repeated for ever, and the highest average over any window. Exact; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.discretise import Solution
from perseus_plugin.planning.options import PlanningProblem
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.power.planned import PlannedPeaks


@dataclass(frozen=True, eq=False)
class PowerTrace:
    """Power of one GPU through an iteration, which is repeated: it holds `watts[i]` until `until_s[i]`.

    Attributes:
        until_s: shape (pieces,), rising; the last one is the iteration's end.
        watts: shape (pieces,).
    """

    until_s: FloatArray
    watts: FloatArray

    def energy_j(self, at_s: FloatArray) -> FloatArray:
        """From the beginning of the first iteration until some times in it or in later ones."""
        period_s = float(self.until_s[-1])
        edges_s = np.concatenate([[0.0], self.until_s])
        sums_j = np.concatenate([[0.0], np.cumsum(self.watts * np.diff(edges_s))])
        rounds = np.floor(at_s / period_s)
        found: FloatArray = rounds * sums_j[-1] + np.interp(at_s - rounds * period_s, edges_s, sums_j)
        return found


def peak_w(traces: Sequence[PowerTrace], counts: Sequence[int], window_s: float) -> float:
    """The highest average over any window of the sum of some GPUs that begin their iterations together.

    The average is straight in the window's begin between those at which one of its ends meets a change of power, so
    that one of these is the highest.

    Args:
        traces: of as many GPUs as `counts` says; of the same length all.
        counts: how many there are of each.
        window_s: how long the window is; it may be longer than an iteration.
    """
    period_s = float(traces[0].until_s[-1])
    edges_s = np.concatenate([[0.0], *(trace.until_s for trace in traces)])
    begins_s = np.unique(np.concatenate([edges_s % period_s, (edges_s - window_s) % period_s]))
    energy_j = np.zeros(len(begins_s))
    for trace, count in zip(traces, counts, strict=True):
        if count:
            energy_j += count * (trace.energy_j(begins_s + window_s) - trace.energy_j(begins_s))
    return float(energy_j.max() / window_s)


def traces_of(problem: PlanningProblem, solution: Solution) -> list[PowerTrace]:
    """One for each stage.

    A wait is spent at the clock that it has of its own, or at the higher one of those beside it; clock changes count
    as taking no time.
    """
    graph, costs = problem.graph, problem.waiting_costs
    frequency_mhz = solution.assignment.frequency_mhz
    _, watts = problem.at_clocks(frequency_mhz)
    start_s, finish_s = graph.times(solution.assignment.duration_s)
    spans = costs.spans
    before_mhz, after_mhz = costs.beside_mhz(frequency_mhz)
    waits_mhz = solution.waits.frequency_mhz
    around_w = costs.above_least_w(np.maximum(before_mhz, after_mhz))
    inside_w = costs.above_least_w(np.where(waits_mhz > 0, waits_mhz, np.maximum(before_mhz, after_mhz)))
    end_s = solution.iteration_time_s
    traces = []
    for stage in range(graph.stages):
        least_w = float(problem.blocking_power_w[stage])
        pieces: list[tuple[float, float]] = []
        own = np.flatnonzero(spans.stage == stage).tolist()
        for span in own:
            after = int(spans.after[span])
            until_s = end_s if after < 0 else float(start_s[after])
            if waits_mhz[span]:
                begin_s, back_s = float(solution.waits.begin_s[span]), float(solution.waits.end_s[span])
                beside = around_w[span] if after < 0 else costs.above_least_w(after_mhz)[span]
                pieces += [(begin_s, around_w[span] + least_w), (back_s, inside_w[span] + least_w)]
                pieces.append((until_s, beside + least_w))
            else:
                pieces.append((until_s, around_w[span] + least_w))
            if after >= 0:
                pieces.append((float(finish_s[after]), float(watts[after]) + least_w))
        if not own:
            pieces.append((end_s, least_w))
        until = np.maximum.accumulate(np.array([at for at, _ in pieces]))
        until[-1] = end_s
        traces.append(PowerTrace(np.minimum(until, end_s), np.array([power for _, power in pieces])))
    return traces


def planned_peaks(problem: PlanningProblem, solution: Solution, budget: PowerBudget) -> PlannedPeaks:
    """The peaks of a job, all of whose pipelines follow the plan and begin their iterations together."""
    stages = problem.graph.stages
    stage_of = np.array(budget.ranks_by_stage(stages))
    traces, window_s = traces_of(problem, solution), budget.peaks.window_s

    def at_node(counts: tuple[int, ...]) -> float:
        return budget.node_w(peak_w(traces, counts, window_s), sum(counts))

    per_node = budget.gpus_per_node
    nodes = {
        tuple(np.bincount(stage_of[first : first + per_node], minlength=stages).tolist())
        for first in range(0, len(stage_of), per_node)
    }
    return PlannedPeaks(
        window_s,
        at_node(tuple(np.bincount(stage_of, minlength=stages).tolist())),
        max(map(at_node, nodes)),
        max(peak_w([trace], [1], window_s) for trace in traces),
    )
