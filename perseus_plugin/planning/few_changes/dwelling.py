"""Phases for instructions that are shorter than the time between two clock changes.

As rounding does it, in topological order and with real starts, so that what a phase leaves over is passed on: but a
stage's clock is chosen where it may change, for all of its instructions until it may change again.
"""

from __future__ import annotations

import numpy as np

from perseus_plugin.iteration.graph import FloatArray
from perseus_plugin.planning.few_changes.phases import Phases, StageClocks
from perseus_plugin.planning.options import PlanningProblem

# Shares of the deadline: what aims may be missed by, what is left of it, and noise of sums.
_ROUNDING, _MARGIN, _NOISE = 1e-9, 1e-9, 1e-12


def dwelling_phases(
    problem: PlanningProblem,
    stages: tuple[StageClocks, ...],
    aim_s: FloatArray,
    deadline_s: float,
    min_dwell_s: float,
) -> Phases:
    """The slowest clocks with which phases end in time, each kept for the dwell unless the deadline forbids.

    Args:
        problem: graph and options.
        stages: their clocks.
        aim_s: shape (nodes,), finish times to aim at; an instruction that cannot meet its own runs at its fastest.
        deadline_s: at least `problem.shortest_s`.
        min_dwell_s: shortest time between two changes.
    """
    graph, fastest = problem.graph, problem.fastest_s
    latest = graph.latest_finish(fastest, deadline_s * (1 - _MARGIN))
    forced = np.maximum(latest, graph.times(fastest)[1]) + _NOISE * deadline_s
    aim = np.minimum(aim_s + _ROUNDING * deadline_s, forced)
    return _Sweep(problem, stages, aim, min_dwell_s).run(forced.tolist(), deadline_s)


class _Sweep:
    def __init__(
        self,
        problem: PlanningProblem,
        stages: tuple[StageClocks, ...],
        aim_s: FloatArray,
        min_dwell_s: float,
    ) -> None:
        graph = problem.graph
        self.constant_s: list[float] = graph.constant_s.tolist()
        self.instructions: list[list[int]] = [stage.nodes.tolist() for stage in stages]
        self.time_s: list[list[list[float]]] = [stage.time_s.tolist() for stage in stages]
        # Where no instruction of a clock's may run, its energy is the table's mark for that.
        self.allowed: list[list[list[bool]]] = [(stage.energy_j < stage.forbidden_j).tolist() for stage in stages]
        self.aim_s: list[float] = aim_s.tolist()
        self.min_dwell_s = min_dwell_s
        self.starts: list[int] = graph.predecessor_start.tolist()
        self.sources: list[int] = graph.edge_source.tolist()
        self.latencies: list[float] = graph.edge_latency_s.tolist()
        self.stage: list[int] = graph.stage.tolist()
        self.is_constant: list[bool] = graph.is_constant.tolist()

    def run(self, forced_s: list[float], deadline_s: float) -> Phases:
        """One pass over all nodes."""
        stages = len(self.instructions)
        finish_s = [0.0] * len(self.stage)
        position, clock = [0] * stages, [0] * stages
        changed_s = [-np.inf] * stages
        begins: list[list[int]] = [[] for _ in range(stages)]
        clocks: list[list[int]] = [[] for _ in range(stages)]
        for node, stage in enumerate(self.stage):
            start_s = self._ready_s(node, finish_s)
            if self.is_constant[node]:
                finish_s[node] = start_s + self.constant_s[node]
                continue
            at = position[stage]
            position[stage] += 1
            chosen = clock[stage]
            # Too near the end there is no time left to go on to the first clock again.
            may_change = start_s - changed_s[stage] >= self.min_dwell_s and start_s + self.min_dwell_s <= deadline_s
            if at == 0 or may_change:
                chosen = self._slowest(stage, at, start_s, chosen)
            elif not self.allowed[stage][at][chosen] or start_s + self.time_s[stage][at][chosen] > forced_s[node]:
                chosen = self._fastest(stage, at)
            if at == 0 or chosen != clock[stage]:
                begins[stage].append(at)
                clocks[stage].append(chosen)
                clock[stage], changed_s[stage] = chosen, start_s
            finish_s[node] = start_s + self.time_s[stage][at][chosen]
        return Phases(
            tuple(tuple(one) or (0,) for one in begins),
            tuple(tuple(one) or (0,) for one in clocks),
        )

    def _ready_s(self, node: int, finish_s: list[float], other_than: int = -1) -> float:
        """When everything before it, in stages other than that, has finished."""
        ready_s = 0.0
        for edge in range(self.starts[node], self.starts[node + 1]):
            source = self.sources[edge]
            if self.stage[source] != other_than:
                ready_s = max(ready_s, finish_s[source] + self.latencies[edge])
        return ready_s

    def _slowest(self, stage: int, first: int, start_s: float, near: int) -> int:
        """The slowest clock with which all instructions of a dwell end in time; the fastest if there is none.

        Looked for from a clock that is probably near: slower ones take longer, and few are tried.
        """
        count = len(self.time_s[stage][first])
        if self._in_time(stage, first, start_s, near):
            while near + 1 < count and self._in_time(stage, first, start_s, near + 1):
                near += 1
            return near
        for clock in range(near - 1, -1, -1):
            if self._in_time(stage, first, start_s, clock):
                return clock
        return self._fastest(stage, first)

    def _in_time(self, stage: int, first: int, start_s: float, clock: int) -> bool:
        nodes, times_s, allowed = self.instructions[stage], self.time_s[stage], self.allowed[stage]
        end_s = start_s
        for at in range(first, len(nodes)):
            node = nodes[at]
            if not allowed[at][clock]:
                return False
            if at > first:
                # What other stages do until then is not known yet: as aimed at.
                end_s = max(end_s, self._ready_s(node, self.aim_s, stage))
            end_s += times_s[at][clock]
            if end_s > self.aim_s[node]:
                return False
            if end_s - start_s >= self.min_dwell_s:
                break
        return True

    def _fastest(self, stage: int, at: int) -> int:
        times_s, allowed = self.time_s[stage][at], self.allowed[stage][at]
        return min((clock for clock in range(len(times_s)) if allowed[clock]), key=times_s.__getitem__)
